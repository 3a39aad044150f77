"""RSQ: rotate, scale, then quantise; tokens that receive much attention count for more when weights are rounded (id 66; Sung et al., 2025).

stream rotated by R = diag(+-1) H / sqrt(D);   r_j = sum_h sum_i A_hij, min-max to [low, high], times T / sum r
H = (2 / N) sum_t r_t^(2 exponent) x_t x_t^T over N texts;   GPTQ with H, layer by layer on inputs that rounded layers give
Not built: rotations of values a head and of the MLP's inside (which run at inference), vector codebooks, rounded activations.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.adapt.gptq import Grid, Rounded, gptq
from regard.adapt.rotation import check_decoder, fold_norms, rotate_stream, rotation_of
from regard.adapt.student import projected
from regard.catalog.registry import register
from regard.errors import RegardError

GROUPS = (
    ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"),
    ("self_attn.o_proj",),
    ("mlp.up_proj", "mlp.gate_proj"),
    ("mlp.down_proj",),
)


@dataclass(frozen=True)
class Text:
    """A layer on one calibration text: x (T, D) that it reads, y (T, D) that it gives, how often each token occurs in all texts (T,), and
    its call's keyword arguments."""

    layer: Any
    x: Tensor
    y: Tensor
    counts: Tensor
    given: dict[str, Any]


def attncon(text: Text, block: int = 256) -> Tensor:
    """Attention that each token receives: sum over heads and queries, a block of queries at a time."""
    attention = text.layer.self_attn
    tokens = projected(attention, text.layer.input_layernorm(text.x[None]), text.given["position_embeddings"])
    q, k = tokens.turned_q, tokens.repeated(tokens.turned_k)
    total, length = torch.zeros(k.shape[2], dtype=torch.float32, device=k.device), k.shape[2]
    for start in range(0, length, block):
        s = (q[:, :, start : start + block] @ k.transpose(2, 3)).float() * attention.scaling
        later = torch.arange(length, device=k.device) > torch.arange(start, start + s.shape[2], device=k.device)[:, None]
        total += s.masked_fill(later, -torch.inf).softmax(-1).sum((0, 1, 2))
    return total


def tokensim(text: Text) -> Tensor:
    """Mean squared distance to all tokens of the text."""
    x = text.x.float()
    return (x.square().sum(-1) + x.square().sum(-1).mean() - 2 * x @ x.mean(0)).clamp_min(0)


Importance = Callable[[Text], Tensor]
IMPORTANCES: dict[str, Importance] = {
    "attncon": attncon,
    "actnorm": lambda text: text.x.float().norm(dim=-1),
    "actdiff": lambda text: -(text.x.float() - text.y.float()).norm(dim=-1),
    "tokenfreq": lambda text: -text.counts.float(),
    "tokensim": tokensim,
    "uniform": lambda text: torch.ones(len(text.x), device=text.x.device),
}


def chunks(wanted: tuple[int, ...], of: int) -> Importance:
    """Importance 1 in those of `of` equal spans of a text, 0 elsewhere; `rsq_quantize` takes it as it is."""
    if not wanted or any(not 0 <= part < of for part in wanted):
        raise RegardError(f"chunks({wanted}, {of}): expected some of 0 .. {of - 1}")

    def given(text: Text) -> Tensor:
        r, size = torch.zeros(len(text.x), device=text.x.device), len(text.x) // of
        for part in wanted:
            r[part * size : (part + 1) * size] = 1
        return r

    return given


def scaled(r: Tensor, low: float, high: float) -> Tensor:
    """Min-max to [low, high]; all ones where there is no difference."""
    span = r.max() - r.min()
    return torch.ones_like(r) if span == 0 else low + (high - low) * (r - r.min()) / span


@dataclass
class RSQ:
    """model: the rounded copy, in numbers of its dtype; layers: what was rounded, by name."""

    model: nn.Module
    layers: dict[str, Rounded]


@register("rsq", kind="function")
@torch.no_grad()
def rsq_quantize(
    model: nn.Module,
    ids: Tensor,
    bits: int = 3,
    importance: str | Importance = "attncon",
    *,
    low: float = 0.005,
    high: float = 1.0,
    exponent: float = 0.5,
    rotation: str | Tensor = "hadamard",
    damp: float = 0.01,
    block: int = 128,
    order: bool = False,
    seed: int = 0,
    **grid: Any,
) -> RSQ:
    """A copy of a transformers decoder (Llama and its like) whose linear layers have weights of `bits` bits, from calibration texts ids (N, T).

    importance: "attncon" (attention received), "actnorm", "actdiff" (least change first), "tokenfreq" (rare first), "tokensim" (far from others
    first), "uniform" (plain GPTQ), or a function of `Text` whose numbers are taken as they are. exponent: features are scaled by r to that
    power. rotation: "hadamard", "orthogonal", "none", or the matrix. grid: of `Grid` (symmetric, clip, norm, steps, shrink, group).
    """
    if isinstance(importance, str) and importance not in IMPORTANCES:
        raise RegardError(f"importance={importance!r}; expected one of {', '.join(IMPORTANCES)}, or a function")
    if ids.dim() != 2 or 0 in ids.shape or not 0 <= low <= high or exponent < 0:
        raise RegardError(
            f"ids {tuple(ids.shape)}, low={low}, high={high}, exponent={exponent}: expected texts (N, T), 0 <= low <= high, exponent 0 or more"
        )
    lattice = Grid(bits, **grid)
    check_decoder(model)
    copied = copy.deepcopy(model).eval()
    fold_norms(copied)
    width: int = copied.get_input_embeddings().embedding_dim  # type: ignore[operator, assignment, union-attr]
    rotate_stream(copied, rotation_of(width, rotation, torch.Generator().manual_seed(seed)))
    streams, given = first_inputs(copied, ids)
    counts = ids.flatten().bincount()[ids]
    done: dict[str, Rounded] = {}
    for number, layer in enumerate(check_decoder(copied).layers):
        weights = []
        for x, count, own in zip(streams, counts, given, strict=True):
            text = Text(layer, x[0], layer(x, **own)[0], count, own)
            r = scaled(IMPORTANCES[importance](text), low, high) if isinstance(importance, str) else importance(text)
            if r.shape != x.shape[1:2] or not bool((r >= 0).all()) or not float(r.sum()) > 0:
                raise RegardError(
                    f"importance gave {tuple(r.shape)} of sum {float(r.sum())}; expected ({x.shape[1]},), none negative, not all zero"
                )
            weights.append(r * len(r) / r.sum())
        for names in GROUPS:
            for name, gram in grams(layer, names, streams, given, weights, exponent).items():
                found = gptq(layer.get_submodule(name).weight, gram, lattice, damp, block, order)
                layer.get_submodule(name).weight.copy_(found.weight)
                done[f"layers.{number}.{name}"] = found
        streams = [layer(x, **own) for x, own in zip(streams, given, strict=True)]
    return RSQ(copied, done)


def first_inputs(model: nn.Module, ids: Tensor) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """What the first layer reads of each text, and its keyword arguments."""
    streams: list[Tensor] = []
    given: list[dict[str, Any]] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        streams.append(args[0])
        given.append(kwargs)

    handle = check_decoder(model).layers[0].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        for row in ids:
            model(input_ids=row[None], use_cache=False)
    finally:
        handle.remove()
    return streams, given


def grams(
    layer: Any, names: tuple[str, ...], streams: list[Tensor], given: list[dict[str, Any]], weights: list[Tensor], exponent: float
) -> dict[str, Tensor]:
    """(2 / N) sum of weighed x x^T of each linear layer's inputs."""
    sums: dict[str, Tensor] = {}
    r = weights[0]

    def keeping(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            wide = torch.promote_types(args[0].dtype, torch.float32)
            x = args[0][0].to(wide) * (2 / len(streams)) ** 0.5 * (r.to(wide) ** exponent)[:, None]
            sums[name] = sums.get(name, torch.zeros(x.shape[1], x.shape[1], dtype=wide, device=x.device)) + x.T @ x

        return hook

    handles = [layer.get_submodule(name).register_forward_pre_hook(keeping(name)) for name in names]
    try:
        for x, own, r in zip(streams, given, weights, strict=True):  # noqa: B007
            layer(x, **own)
    finally:
        for handle in handles:
            handle.remove()
    return sums
