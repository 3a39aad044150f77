"""Policies over transformers' caches: what stays is what plain formulas say, rows of padded batches get what they get alone, bytes are gone."""

import pytest
import torch
import torch.nn.functional as F

from regard import RegardError
from regard.cache import H2O, TOVA, Ada, Full, KeyNorm, Planned, Pyramid, Random, SnapKV, StreamingLLM, read_prompt
from regard.lab.checks.shared.decoding import llama
from regard.zoo.systems.duoattention import DuoAttention
from regard.zoo.systems.recycled_attention import RecycledAttention

transformers = pytest.importorskip("transformers")


def watched(model, ids, mask=None):
    """q, k, v of every layer for whole texts, and weights, by transformers' own eager attention."""
    kept = {}
    model.set_attn_implementation("eager")
    out = model(ids, attention_mask=mask, output_attentions=True, use_cache=True)
    model.set_attn_implementation("sdpa")
    for at, layer in enumerate(out.past_key_values.layers):
        kept[at] = (layer.keys, layer.values, out.attentions[at])
    return kept


def left(policy, model, ids, mask=None):
    with policy(model) as session, torch.no_grad():
        model(ids, attention_mask=mask)
    return [[(part.heads.tolist(), part.places, part.alive, part.keys) for part in layer.parts] for layer in session.cache.layers]


def best(scores, count):
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :count].sort(-1).values


@pytest.fixture(scope="module")
def given():
    torch.manual_seed(0)
    model, ids = llama(layers=3, sharp=2), torch.stack([torch.randperm(49)[:23] + 1 for _ in range(2)])
    with torch.no_grad():
        return model, ids, watched(model, ids)


def mass_of(weights, rows=None):
    p = weights if rows is None else weights[:, :, -rows:]
    return p.unflatten(1, (2, 2)).sum((2, 3))


def expected(name, keys, weights):
    """(B, 2, 8) places that stay of 23, by plain formulas."""
    b, n = keys.shape[0], keys.shape[2]
    new = torch.arange(n) >= n - 4
    if name == "streaming":
        return torch.tensor([0, 1, 2, 3, 19, 20, 21, 22]).expand(b, 2, -1)
    if name == "h2o":
        return best(mass_of(weights).masked_fill(new, torch.inf), 8)
    if name == "snap":
        p = weights[:, :, -4:].unflatten(1, (2, 2)).sum(3)[..., : n - 4]
        rows = [[[sum(p[i, h, g, max(0, j - 1) : j + 2]) / 3 for j in range(n - 4)] for g in range(2)] for i in range(b) for h in range(2)]
        s = torch.tensor([[[float(x) for x in row] for row in head] for head in rows]).view(b, 2, 2, n - 4).mean(2)
        return best(F.pad(s, (0, 4), value=torch.inf), 8)
    if name == "tova":
        return best(weights[:, :, -1].mean(1)[:, None].expand(-1, 2, -1), 8)
    return best((-keys.norm(dim=-1)).masked_fill(torch.arange(n) == n - 1, torch.inf), 8)


POLICIES = {
    "streaming": lambda: StreamingLLM(8),
    "h2o": lambda: H2O(8),
    "snap": lambda: SnapKV(8, window=4, kernel=3),
    "tova": lambda: TOVA(8),
    "key norm": lambda: KeyNorm(8),
}


@pytest.mark.parametrize("name", POLICIES)
def test_what_stays_is_what_the_formula_says(given, name):
    model, ids, kept = given
    for at, parts in enumerate(left(POLICIES[name](), model, ids)):
        ((heads, places, alive, keys),) = parts
        truth = expected(name, kept[at][0], kept[at][2])
        if at == 0:  # later layers read the same, for the prompt is attended whole
            assert heads == [0, 1] and bool(alive.all())
        assert torch.equal(places, truth)
        assert torch.allclose(keys, kept[at][0].gather(2, truth[..., None].expand(-1, -1, -1, 8)), atol=1e-5)


@pytest.mark.parametrize("name", POLICIES)
def test_decoding_equals_attention_under_the_recorded_choice(given, name):
    """Steps by hand: masks of all pairs from the places that were there at each step."""
    model, ids, _ = given
    policy = POLICIES[name]()
    with policy(model) as session, torch.no_grad():
        out = model(ids)
        there = [[layer.parts[0].places.clone() for layer in session.cache.layers]]
        steps, tokens = [], [out.logits[:, -1].argmax(-1)]
        for _ in range(4):
            out = model(tokens[-1][:, None], past_key_values=session.cache)
            steps.append(out.logits[:, -1])
            tokens.append(out.logits[:, -1].argmax(-1))
            there.append([layer.parts[0].places.clone() for layer in session.cache.layers])
    text = torch.cat((ids, torch.stack(tokens, 1)[:, :4]), 1)
    seen = [torch.zeros(2, 4, 27, 27, dtype=torch.bool) for _ in range(3)]
    for at in range(3):
        seen[at][:, :, :23, :23] = torch.ones(23, 23, dtype=torch.bool).tril()
        for step in range(4):
            places = there[step][at].repeat_interleave(2, 1)
            seen[at][:, :, 23 + step].scatter_(-1, places, True)
            seen[at][:, :, 23 + step, 23 + step] = True
    x = model.model.embed_tokens(text)
    cos, sin = model.model.rotary_emb(x, torch.arange(27)[None])
    for at, layer in enumerate(model.model.layers):
        y, own = layer.input_layernorm(x), layer.self_attn
        q, k, v = (proj(y).view(2, 27, -1, 8).transpose(1, 2) for proj in (own.q_proj, own.k_proj, own.v_proj))
        q, k = (t * cos[:, None] + torch.cat((-t[..., 4:], t[..., :4]), -1) * sin[:, None] for t in (q, k))
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[at], enable_gqa=True)
        x = x + own.o_proj(o.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    truth = model.lm_head(model.model.norm(x))[:, 23:]
    assert torch.allclose(torch.stack(steps, 1), truth, atol=1e-9)
    assert all(layer.parts[0].keys.shape[2] == (8 if policy.decode else 12) for layer in session.cache.layers)


ALL = {
    **POLICIES,
    "pyramid": lambda: Pyramid(SnapKV(8, 2, 3), 4),
    "ada": lambda: Ada(SnapKV(8, 2, 3)),
    "fraction": lambda: H2O(0.5),
    "full": Full,
    "recycled": lambda: RecycledAttention(3, 4),
}


@pytest.mark.parametrize("name", ALL)
def test_rows_of_a_padded_batch_get_what_they_get_alone(name):
    torch.manual_seed(0)
    model, ids = llama(layers=3, sharp=2), torch.randint(1, 50, (3, 20))
    mask = (torch.arange(20) >= torch.tensor([[0], [9], [15]])).long()
    with ALL[name]()(model):
        both = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True)
        for row, pad in enumerate((0, 9, 15)):
            alone = model.generate(
                ids[row : row + 1, pad:], max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
            assert torch.equal(alone.sequences[0, 20 - pad :], both.sequences[row, 20:])
            gaps = [float((a[0] - b[row]).abs().max()) for a, b in zip(alone.logits, both.logits, strict=True)]
            assert max(gaps) < 1e-9


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_full_budget_changes_nothing_and_the_model_is_left_as_it_was(given, implementation):
    model, ids, _ = given
    model.set_attn_implementation(implementation)
    before = model.generate(ids, max_new_tokens=6, do_sample=False)
    for policy in (StreamingLLM(1000), H2O(1.0, decode=False), Full(), SnapKV(50), Random(40)):
        with policy(model):
            assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), before)
    assert model.config._attn_implementation == implementation and not model._forward_pre_hooks
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), before)
    model.set_attn_implementation("sdpa")


def test_bytes_are_gone_and_heads_keep_their_own_number(given):
    model, ids, _kept = given
    with Ada(SnapKV(6, 2, 1), safeguard=0.5)(model) as session, torch.no_grad():
        model(ids[:1])
    for layer in session.cache.layers:
        sizes = {head: part.keys.shape[2] for part in layer.parts for head in part.heads.tolist()}
        assert sum(sizes.values()) == 12 and min(sizes.values()) >= 3
        assert layer.bytes == 12 * 2 * 8 * 8
        for part in layer.parts:
            assert part.keys.untyped_storage().nbytes() == part.keys.numel() * 8


def test_ada_keeps_the_best_of_a_layer(given):
    model, ids, kept = given
    with Ada(SnapKV(6, 2, 1), safeguard=0.5)(model) as session, torch.no_grad():
        model(ids[:1])
    for at, layer in enumerate(session.cache.layers):
        p = kept[at][2][:1, :, -2:].unflatten(1, (2, 2)).sum(3).mean(2)[0]
        p[:, -2:] = torch.inf
        sure = p.argsort(-1, descending=True)[:, :3]
        p.scatter_(1, sure, torch.inf)
        chosen = p.flatten().argsort(dim=0, descending=True, stable=True)[:12]
        truth = {(int(x) // 23, int(x) % 23) for x in chosen}
        found = {(head, int(x)) for part in layer.parts for i, head in enumerate(part.heads.tolist()) for x in part.places[0, i]}
        assert found == truth


def test_pyramids_by_hand(given):
    model, ids, _ = given
    for budget, beta, truth in (
        (8, 4, [13, 8, 3]),
        (12, 20, [22, 12, 2]),
        (13, 4, [22, 13, 4]),
        (13, 20, [23, 13, 3]),
        (15, 4, [15, 15, 15]),
        (2, 4, [2, 2, 2]),
    ):
        sizes = [parts[0][1].shape[2] for parts in left(Pyramid(SnapKV(budget, 2, 3), beta=beta), model, ids)]
        assert sizes == truth, budget
    assert [parts[0][1].shape[2] for parts in left(Pyramid(KeyNorm(10), 4), model, ids)] == [18, 10, 2]


def test_policies_by_layer(given):
    model, ids, _ = given
    assert [parts[0][1].shape[2] for parts in left(Planned({1: KeyNorm(5)}), model, ids)] == [23, 5, 23]
    with pytest.raises(RegardError, match=r"plan names layers \[3\]"):
        Planned({3: KeyNorm(5)})(model)


def test_windows_of_the_model_hold():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    config = transformers.MistralConfig(vocab_size=50, sliding_window=7, eos_token_id=None, pad_token_id=0, **sizes)
    model, ids = transformers.MistralForCausalLM(config).double().eval(), torch.randint(1, 50, (2, 15))
    mask = (torch.arange(15) >= torch.tensor([[0], [9]])).long()
    before = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    with Full()(model):
        assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False), before)
    with StreamingLLM(7, sinks=0)(model):
        assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False), before)


STATIC = {"full": Full, "h2o": lambda: H2O(8), "snap": lambda: SnapKV(8, 4, 3), "streaming": lambda: StreamingLLM(0.5)}


@pytest.mark.parametrize("kind", ["one kind", "two kinds"])
@pytest.mark.parametrize("name", STATIC)
def test_a_static_cache_remembers_what_a_growing_one_does(name, kind):
    """`generate` prepares it, and the policy's own layers take its place: entries are gone all the same."""
    torch.manual_seed(0)
    model = llama(layers=2, sharp=2)
    if kind == "two kinds":
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
        own = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8, "query_pre_attn_scalar": 8}
        config = transformers.Gemma3TextConfig(vocab_size=50, eos_token_id=None, pad_token_id=0, **sizes, **own)
        model = transformers.Gemma3ForCausalLM(config).double().eval()
    ids, mask = torch.randint(1, 50, (2, 15)), (torch.arange(15) >= torch.tensor([[0], [4]])).long()
    found = []
    for implementation in (None, "static"):
        with STATIC[name]()(model) as session:
            options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": implementation}
            found.append(model.generate(ids, attention_mask=mask, **options))
        assert name == "full" or sum(layer.parts[0].keys.shape[2] for layer in session.cache.layers) < 2 * 20
    assert torch.equal(*found)


def test_beams_follow(given):
    model, ids, _ = given
    before = model.generate(ids, max_new_tokens=5, num_beams=3, do_sample=False)
    with Full()(model):
        assert torch.equal(model.generate(ids, max_new_tokens=5, num_beams=3, do_sample=False), before)


def test_bad_input(given):
    model, ids, _ = given
    for budget in (0, -1, 0.0, 1.5, True, "half"):
        with pytest.raises(RegardError, match="expected a whole number of at least 1, or a fraction"):
            KeyNorm(budget)
    for bad in ({"window": 0}, {"kernel": 4}, {"pooling": "mean"}):
        with pytest.raises(RegardError, match="expected positive, odd"):
            SnapKV(8, **bad)
    with pytest.raises(RegardError, match="after the prompt alone"):
        Ada(H2O(8))
    with pytest.raises(RegardError, match="expected a decoder"):
        KeyNorm(3)(torch.nn.Linear(2, 2))
    with KeyNorm(3)(model), pytest.raises(RegardError, match="on the model already"):
        KeyNorm(3)(model).__enter__()
    full = model(ids, use_cache=True).past_key_values
    with KeyNorm(3)(model):
        with pytest.raises(RegardError, match="DynamicCache of 23 tokens: expected none, or a new DynamicCache or StaticCache"):
            model(ids[:, :1], past_key_values=full)
        with pytest.raises(RegardError, match="cannot go back"):
            model(ids).past_key_values.crop(-1)


@pytest.mark.parametrize("name", ALL)
def test_a_prompt_read_once_leaves_what_reading_it_leaves(name):
    torch.manual_seed(0)
    model, ids = llama(layers=3, sharp=2), torch.randint(1, 50, (3, 20))
    mask = (torch.arange(20) >= torch.tensor([[0], [9], [15]])).long()
    prompt, found = read_prompt(model, ids, mask), []
    for recalled in (False, True):
        with ALL[name]()(model) as session, torch.no_grad():
            if recalled:
                session.recall(prompt)
            else:
                out = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0))
                assert torch.allclose(out.logits[:, -1], prompt.logits)
            token, places = ids[:, -1:], mask.sum(1, keepdim=True)
            more = torch.cat((mask, mask[:, -1:]), 1)
            found.append(model(token, attention_mask=more, position_ids=places, past_key_values=session.cache).logits)
    assert torch.allclose(*found, atol=1e-12)


def test_policies_that_read_prompts_in_their_own_way_cannot_recall():
    model, ids = llama(layers=2), torch.randint(1, 50, (1, 20))
    prompt = read_prompt(model, ids)
    with DuoAttention(torch.rand(2, 2))(model) as session, pytest.raises(RegardError, match="DuoAttention reads prompts in its own way"):
        session.recall(prompt)
