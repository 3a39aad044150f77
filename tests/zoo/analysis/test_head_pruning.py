"""Heads of real architectures: masks and physical removal agree, caches shrink, and what cannot be cut is refused."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")

import regard  # noqa: E402
from regard.interpret import ablated, head_counts, importance, prune, prune_schedule, removable  # noqa: E402
from regard.interpret.tables import HeadTable  # noqa: E402

BASE = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
BASE |= {"max_position_embeddings": 64, "pad_token_id": 0}
SEQUENCE = {"vocab_size": 97, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
SEQUENCE |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0}
KINDS = {
    "llama": ({**BASE, "num_key_value_heads": 2, "head_dim": 8}, [(0, 2), (0, 3), (1, 0), (1, 2)]),
    "bert": (BASE, [(0, 1), (1, 0), (1, 3)]),
    "opt": ({**BASE, "ffn_dim": 32, "word_embed_proj_dim": 32}, [(0, 1), (1, 0), (1, 2)]),
    "bart": (SEQUENCE, [(0, 1), (1, 0), (2, 3)]),  # encoder, decoder, cross-attention
}


def built(kind, options):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **options)
    loader = transformers.AutoModelForCausalLM if kind in ("llama", "opt") else transformers.AutoModel
    return loader.from_config(config, attn_implementation="sdpa").eval()


def batch(kind):
    ids, keep = torch.randint(3, 97, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    keep[0, :4] = 0
    return {"input_ids": ids, "attention_mask": keep, **({"decoder_input_ids": ids[:, :6]} if kind == "bart" else {})}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_smaller_models_are_masked_models(kind):
    options, heads = KINDS[kind]
    model, inputs = built(kind, options), batch(kind)
    smaller = copy.deepcopy(model)
    biased = kind != "llama"
    gone = prune(smaller, heads)
    width = 3 * (32 * 8 + 8 * biased) + 8 * 32
    if kind == "llama":  # layer 0 loses a key head, layer 1 keeps both
        width = [2 * 32 * 8 * 2 + 2 * 32 * 8, 2 * 32 * 8 * 2]
        assert gone == sum(width)
    else:
        assert gone == len(heads) * width
    with ablated(model, heads):
        torch.testing.assert_close(smaller(**inputs)[0], model(**inputs)[0], rtol=1e-4, atol=1e-5)
    taken = [sum(1 for layer, _ in heads if layer == at) for at in range(len(head_counts(model)))]
    assert head_counts(smaller) == [count - less for count, less in zip(head_counts(model), taken)]
    if kind in ("llama", "opt"):
        with ablated(model, heads):
            truth = model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
        out = smaller.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0, return_dict_in_generate=True)
        assert torch.equal(out.sequences, truth)
        shapes = [layer.keys.shape[1] for layer in out.past_key_values.layers]
        assert shapes == ([1, 2] if kind == "llama" else [3, 2])
        with ablated(smaller, [(0, 0)]), regard.taps(smaller, "heads") as seen:
            smaller(**inputs)
        assert not seen["heads", 0][:, 0].any() and seen["heads", 0][:, 1:].any()


def test_what_cannot_be_cut_is_refused_and_nothing_changes():
    llama, gpt2 = (
        built("llama", KINDS["llama"][0]),
        transformers.GPT2Model(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=9)),
    )
    t5 = transformers.T5EncoderModel(transformers.T5Config(d_model=32, d_kv=8, num_heads=4, num_layers=1, d_ff=32, vocab_size=9))
    gated = regard.nn.Decoder("gla", vocab=9, dim=16, layers=1, heads=4)
    before = [p.clone() for p in llama.parameters()]
    for model, heads, message in (
        (llama, [(0, 0)], "groups"),
        (llama, [(1, 0), (1, 1), (1, 2), (1, 3)], "one head or more"),
        (llama, [(2, 0)], "heads holds"),
        (gpt2, [(0, 0)], "no linear layer of its own"),
        (t5, [(0, 0)], "beside its projections"),
        (gated, [(0, 0)], "ablated"),
    ):
        with pytest.raises(regard.RegardError, match=message):
            prune(model, [(0, 2), (0, 3), *heads] if model is llama and heads[0][0] else heads)
    assert all(torch.equal(a, b) for a, b in zip(before, llama.parameters()))
    with pytest.raises(regard.RegardError, match="heads is empty"):
        ablated(llama, [])


def test_padding_is_no_token_and_parameters_stay_without_gradient():
    model, inputs = built("bert", BASE), batch("bert")
    model.requires_grad_(False)
    for name, p in model.named_parameters():
        if p.dim() > 1 and "embed" not in name:
            p.mul_(4)

    def loss(x):
        return model(**x)[0][:, -1].square().mean()

    table = importance(model, [inputs], loss, normalise=None, last_layer="tokens")
    alone = []
    for row, start in ((0, 4), (1, 0)):
        one = {"input_ids": inputs["input_ids"][row : row + 1, start:], "position_ids": torch.arange(start, 9)[None]}
        alone.append((importance(model, [one], loss, normalise=None, last_layer="tokens").scores, 9 - start))
    truth = sum(scores * count for scores, count in alone) / (2 * sum(count for _, count in alone))  # a mean over the batch: a half each
    torch.testing.assert_close(table.scores, truth, rtol=1e-4, atol=1e-8)
    assert all(p.grad is None for p in model.parameters())
    for wrong, message in (({"per": "head"}, "per"), ({"normalise": "l1"}, "normalise"), ({"last_layer": "x"}, "last_layer")):
        with pytest.raises(regard.RegardError, match=message):
            importance(model, [inputs], loss, **wrong)
    with pytest.raises(regard.RegardError, match="batches is empty"):
        importance(model, [], loss)


def test_schedules_keep_heads_and_rank_anew():
    model, made = regard.nn.Decoder(vocab=9, dim=16, layers=2, heads=4), []
    scores = HeadTable(torch.arange(8.0).view(2, 4))
    found = prune_schedule(model, scores, lambda: 1.0, step=0.25, least=1)
    assert [len(one.removed) for one in found.rounds] == [0, 2, 4, 6] and found.rounds[-1].removed == (
        (0, 0),
        (0, 1),
        (0, 2),
        (1, 0),
        (1, 1),
        (1, 2),
    )
    assert len(prune_schedule(model, scores, lambda: 1.0, step=0.5, least=0).rounds[-1].removed) == 8

    def again():
        made.append(1)
        return HeadTable(scores.scores if len(made) == 1 else -scores.scores)

    assert (
        prune_schedule(model, again, lambda: 1.0, step=0.25, until=0.5).rounds[-1].removed == ((0, 0), (0, 1), (1, 3), (1, 2))
        and len(made) == 2
    )
    assert removable([(0, 0), (0, 1), (1, 1)], 1, [2, 1]) == [(0, 0)]
    assert "<svg" in found.plot() and "<svg" in scores.plot() and scores.to_pandas().shape == (8, 3)
    with pytest.raises(regard.RegardError, match="step"):
        prune_schedule(model, scores, lambda: 1.0, step=0)
    with pytest.raises(regard.RegardError, match="scores"):
        prune_schedule(model, HeadTable(torch.rand(3, 4)), lambda: 1.0)
