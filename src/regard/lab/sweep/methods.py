"""What a sweep compares: the two controls, and mechanisms by name at settings from dense to sparse."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ...algebra import Causal, Chosen, Dot, Mechanism, Program, Selection, Sinks, View, Weighted, Window, bind
from ...algebra.blocks import block_sums, heads_of, top_k
from ...algebra.normalizer import SOFTMAX
from ...catalog import get
from ...engine.policy import Policy
from ...errors import RegardError
from ...nn.mixers import parsed
from ...zoo.sparse.hylra import ReuseLayers
from ...zoo.sparse.longheads import LongHeads
from ...zoo.sparse.ltri_llm import Ltri

DEFAULT: dict[str, tuple[str, ...]] = {
    "oracle": ("blocks=2", "blocks=4", "blocks=8", "blocks=16"),
    "random": ("blocks=2", "blocks=4", "blocks=8", "blocks=16"),
    "streaming": ("window=64", "window=256", "window=768"),
    "moba": ("block_size=64,top_k=2", "block_size=64,top_k=4", "block_size=64,top_k=12"),
    "flexprefill": tuple(f"block_size=64,min_budget=64,gamma={gamma}" for gamma in (0.5, 0.8, 0.95)),
    "sampleattention": tuple(f"window_ratio={w},alpha={a}" for w, a in ((0.03, 0.5), (0.04, 0.8), (0.08, 0.95))),
    "spargeattn": tuple(f"block_q=64,block_k=64,causal=True,theta=0.2,tau={tau}" for tau in (0.5, 0.8, 0.95)),
    "proxyattn": tuple(f"block_size=64,gamma={gamma}" for gamma in (0.5, 0.8, 0.95)),
    "hip": tuple(f"mask_k={k},window=64" for k in (64, 256, 512)),
    "dhsa": tuple(f"budget={k}" for k in (128, 256, 512)),
    "pbs-attn": tuple(f"block_size=64,segment=128,threshold={t}" for t in (0.5, 0.8, 0.95)),
    "powerattention": ("block_size=32,window_blocks=1", "block_size=64,window_blocks=1", "block_size=64,window_blocks=4"),
    "delta-attention": tuple(f"window={w},stride=64" for w in (64, 256, 512)),
    "longheads": ("chunk=64,attend_len=256", "chunk=64,attend_len=512", "chunk=128,attend_len=1024"),
    "ltri-llm": tuple(f"window={w},top={t},budget={b}" for w, t, b in ((64, 4, 64), (128, 8, 128), (384, 16, 384))),
    "hylra": tuple(f"count={c},weight={w}" for c, w in ((128, 0.3), (256, 0.1), (256, 0.02))),
    "hyperattention": tuple(f"block_size={b},samples={b},min_length=256" for b in (32, 64, 128)),
}


def true_plan(q: Tensor, k: Tensor, view: View, *, blocks: int, block_size: int) -> Selection:
    """The blocks that truly hold the most mass of each block of queries; costs as much as dense attention."""
    scores = q @ heads_of(k, q.shape[1]).transpose(-1, -2)
    at = torch.arange(q.shape[-2], device=q.device) + view.first
    p = scores.masked_fill(at[:, None] < torch.arange(k.shape[-2], device=q.device), float("-inf")).softmax(-1)
    mass = block_sums(p, block_size)
    rows = torch.nn.functional.pad(mass, (0, 0, 0, -mass.shape[-2] % block_size)).unflatten(-2, (-1, block_size)).sum(-2)
    return chosen_blocks(rows, view, blocks, block_size)


def random_plan(q: Tensor, k: Tensor, view: View, *, blocks: int, block_size: int, seed: int) -> Selection:
    generator = torch.Generator().manual_seed(seed)
    shape = (*q.shape[:2], -(-q.shape[-2] // block_size), -(-k.shape[-2] // block_size))
    return chosen_blocks(torch.rand(shape, generator=generator).to(q.device), view, blocks, block_size)


def chosen_blocks(scores: Tensor, view: View, blocks: int, size: int) -> Selection:
    """The query block's own key block, and `blocks - 1` of the best others before it."""
    u = (torch.arange(scores.shape[-2], device=scores.device) * size + view.first) // size
    w = torch.arange(scores.shape[-1], device=scores.device)
    own = w == u[:, None]
    keep = own | (top_k(scores, w < u[:, None], blocks - 1) if blocks > 1 else False)
    return Selection(keep.expand(scores.shape), size, size)


def oracle(blocks: int = 8, block_size: int = 64) -> Weighted:
    """A control from above: the exact best blocks of each block of queries."""
    return Weighted(mask=Causal(), select=Chosen(bind(true_plan, blocks=blocks, block_size=block_size), ahead=True, decode=False))


def random_blocks(blocks: int = 8, block_size: int = 64, seed: int = 0) -> Weighted:
    """A control from below: the own block and random others of the past."""
    plan = bind(random_plan, blocks=blocks, block_size=block_size, seed=seed)
    return Weighted(mask=Causal(), select=Chosen(plan, ahead=True, decode=False))


def streaming(window: int = 256, sinks: int = 4) -> Weighted:
    """A fixed pattern: the first keys and the last ones."""
    return Weighted(mask=Causal() & (Window(window) | Sinks(sinks)))


def method(name: str, settings: str = "") -> Mechanism | Policy:
    """A control, a policy or a registered mechanism; delta-attention takes the window of the sparse pass that it corrects."""
    _, options = parsed(f"{name}:{settings}")
    made: dict[str, Callable[..., Mechanism | Policy]] = {"oracle": oracle, "random": random_blocks, "streaming": streaming}
    made |= {"longheads": LongHeads, "ltri-llm": Ltri, "hylra": partial(ReuseLayers, None)}
    if name in made:
        try:
            return made[name](**options)
        except TypeError as why:
            raise RegardError(f"{name}: {why}") from None
    if name == "delta-attention" and "window" in options:
        options["sparse"] = streaming(options.pop("window"))
    found = get(name, **options)
    fewer_keys = isinstance(found, Weighted) and isinstance(found.score, Dot) and found.normalizer == SOFTMAX
    if not (fewer_keys or (isinstance(found, Program) and found.under != "none")):
        raise RegardError(f"{name!r} is not softmax attention over fewer keys, so it cannot replace it without training")
    return found
