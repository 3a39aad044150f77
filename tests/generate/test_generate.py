"""Drafting strategies: greedy output is plain greedy output, sampled output keeps its distribution, and bad calls are refused."""

import copy
import itertools

import pytest
import torch

from regard import RegardError, models
from regard.generate import Draft, DraftModel, Greedy, Host, PromptLookup, Sampled, Shape, Strategy, Typical, chain, generate, made, named
from regard.generate.tree import ancestors

transformers = pytest.importorskip("transformers")


def model_of(vocab=13, layers=2, seed=0, **options):
    torch.manual_seed(seed)
    config = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    config |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **options}
    kind = config.pop("kind", "Llama")
    made = getattr(transformers, f"{kind}Config")(vocab_size=vocab, num_hidden_layers=layers, **config)
    return getattr(transformers, f"{kind}ForCausalLM")(made).eval()


class Wild(Strategy):
    """Trees of random shapes and tokens, differing from row to row, with nodes that are not there."""

    def __init__(self, vocab=13, size=9):
        self.vocab, self.size, self.draw = vocab, size, torch.Generator().manual_seed(0)

    def draft(self, state):
        rows = len(state.root)
        tokens = torch.randint(self.vocab, (rows, self.size), generator=self.draw)
        tokens[:, 0] = state.root
        parents = torch.stack(
            [torch.tensor([0] + [int(torch.randint(i, (), generator=self.draw)) for i in range(1, self.size)]) for _ in range(rows)]
        )
        live = torch.rand(rows, self.size, generator=self.draw) < 0.8
        live[:, 0] = True
        return Draft(tokens, parents, live)


def prompts(lengths, vocab=13, seed=1):
    draw = torch.Generator().manual_seed(seed)
    ids, mask = torch.zeros(len(lengths), max(lengths), dtype=torch.long), torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, n in enumerate(lengths):
        ids[row, -n:] = torch.randint(3, vocab, (n,), generator=draw)
        mask[row, -n:] = 1
    return ids, mask


def near(model, noise=0.002):
    """A model that mostly says the same."""
    other = copy.deepcopy(model)
    for p in other.parameters():
        p.data.add_(noise * torch.randn_like(p))
    return other


HOSTS = {
    "llama": {},
    "mistral, window": {"kind": "Mistral", "sliding_window": 7},
    "eager": {"attn_implementation": "eager"},
    "gemma 3": {"kind": "Gemma3", "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8},
    "qwen 3": {"kind": "Qwen3", "head_dim": 8},
}


def host_of(name):
    options = dict(HOSTS[name])
    if options.get("kind") == "Gemma3":
        torch.manual_seed(0)
        del options["kind"]
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
        config = transformers.Gemma3TextConfig(vocab_size=13, eos_token_id=2, pad_token_id=0, bos_token_id=1, **sizes, **options)
        return transformers.Gemma3ForCausalLM(config).eval()
    return model_of(**options)


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("strategy", ["plain", "prompt-lookup", "wild", "draft"])
def test_greedy_output_is_plain_greedy_output(name, strategy):
    model = host_of(name)
    model = model if name == "eager" else model.double()  # transformers' own eager attention pads with NaN in float64
    ids, mask = prompts([9, 4, 1, 6])
    how = {"wild": Wild(), "draft": DraftModel(near(model))}.get(strategy, strategy)
    truth = model.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False)
    found = generate(model, ids, how, attention_mask=mask, max_new_tokens=40)
    assert torch.equal(found.tokens, truth) and (strategy == "plain") == (found.tokens_per_step == 1.0)


def test_rows_get_what_they_get_alone():
    model, (ids, mask) = model_of().double(), prompts([9, 4, 1])
    together = generate(model, ids, Wild(), attention_mask=mask, max_new_tokens=20, ends=()).tokens
    for row, n in enumerate([9, 4, 1]):
        alone = generate(model, ids[row : row + 1, -n:], Wild(), max_new_tokens=20, ends=()).tokens
        assert torch.equal(alone[0, n:], together[row, 9:])


def test_a_draft_that_says_the_same_stays_whole():
    model, (ids, mask) = model_of().double(), prompts([5, 8])
    found = generate(model, ids, DraftModel(model, 4), attention_mask=mask, max_new_tokens=20, ends=())
    assert found.steps == 4 and found.tokens_per_step == 5.0


def test_ends_stop_a_row_and_pads_follow():
    model, (ids, mask) = model_of().double(), prompts([5, 8])
    free = generate(model, ids, "plain", attention_mask=mask, max_new_tokens=12, ends=()).tokens
    end = int(free[0, 12])
    found = generate(model, ids, Wild(), attention_mask=mask, max_new_tokens=12, ends=[end]).tokens
    truth = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=end)
    assert torch.equal(found, truth)


def test_tokens_stream_as_they_come():
    model, (ids, _), seen = model_of().double(), prompts([5]), []
    found = generate(model, ids, Wild(), max_new_tokens=20, ends=(), stream=lambda row, tokens: seen.extend(tokens))
    assert seen == found.tokens[0, 5:].tolist() and len(seen) == 20 and sum(int(c) for c in found.counts) == 20


def exact(model, prompt, length, temperature, vocab):
    """The probability of every continuation, by the chain rule."""
    out = {}
    for words in itertools.product(range(vocab), repeat=length):
        ids = torch.tensor([[*prompt, *words]])
        p = (model(ids).logits.float() / temperature).softmax(-1)[0]
        out[words] = float(torch.stack([p[len(prompt) - 1 + i, w] for i, w in enumerate(words)]).prod())
    return out


@torch.no_grad()
@pytest.mark.parametrize("strategy", ["wild", "drawn", "tree of draws"])
def test_sampled_output_keeps_its_distribution(strategy):
    """Chi-square over all continuations of three tokens of a vocabulary of three, 99.9% point."""
    vocab, length, temperature, rows = 3, 3, 0.8, 6000
    model, small = model_of(vocab, seed=5, eos_token_id=None).float(), model_of(vocab, seed=6, eos_token_id=None)
    for one in (model, small):
        one.lm_head.weight.mul_(40)
    draw = torch.Generator().manual_seed(0)

    class Draws(Strategy):
        """Two children of the root drawn from odds that are not the model's, and one child of the first."""

        def draft(self, state):
            odds = torch.tensor([0.6, 0.3, 0.1]).expand(len(state.root), 4, 3)
            guesses = torch.multinomial(odds[:, 0], 3, replacement=True, generator=draw)
            return Draft(torch.cat((state.root[:, None], guesses), 1), torch.tensor([[0, 0, 0, 1]]), None, odds)

    how = {"wild": Wild(vocab, 6), "drawn": DraftModel(small, 2, 1.3, draw), "tree of draws": Draws()}[strategy]
    ids = torch.tensor([[0, 1, 2]])
    truth = exact(model, ids[0].tolist(), length, temperature, vocab)
    assert max(truth.values()) < 0.5
    found = generate(model, ids.expand(rows, -1), how, max_new_tokens=length, temperature=temperature, generator=draw, ends=()).tokens[
        :, 3:
    ]
    seen = dict.fromkeys(truth, 0)
    for row in found.tolist():
        seen[tuple(row)] += 1
    chi = sum((seen[w] - rows * p) ** 2 / (rows * p) for w, p in truth.items())
    assert chi < 54.1  # 26 degrees of freedom


def test_odds_keep_more_guesses_than_matching():
    draw = torch.Generator().manual_seed(0)
    odds = torch.full((4000, 2, 4), 0.25)
    draft = chain(torch.stack((torch.zeros(4000, dtype=torch.long), torch.multinomial(odds[:, 0], 1, generator=draw)[:, 0]), 1), odds=odds)
    logits = torch.zeros(4000, 2, 4)
    kept = [float((Sampled(1.0, draw)(one, logits)[0] > 0).float().mean()) for one in (draft, chain(draft.tokens))]
    assert kept[0] == 1.0 and abs(kept[1] - 0.25) < 0.03


def test_typical_acceptance_by_hand():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = p.log().expand(1, 4, 4) * 0.7
    entropy = -sum(x * (x + 1e-5).log() for x in p)
    bar = min(0.09, 0.3 * float((-entropy).exp()))
    draft = Draft(torch.tensor([[0, 1, 2, 3]]), torch.tensor([[0, 0, 0, 2]]))
    assert bar < 0.15 and Typical()(draft, logits)[0] == (3 if bar < 0.05 else 1)
    assert Typical(eps=0.0)(draft, logits)[0] == 3  # a threshold of 0: every path
    assert Typical(eps=1.0, delta=1e9)(draft, logits) == (torch.tensor([0]), torch.tensor([0]))  # nothing has more than all
    high = Typical(eps=0.2, delta=10.0)
    assert high(draft, logits)[0] == 1  # 0.3 alone
    both = Draft(torch.tensor([[0, 2, 1, 0]]), torch.tensor([[0, 0, 0, 0]]))
    assert Typical(eps=0.0)(both, logits)[0] == 3  # as deep as one another: the likeliest


def test_ancestors_by_loops():
    parents = torch.stack([torch.tensor([0] + [int(torch.randint(i, ())) for i in range(1, 33)]) for _ in range(5)])
    found = ancestors(parents)
    for b in range(5):
        for i in range(33):
            way, at = {i}, i
            while at:
                at = int(parents[b, at])
                way.add(at)
            assert {j for j in range(33) if found[b, i, j]} == way


def test_shapes_by_hand_and_refused():
    shape = Shape.of([[1], [0, 1], [0], [0, 1, 3]])
    assert shape.paths == ((1,), (0,), (0, 1), (0, 1, 3)) and shape.parents.tolist() == [0, 0, 0, 2, 3]
    assert shape.ranks.tolist() == [0, 1, 0, 1, 3] and shape.levels == [(1, 3), (3, 4), (4, 5)]
    for bad, why in (([[0, 1]], "without its last rank"), ([[0], [0]], "twice"), ([[-1]], "ranks from 0"), ([[]], "ranks from 0")):
        with pytest.raises(RegardError, match=why):
            Shape.of(bad)


@torch.no_grad()
def test_tree_logits_are_those_of_paths():
    model = host_of("gemma 3").double()
    ids, mask = prompts([6, 3])
    host = Host(model)
    host.read(ids[:, :-1], mask[:, :-1].bool())
    state = type("State", (), {"root": ids[:, -1]})()
    draft = Wild(size=14).draft(state)
    logits = host.verify(draft).logits
    for row, n in enumerate([6, 3]):
        for node in range(14):
            path, count = draft.path_to(torch.full((2,), node))
            words = draft.tokens[row, path[row, : count[row]]]
            alone = model(torch.cat((ids[row, -n:-1], words))[None]).logits[0, -1]
            assert torch.allclose(logits[row, node], alone, atol=1e-9)


def test_prompt_lookup_finds_the_newest_longest_match():
    look = PromptLookup(guesses=3, longest=2).look
    assert (
        look([5, 6, 7, 8, 9, 6, 1, 5, 6]) == [7, 8, 9]
        and look([5, 6, 1, 7, 6, 2, 6, 6]) == [6]
        and look([1, 2, 3]) == []
        and look([1]) == []
    )
    assert look([4, 1, 4, 2, 4]) == [2, 4] and PromptLookup(3, 2, 2).look([4, 1, 4, 2, 4]) == []


def test_bad_calls_are_refused():
    model, ids = model_of(), torch.tensor([[3, 4]])
    for options, why in (
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1"),
        ({"temperature": 1.0, "accept": Greedy()}, "a rule that has its own"),
        ({"attention_mask": torch.tensor([[1, 0]])}, "padding on the left"),
        ({"attention_mask": torch.ones(1, 3)}, "expected .B, L. as ids"),
        ({"strategy": "promptlookup"}, "Did you mean prompt-lookup"),
        ({"strategy": DraftModel(model_of(14))}, "the draft has 14 tokens and the model 13"),
    ):
        with pytest.raises(RegardError, match=why):
            generate(model, ids, **options)
    for bad in (torch.zeros(1, 0, dtype=torch.long), torch.tensor([[13]]), torch.tensor([[-1]]), torch.tensor([3]), torch.rand(1, 3)):
        with pytest.raises(RegardError, match="expected"):
            generate(model, bad)
    with pytest.raises(RegardError, match=r"model\.eval"):
        generate(model_of().train(), ids)
    with pytest.raises(RegardError, match="expected a causal language model"):
        generate(torch.nn.Linear(2, 2).eval(), ids)
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=13, hidden_size=16, num_hidden_layers=1)).eval()
    with pytest.raises(RegardError, match="keep states"):
        generate(mamba, ids)
    for bad in ({"guesses": 0}, {"shortest": 3, "longest": 2}):
        with pytest.raises(RegardError, match="expected"):
            PromptLookup(**bad)
    with pytest.raises(RegardError, match="is not known"):
        made("draft-model")
    assert "prompt-lookup" in named()


@torch.no_grad()
def test_a_real_model_says_the_same(smollm):
    tokens = models.tokenizer()("def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n", return_tensors="pt").input_ids
    truth = smollm.generate(tokens, max_new_tokens=24, do_sample=False)
    assert torch.equal(generate(smollm, tokens, max_new_tokens=24).tokens, truth)
