"""Traces on a transformers model, and what they refuse."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

import regard  # noqa: E402
from regard.interpret import removed, sparse_set, trace  # noqa: E402


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=40, n_positions=32, attn_implementation="sdpa")
    model = transformers.GPT2LMHeadModel(config).eval()
    for name, p in model.named_parameters():
        if p.dim() > 1 and "h." in name:
            p.data.normal_(std=0.5)
    return model


def firing(model, ids, layer):
    return all_firing(model, ids, layer)[0]


def all_firing(model, ids, layer):
    with torch.no_grad(), regard.taps(model, ["weights", "logits"], layers=[layer]) as seen:
        model(ids)
    w, s = seen["weights", layer][0], seen["logits", layer][0]
    return [(h, i, j) for h, i, j in (w >= 0.5).nonzero().tolist() if 0 < j < i and float(s[h, i, j]) > 0]


def test_gpt2_is_traced_to_its_first_layer():
    model, ids = gpt2(), torch.randint(40, (1, 10))
    head, dst, src = firing(model, ids, 2)
    found = trace(model, ids, 2, head, dst, src)
    assert {e.side for e in found.edges if e.receiver == (2, head)} == {"dst", "src"}
    kinds = {type(e.sender) for e in found.edges}
    assert kinds <= {tuple, str} and all(e.weight > 0 for e in found.edges)
    assert len(trace(model, ids, 2, head, dst, src, depth=1).edges) <= len(found.edges)
    used = found.edges[0].used
    with torch.no_grad(), regard.taps(model, "logits", layers=[2]) as before:
        model(ids)
    with torch.no_grad(), removed(model, ids, 2, head, used, "dst", dst, src), regard.taps(model, "logits", layers=[2]) as after:
        model(ids)
    assert float(after["logits", 2][0, head, dst, src]) < 0.5 * float(before["logits", 2][0, head, dst, src])
    others = [h for h in range(4) if h != head]
    assert torch.equal(after["logits", 2][0, others], before["logits", 2][0, others])


def rotary(kind, **more):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32, "vocab_size": 40, "head_dim": 8}
    config = transformers.AutoConfig.for_model(kind, **{**sizes, "num_key_value_heads": 2, "pad_token_id": 0, **more})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, std=3.0 if "q_norm" in name else 0.5)
    return model


@pytest.mark.parametrize("kind", ["llama", "mistral", "regard"])
def test_rotary_models_are_traced(kind):
    model, ids = rotary(kind) if kind != "regard" else None, torch.randint(40, (1, 10))
    if model is None:
        model = regard.nn.Decoder(vocab=40, dim=32, heads=4, kv_heads=2).eval()
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.5)
    head, dst, src = firing(model, ids, 1)
    found = trace(model, ids, 1, head, dst, src)
    assert found.edges and all(e.weight > 0 for e in found.edges)
    with torch.no_grad(), regard.taps(model, "logits", layers=[1]) as before:
        model(ids)
    used = next(e.used for e in found.edges if e.receiver == (1, head))
    for side in ("dst", "src"):
        with torch.no_grad(), removed(model, ids, 1, head, used, side, dst, src), regard.taps(model, "logits", layers=[1]) as after:
            model(ids)
        assert float(after["logits", 1][0, head, dst, src]) < 0.5 * float(before["logits", 1][0, head, dst, src])


def test_what_cannot_be_traced_is_refused():
    model, ids = gpt2(), torch.randint(40, (1, 10))
    qwen = rotary("qwen3")
    for seed in range(50):  # some text on which a head of random weights fires
        torch.manual_seed(seed)
        text = torch.randint(40, (1, 10))
        if fired := all_firing(qwen, text, 1):
            break
    for args, message in (
        ((model, ids, 3, 0, 5, 2), "layer=3"),
        ((model, ids, 1, 0, 2, 5), "src=5"),
        ((model, ids.repeat(2, 1), 1, 0, 5, 2), "rows"),
        ((qwen, text, 1, *fired[0]), "norms of queries"),
    ):
        with pytest.raises(regard.RegardError, match=message):
            trace(*args)
    head, dst, src = firing(model, ids, 2)
    with pytest.raises(regard.RegardError, match="firing"):
        trace(model, ids, 2, head, dst, src, firing=1.1)
    with pytest.raises(regard.RegardError, match="side"):
        removed(model, ids, 2, 0, [0], "key", 5, 3)
    with pytest.raises(regard.RegardError, match="terms"):
        sparse_set(torch.zeros(0))


def test_the_fewest_terms_by_hand():
    terms = torch.tensor([0.5, -1.0, 4.0, 2.0, 0.25])  # a score of 5.75
    found = [sparse_set(terms, frac).tolist() for frac in (0.6, 0.7, 1.0, 1.1, 2.0)]  # 4, 6, 6.5 and 6.75 of it
    assert found == [[2], [2, 3], [2, 3], [2, 3, 0], [2, 3, 0, 4, 1]] and sparse_set(terms).tolist() == [2, 3]
    assert sparse_set(-terms, 0.6).tolist() == [2] and sparse_set(-terms, 1.1).tolist() == [2, 3, 0]
