"""Entries in few bits: codes are what loops say, decoding is attention over them, rows get what they get alone, bytes are really fewer."""

import pytest
import torch

from regard import RegardError
from regard.cache import H2O, KIVI, TOVA, Ada, Full, KeyNorm, Planned, Pyramid, SnapKV, StreamingLLM
from regard.cache.packed import Codes
from regard.lab.checks.shared.decoding import llama

transformers = pytest.importorskip("transformers")


def rounded(group, bits):
    """A list of numbers as it comes back, number by number."""
    least, scale = min(group), (max(group) - min(group)) / (2**bits - 1)
    return [x if scale == 0 else round((x - least) / scale) * scale + least for x in group]


def fake(x, bits, group, by_token):
    """x (n, D): groups along the channels of a token, or along the tokens of a channel."""
    x = x if by_token else x.T
    rows = [[y for at in range(0, len(row), group) for y in rounded(row[at : at + group], bits)] for row in x.tolist()]
    out = torch.tensor(rows, dtype=x.dtype).view(x.shape)
    return out if by_token else out.T


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_codes_by_loops(bits, dtype):
    x = (torch.randn(2, 3, 2, 8, 12) * 5 + 3).to(dtype)
    x[0, 0, 0, :, 0] = 7.0  # a group of equal numbers
    x[0, 0, 1] = 0.0
    for axis in (-2, -1):
        codes = Codes.of(x, bits, axis)
        assert codes.codes.dtype == torch.uint8 and codes.codes.numel() * 8 == x.numel() * bits and codes.scale.dtype == dtype
        found, y = codes.numbers(bits), x.double().movedim(axis, -1)
        truth = torch.tensor([rounded(row, bits) for row in y.flatten(0, -2).tolist()]).double().view(y.shape).movedim(-1, axis)
        step = (x.double().amax(axis, keepdim=True) - x.double().amin(axis, keepdim=True)) / (2**bits - 1)
        if dtype == torch.float64:
            assert torch.allclose(found, truth, atol=1e-12)
        rough = torch.finfo(dtype).eps * (2**bits * step + x.abs().double().amax(axis, keepdim=True))
        assert ((found.double() - x.double()).abs() <= step / 2 + rough).all() and torch.equal(found[0, 0, 1], x[0, 0, 1])
        assert axis == -1 or torch.equal(found[0, 0, 0, :, 0], x[0, 0, 0, :, 0])


def stored(k, v, form, length):
    """Keys and values (n, D) of one head as a step after `length` entries reads them."""
    bits_k, bits_v, group, recent = form
    pages, old = length // recent * recent, max(0, length - recent)
    k, v = k.clone(), v.clone()
    k[:pages] = fake(k[:pages], bits_k, group, by_token=False) if pages else k[:0]
    v[:old] = fake(v[:old], bits_v, group, by_token=True) if old else v[:0]
    return k, v


@pytest.mark.parametrize("form", [(2, 2, 4, 8), (4, 2, 8, 8), (8, 4, 4, 12), (2, 8, 4, 4)])
@pytest.mark.parametrize("length", [3, 23, 24])
def test_decoding_is_attention_over_what_loops_say(form, length):
    """Steps by hand: the layers of a Llama over keys and values that were rounded number by number."""
    torch.manual_seed(0)
    model, ids = llama(layers=2, sharp=2), torch.randint(1, 50, (1, length))
    steps, tokens = [], []
    with KIVI(key_bits=form[0], value_bits=form[1], group=form[2], recent=form[3])(model) as session, torch.no_grad():
        out = model(ids)
        for _ in range(10):
            tokens.append(out.logits[:, -1].argmax(-1))
            out = model(tokens[-1][:, None], past_key_values=session.cache)
            steps.append(out.logits[0, -1])
        text = torch.cat((ids, torch.stack(tokens, 1)), 1)
        cos, sin = model.model.rotary_emb(model.model.embed_tokens(text), torch.arange(text.shape[1])[None])
        seen = [([], []) for _ in range(2)]
        for at in range(text.shape[1]):
            x = model.model.embed_tokens(text[:, at : at + 1])
            for layer, (keys, values) in zip(model.model.layers, seen, strict=True):
                y, own = layer.input_layernorm(x), layer.self_attn
                q, k, v = (proj(y).view(-1, 8) for proj in (own.q_proj, own.k_proj, own.v_proj))
                q, k = (t * cos[0, at] + torch.cat((-t[:, 4:], t[:, :4]), -1) * sin[0, at] for t in (q, k))
                keys.append(k)
                values.append(v)
                o = []
                for head in range(4):
                    kk, vv = (torch.stack([one[head // 2] for one in which]) for which in (keys, values))
                    if at >= length:  # the prompt is read as it came
                        kk, vv = stored(kk, vv, form, at)
                    o.append((kk @ q[head] / 8**0.5).softmax(-1) @ vv)
                x = x + own.o_proj(torch.cat(o)[None, None])
                x = x + layer.mlp(layer.post_attention_layernorm(x))
            if at >= length:
                truth = model.lm_head(model.model.norm(x))[0, 0]
                assert torch.allclose(steps[at - length], truth, atol=1e-9), at


ALL = {
    "plain": lambda: KIVI(2, 4, 8),
    "mixed": lambda: KIVI(4, 4, 4, value_bits=2),
    "snap": lambda: KIVI(2, 4, 4, base=SnapKV(12, 2, 3)),
    "fraction": lambda: KIVI(2, 4, 4, base=H2O(0.6, decode=False)),
    "ada": lambda: KIVI(2, 4, 4, base=Ada(SnapKV(8, 2, 3))),
    "pyramid": lambda: KIVI(2, 4, 4, base=Pyramid(KeyNorm(8), 4)),
    "by layer": lambda: Planned({1: KIVI(2, 4, 8), 2: StreamingLLM(9)}),
}


@pytest.mark.parametrize("name", ALL)
def test_rows_of_a_padded_batch_get_what_they_get_alone(name):
    torch.manual_seed(0)
    model, ids = llama(layers=3, sharp=2), torch.randint(1, 50, (3, 20))
    mask = (torch.arange(20) >= torch.tensor([[0], [9], [15]])).long()
    options = {"max_new_tokens": 14, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with ALL[name]()(model):
        both = model.generate(ids, attention_mask=mask, **options)
        for row, pad in enumerate((0, 9, 15)):
            alone = model.generate(ids[row : row + 1, pad:], **options)
            assert torch.equal(alone.sequences[0, 20 - pad :], both.sequences[row, 20:])
            assert max(float((a[0] - b[row]).abs().max()) for a, b in zip(alone.logits, both.logits, strict=True)) < 1e-9


def test_several_tokens_a_call_store_what_single_ones_do():
    torch.manual_seed(0)
    model, ids = llama(layers=2), torch.randint(1, 50, (2, 40))
    mask = (torch.arange(40) >= torch.tensor([[0], [5]])).long()
    parts = []
    for cuts in ([11] + [1] * 29, [11, 3, 20, 6]):
        with KIVI(2, 4, 8)(model) as session, torch.no_grad():
            at = 0
            for cut in cuts:
                cache = None if at == 0 else session.cache
                places = (mask.cumsum(1) - 1).clamp_min(0)[:, at : at + cut]
                model(ids[:, at : at + cut], attention_mask=mask[:, : at + cut], position_ids=places, past_key_values=cache)
                at += cut
            parts.append(session.cache.layers[0].parts[0])  # of the first layer, whose keys do not depend on how they are read
    one, many = parts
    assert torch.equal(one.count, torch.tensor([[40, 40], [35, 35]])) and torch.equal(one.count, many.count)
    for name in ("keys", "values", "places"):
        there = one.alive if name == "places" else one.alive[..., None]
        gap = (getattr(one, name) - getattr(many, name)).masked_fill(~there, 0)
        assert float(gap.abs().max()) < 1e-12


def test_bytes_are_really_fewer():
    torch.manual_seed(0)
    model, ids = llama(layers=1, dim=128), torch.randint(1, 50, (1, 512))
    sizes = {}
    for name, policy in {
        "full": Full(),
        8: KIVI(8, 32, 32),
        4: KIVI(4, 32, 32),
        2: KIVI(2, 32, 32),
        "few": KIVI(2, 32, 32, base=SnapKV(0.5)),
    }.items():
        with policy(model.float()) as session, torch.no_grad():
            model(ids)
        (layer,) = session.cache.layers
        sizes[name] = layer.bytes
        if name != "full":
            part = layer.parts[0]
            tensors = [*part.pages, *part.codes, part.rest, part.window, part.where, part.count, *layer.memory.values()]
            assert sum(x.untyped_storage().nbytes() for x in tensors) == layer.held < layer.bytes * 1.3
    # 2 heads of 32 channels: n - 32 values and n keys in codes, with a scale and a minimum for each 32 of them; 32 values as they came
    assert sizes["full"] == 2 * 2 * 512 * 32 * 4
    for bits in (2, 4, 8):
        assert sizes[bits] == 2 * ((512 + 480) * (32 * bits // 8 + 8) + 32 * 32 * 4)
    assert sizes["few"] == 2 * ((256 + 224) * 16 + 32 * 32 * 4) and sizes[2] < sizes["full"] / 6


def test_beams_and_windows_of_the_model():
    torch.manual_seed(0)
    model, ids = llama(layers=3, sharp=2), torch.randint(1, 50, (2, 17))
    fine = KIVI(8, 4, 8)
    with Full()(model):
        before = model.generate(ids, max_new_tokens=10, num_beams=3, do_sample=False)
    with fine(model):
        assert float((model.generate(ids, max_new_tokens=10, num_beams=3, do_sample=False) == before).float().mean()) > 0.9
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    config = transformers.MistralConfig(vocab_size=50, sliding_window=7, eos_token_id=None, pad_token_id=0, **sizes)
    model = transformers.MistralForCausalLM(config).double().eval()
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    plain = model.generate(ids, **options)
    with KIVI(8, 4, 8)(model):
        near = model.generate(ids, **options)
    with KIVI(2, 4, 8)(model):
        far = model.generate(ids, **options)
    gaps = [float((torch.stack(one.logits) - torch.stack(plain.logits))[1:].abs().mean()) for one in (near, far)]
    assert gaps[0] < gaps[1] / 5


def test_bad_input():
    for bad in ({"bits": 3}, {"key_bits": 1}, {"value_bits": 16}):
        with pytest.raises(RegardError, match="expected 2, 4 or 8"):
            KIVI(**bad)
    for bad in ({"group": 6}, {"group": 0}, {"recent": 16}, {"recent": 100}):
        with pytest.raises(RegardError, match="multiple of the group"):
            KIVI(**bad)
    for base in (H2O(8), TOVA(8), StreamingLLM(9), KIVI()):
        with pytest.raises(RegardError, match="after the prompt alone"):
            KIVI(base=base)
    for base in (KIVI(), Full(), Planned({})):
        with pytest.raises(RegardError, match="by scores what stays"):
            Pyramid(base)
    model, ids = llama(), torch.randint(1, 50, (1, 40))
    with KIVI(2, 12, 12)(model), pytest.raises(RegardError, match="keys have 8 channels a head; expected a group that divides"):
        model(ids)
    assert model(ids).logits.isfinite().all() and model.config._attn_implementation == "sdpa"
