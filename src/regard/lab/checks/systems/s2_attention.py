"""Checks of s2-attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.byhand import rotary_heads
from regard.lab.checks.shared.decoding import llama
from regard.lab.checks.shared.gaps import gaps
from regard.lab.verification import check
from regard.zoo.systems.s2_attention import S2Cache, csr, kv_efficient, s2_attention, s2_block_mask

SETTINGS = (  # heads, key heads, dense, local, stride, offset
    (8, 4, 0, 2, 8, 0),
    (8, 4, 1, 1, 5, 3),
    (8, 4, 0, 3, 3, 1),
    (2, 2, 0, 1, 8, 0),
)


def allowed(i: int, j: int, g: int, heads: int, kv: int, dense: int, local: int, stride: int, offset: int) -> bool:
    """The release's rule for blocks i, j and key head g."""
    move = max(1, int(stride / heads))
    return j <= i and (i - j < local or (j + g * move + offset) % stride == 0 or g >= kv - dense)


def looped(blocks: int, setting: tuple[int, ...]) -> Tensor:
    kv = setting[1]
    return torch.tensor([[[allowed(i, j, g, *setting) for j in range(blocks)] for i in range(blocks)] for g in range(kv)])


def dense(q: Tensor, k: Tensor, v: Tensor, layout: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Softmax under the expanded mask, and log-sum-exps."""
    seen = layout.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, : k.shape[2], : k.shape[2]]
    seen = (seen & torch.ones_like(seen[0]).tril())[:, -q.shape[2] :]
    seen = seen.repeat_interleave(q.shape[1] // len(seen), 0)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~seen, -torch.inf)
    return s.softmax(-1) @ v, s.logsumexp(-1)


@check(
    "s2-attention",
    "strides 3 to 8, 1 to 3 local blocks, grouped and dense heads, offsets, 120 and 128 tokens: gap to softmax under the expanded loop mask, of gradients and log-sum-exps",
    below=1e-10,
    control="one share for all heads",
)
def _() -> tuple[float, float]:
    own, other = [], []
    for number, setting in enumerate(SETTINGS):
        heads, kv, full, local, stride, offset = setting
        length = 128 if number % 2 else 120
        q, k, v = (torch.randn(2, h, length, 16, dtype=torch.float64, requires_grad=True) for h in (heads, kv, kv))
        layout = s2_block_mask(heads, length, 16, local, stride, full, kv, offset=offset)
        assert torch.equal(layout, looped(8, setting))
        found, lse = s2_attention(q, k, v, layout, 16, return_lse=True)
        truth, total = dense(q, k, v, layout, 16)
        own += [gaps(found, truth, (q, k, v)), naive.gap(lse, total)]
        for n in (1, 37, 48):  # the last queries alone, where a block begins and where none does
            own.append(naive.gap(s2_attention(q[:, :, -n:], k, v, layout, 16), truth[:, :, -n:]))
        same = s2_block_mask(heads, length, 16, local, stride, 0, kv, offset=offset, homo_head=True)
        other.append(naive.gap(s2_attention(q, k, v, same, 16), truth))
    return max(own), min(other)


@check(
    "s2-attention",
    "share of past blocks that some of 4 key heads reads, strides 3 and 4",
    above=1.0,
    control="one share for all heads; stride 8 with the step that the release takes for 4 heads, or for 8 query heads",
)
def _() -> tuple[float, float]:
    causal = torch.ones(32, 32, dtype=torch.bool).tril()

    def covered(heads: int, stride: int, **how: object) -> float:
        union = s2_block_mask(heads, 32 * 16, 16, 1, stride, n_kv_heads=4, **how).any(0)  # type: ignore[arg-type]
        return float((union & causal).sum() / causal.sum())

    own = min(covered(8, 3), covered(8, 4), covered(4, 4), covered(4, 4, offset=3))
    return own, max(covered(8, 4, homo_head=True), covered(4, 8), covered(8, 8))


@check(
    "s2-attention",
    "layouts of this family that free a cache for good, of 16",
    above=16,
    control="strides that count from the query's block",
)
def _() -> tuple[float, float]:
    def freed(relative: bool) -> int:
        made = [(local, stride, offset) for local in (1, 2, 3, 5) for stride in (2, 3) for offset in (0, 1)]
        return sum(kv_efficient(s2_block_mask(8, 512, 16, a, b, offset=c, relative=relative)) for a, b, c in made)

    starts, columns = csr(s2_block_mask(2, 64, 16, 1, 2))
    assert starts.tolist() == [[0, 1, 3, 5, 8], [0, 1, 2, 4, 6]] and columns[1, :6].tolist() == [0, 1, 1, 2, 1, 3]
    return freed(False), freed(True)


def logits(model: object, ids: Tensor, layout: Tensor, block: int) -> Tensor:
    """A Llama's logits with dense softmax under the expanded mask, by hand."""
    host, x = model.model, model.model.embed_tokens(ids)  # type: ignore[attr-defined]
    cos, sin = host.rotary_emb(x, torch.arange(ids.shape[1])[None])
    for layer in host.layers:
        own, y = layer.self_attn, layer.input_layernorm(x)
        q, k, v = rotary_heads(own, y, cos, sin)
        x = x + own.o_proj(dense(q, k, v, layout, block)[0].transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(host.norm(x))  # type: ignore[attr-defined, no-any-return]


@check(
    "s2-attention",
    "a prompt of 37 and 24 steps with the cache: logits equal dense softmax under the mask, and no head holds more than local b + L / stride + b",
    below=1e-5,
    control="one share for all heads",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    model, ids = llama(sharp=2), torch.randint(1, 50, (2, 37))
    layouts = [s2_block_mask(4, 64, 4, 2, 4, n_kv_heads=2, step=2, homo_head=same) for same in (False, True)]
    with S2Cache(layouts[0], 4)(model) as session:
        out = model.generate(ids, max_new_tokens=25, do_sample=False, output_logits=True, return_dict_in_generate=True)
    held = [part.keys.shape[2] for layer in session.cache.layers for part in layer.parts]
    assert max(held) <= 2 * 4 + math.ceil(61 / 4) + 4 < 61
    truth, other = (logits(model, out.sequences[:, :-1], layout, 4)[:, 36:] for layout in layouts)
    found = torch.stack(out.logits, 1)
    return naive.gap(found, truth), naive.gap(found, other)


@check(
    "s2-attention",
    "a needle in any of 32 blocks, far or near: share that the last query's strongest head finds",
    above=1.0,
    control="one share for all heads",
)
def _() -> tuple[float, float]:
    def found(same: bool) -> float:
        layout = s2_block_mask(8, 512, 16, 2, 8, homo_head=same)
        hits = 0
        for at in range(7, 512, 16):
            q = torch.zeros(1, 8, 1, 8, dtype=torch.float64)
            k, v = torch.zeros(1, 8, 512, 8, dtype=torch.float64), torch.zeros(1, 8, 512, 1, dtype=torch.float64)
            q[..., 0], k[:, :, at, 0], v[:, :, at] = 8.0, 8.0, 1.0
            hits += float(s2_attention(q, k, v, layout, 16).max()) > 0.9
        return hits / 32

    return found(False), found(True)
