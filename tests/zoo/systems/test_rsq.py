"""RSQ: the model is left alone, biases turn with the stream, what cannot be rounded is refused."""

import pytest
import torch

pytest.importorskip("transformers")
from regard import RegardError
from regard.adapt.gptq import Grid, gptq
from regard.adapt.rotation import fold_norms, hadamard, rotate_stream, rotation_of
from regard.lab.checks.shared.decoding import llama
from regard.zoo.systems import rsq
from regard.zoo.systems.rsq import IMPORTANCES, Text, chunks, rsq_quantize, scaled


def test_a_copy_is_rounded_and_says_its_scales():
    torch.manual_seed(0)
    model, ids = llama(), torch.randint(50, (2, 9))
    before = {key: x.clone() for key, x in model.state_dict().items()}
    found = rsq_quantize(model, ids, 2, clip=False, group=8)
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())
    assert len(found.layers) == 14 and found.model.generate(ids[:1], max_new_tokens=3, do_sample=False).shape == (1, 12)
    one = found.layers["layers.1.mlp.down_proj"]
    assert one.scales.shape == (32, 8)
    for group in range(8):
        part = one.weight[:, 8 * group : 8 * group + 8] / one.scales[:, group : group + 1]
        assert torch.allclose(part, part.round(), atol=1e-9) and part.min() >= -2.001 and part.max() <= 1.001
    again = rsq_quantize(model, ids, 2, clip=False, group=8)
    assert all(torch.equal(again.layers[key].weight, found.layers[key].weight) for key in found.layers)
    other = rsq_quantize(model, ids, 2, clip=False, group=8, seed=1)
    assert not torch.equal(other.layers["layers.0.mlp.down_proj"].weight, found.layers["layers.0.mlp.down_proj"].weight)


def test_biases_of_writers_turn_too():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "vocab_size": 9,
    }
    model = LlamaForCausalLM(LlamaConfig(attention_bias=True, mlp_bias=True, **sizes)).double().eval()
    for p in model.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    ids = torch.randint(9, (1, 6))
    with torch.no_grad():
        truth = model(ids).logits
        fold_norms(model)
        rotate_stream(model, rotation_of(16, generator=torch.Generator().manual_seed(0)))
        assert torch.allclose(model(ids).logits, truth, atol=1e-5)  # norms of transformers are computed in float32


def test_rotations():
    for kind in ("hadamard", "orthogonal", "none"):
        r = rotation_of(24, kind, torch.Generator().manual_seed(0))
        assert torch.allclose(r @ r.T, torch.eye(24).double(), atol=1e-12)
    assert torch.equal(rotation_of(4, torch.eye(4)), torch.eye(4).double())
    with pytest.raises(RegardError, match="no Hadamard matrix of order 7"):
        hadamard(7)
    for kind in ("x", torch.ones(4, 4), torch.eye(3)):
        with pytest.raises(RegardError, match="rotation"):
            rotation_of(4, kind)


def test_what_cannot_be_rounded_is_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    model, ids = llama(), torch.randint(50, (2, 9))
    for options, message in (
        ({"importance": "x"}, "one of attncon"),
        ({"low": -1.0}, "0 <= low"),
        ({"exponent": -1.0}, "exponent"),
        ({"bits": 1}, "2 to 8 bits"),
        ({"importance": lambda text: -torch.ones(9)}, "none negative"),
        ({"importance": lambda text: torch.ones(3)}, "expected .9,."),
        ({"importance": lambda text: torch.zeros(9)}, "not all zero"),
        ({"damp": -1.0}, "damp"),
    ):
        with pytest.raises(RegardError, match=message):
            rsq_quantize(model, ids, **{"bits": 3, **options})
    with pytest.raises(RegardError, match="texts"):
        rsq_quantize(model, ids[0])
    with pytest.raises(RegardError, match="Llama's layers"):
        rsq_quantize(GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=50)), ids)
    with pytest.raises(RegardError, match="some of 0"):
        chunks((4,), 4)
    with pytest.raises(RegardError, match="gram"):
        gptq(torch.ones(2, 3), torch.eye(2), Grid(3))


def test_importance_is_the_same_in_blocks_of_queries():
    from types import SimpleNamespace

    from regard.zoo.systems.rsq import Text, attncon

    torch.manual_seed(0)
    model = llama()
    x = torch.randn(11, 32).double()
    cos, sin = model.model.rotary_emb(x[None], torch.arange(11)[None])
    text = Text(model.model.layers[0], x, x, SimpleNamespace(), {"position_embeddings": (cos, sin)})
    assert torch.allclose(attncon(text, 4), attncon(text, 256), atol=1e-4)
    assert abs(float(attncon(text).sum()) - 4 * 11) < 1e-3


def text_of(x, y=None, counts=None):
    return Text(None, x, x if y is None else y, counts, {})


def test_importances_by_hand():
    x, y, counts = torch.randn(7, 4), torch.randn(7, 4), torch.randint(1, 9, (7,))
    text = text_of(x, y, counts)
    near = [IMPORTANCES[name](text) for name in ("actnorm", "actdiff", "tokenfreq", "tokensim", "uniform")]
    apart = torch.stack([torch.stack([(a - b).square().sum() for b in x]).mean() for a in x])
    truth = [x.square().sum(1).sqrt(), -(x - y).square().sum(1).sqrt(), -counts.float(), apart, torch.ones(7)]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(near, truth, strict=True))
    close = 0.1 * x  # tokens that lie near one another, and one that lies on all others
    assert torch.allclose(IMPORTANCES["tokensim"](text_of(close)), 0.01 * apart, atol=1e-5)
    assert float(IMPORTANCES["tokensim"](text_of(torch.full((3, 4), 5.1))).min()) >= 0
    assert chunks((0, 2), 3)(text_of(torch.randn(9, 2))).tolist() == [1, 1, 1, 0, 0, 0, 1, 1, 1]
    assert chunks((1,), 2)(text_of(torch.randn(5, 2))).tolist() == [0, 0, 1, 1, 0]
    assert scaled(torch.tensor([2.0, 4, 3]), 0.1, 0.5).tolist() == pytest.approx([0.1, 0.5, 0.3])
    assert scaled(torch.full((3,), 4.0), 0.1, 0.5).tolist() == [1, 1, 1]


def test_every_option_reaches_the_rounding(monkeypatch):
    """Defaults and others; weights of a text sum to its length, and features are scaled by their powers."""
    model, ids, seen, turned = llama(layers=1), torch.randint(50, (3, 8)), [], []
    monkeypatch.setattr(rsq, "gptq", lambda weight, gram, *given: seen.append((gram, *given)) or gptq(weight, gram, *given))
    monkeypatch.setattr(rsq, "rotation_of", lambda *given: turned.append(given[:2]) or rotation_of(*given))
    for options, told in (({}, (0.01, 128, False)), ({"damp": 0.2, "block": 7, "order": True, "rotation": "none"}, (0.2, 7, True))):
        seen.clear()
        rsq_quantize(model, ids, 4, **options)
        assert {one[2:] for one in seen} == {told} and {one[1].bits for one in seen} == {4}
    assert turned == [(32, "hadamard"), (32, "none")]
    r = torch.arange(1.0, 9)
    for exponent in (0.5, 2.0):
        seen.clear()
        rsq_quantize(model, ids, importance=lambda text: r, exponent=exponent, rotation="none")
        h = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids)) / model.model.layers[0].input_layernorm.weight
        weight = (r * 8 / r.sum()) ** exponent
        x = (h * weight[:, None]).flatten(0, 1).double()
        assert torch.allclose(seen[0][0].double(), 2 / 3 * x.T @ x, rtol=1e-4, atol=1e-4) and seen[0][1].bits == 3


def test_the_copy_keeps_no_hooks_and_half_precision_adds_up_in_single(monkeypatch):
    model, ids, seen = llama().bfloat16(), torch.randint(50, (2, 9)), []
    monkeypatch.setattr(rsq, "gptq", lambda weight, gram, *given: seen.append(gram.dtype) or gptq(weight, gram, *given))
    found = rsq_quantize(model, ids)
    assert not any(part._forward_pre_hooks or part._forward_hooks for one in (found.model, model) for part in one.modules())
    assert set(seen) == {torch.float32} and all(p.dtype == torch.bfloat16 for p in found.model.parameters())
    assert not found.model.training
