"""Small layers that several models share: norms, short convolutions, projections, SwiGLU, layer scale."""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..algebra import Causal, Explicit, Full, Padding, Segments
from ..algebra.mask import conjuncts
from ..errors import RegardError

Method = TypeVar("Method", bound=Callable[..., Any])
P = ParamSpec("P")


def whole(method: Method) -> Method:
    """A layer's method besides `forward` that reads its parameters: under FSDP2 they are gathered for it too."""

    @functools.wraps(method)
    def run(self: nn.Module, *args: Any, **options: Any) -> Any:
        name = method.__name__
        if "torch.distributed.fsdp" in sys.modules and name not in vars(self):  # loaded where a model was sharded
            from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

            if isinstance(self, FSDPModule):
                register_fsdp_forward_method(self, name)
                return getattr(self, name)(*args, **options)
        return method(self, *args, **options)

    return run  # type: ignore[return-value]


def takes(**shapes: str) -> Callable[[Method], Method]:
    """Decorator of a layer's method: these arguments are tensors of these shapes, or a RegardError says what came and what was expected.

    A word of a shape is the layer's attribute of that name, if it is a number; else a size that is the same wherever the word stands.
    Arguments whose default is None may be left out.
    """
    wanted = {name: shape.split() for name, shape in shapes.items()}

    def put(method: Method) -> Method:
        known_as = inspect.signature(method).parameters
        places = {name: at - 1 for at, name in enumerate(known_as)}
        optional = {name for name in wanted if known_as[name].default is None}

        @functools.wraps(method)
        def run(self: nn.Module, *args: Any, **options: Any) -> Any:
            sizes: dict[str, int] = {}
            for name, words in wanted.items():
                x = args[places[name]] if places[name] < len(args) else options.get(name)
                if x is None and name in optional:
                    continue
                known = {word: getattr(self, word, None) for word in words}
                sizes.update({word: size for word, size in known.items() if type(size) is int})
                fits = isinstance(x, Tensor) and x.dim() == len(words)
                if not fits or any(sizes.setdefault(word, size) != size for word, size in zip(words, x.shape)):  # type: ignore[union-attr]
                    came = f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
                    shape = ", ".join(f"{word}={sizes[word]}" if word in sizes else word for word in words)
                    raise RegardError(f"{name} is {came}; expected ({shape})")
            return method(self, *args, **options)

        return run  # type: ignore[return-value]

    return put


def one_by_one(step: Method) -> Method:
    """A step of one token, (B, 1, dim) -> (y, state), as a step of any number of them."""

    @functools.wraps(step)
    def run(self: nn.Module, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        outs = []
        for t in range(x.shape[1]):
            y, state = step(self, x[:, t : t + 1], state)
            outs.append(y)
        return (torch.cat(outs, 1) if outs else torch.zeros_like(x)), state

    return run  # type: ignore[return-value]


class Momentary(nn.Module):
    """A layer that keeps, as attributes, what its last pass found. Copies leave out what hangs on that pass's graph."""

    def __getstate__(self) -> dict[str, Any]:
        return {key: x for key, x in vars(self).items() if not (isinstance(x, Tensor) and x.grad_fn is not None)}


class UnitNorm(nn.Module):
    """x / |x| over the last dimension; with eps x / sqrt(|x|^2 + eps)."""

    def __init__(self, eps: float = 0.0):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().sum(-1, keepdim=True) + self.eps).rsqrt() if self.eps else F.normalize(x, dim=-1)


class SumNorm(nn.Module):
    """x / sum x over the last dimension, of positive x."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.sum(-1, keepdim=True)


def head_norm(kind: str, width: int, eps: float | None = None) -> nn.Module:
    """A norm over a head's channels: "" none, "l2", "sum", "rms", "srms" (no learned factors), "gated_rms" or "layer".

    eps None: 0 in "l2", 1e-6 in "rms" and "srms", 1e-8 in "gated_rms", 1e-5 in "layer".
    """

    def small(default: float) -> float:
        return default if eps is None else eps

    known: dict[str, Callable[[], nn.Module]] = {
        "": nn.Identity,
        "l2": lambda: UnitNorm(small(0.0)),
        "sum": SumNorm,
        "rms": lambda: nn.RMSNorm(width, eps=small(1e-6)),
        "srms": lambda: nn.RMSNorm(width, eps=small(1e-6), elementwise_affine=False),
        "layer": lambda: nn.LayerNorm(width, eps=small(1e-5)),
        "gated_rms": lambda: GatedRMSNorm(width, small(1e-8)),
    }
    if kind not in known:
        raise RegardError(f"norm {kind!r}; expected one of {', '.join(map(repr, known))}")
    return known[kind]()


class GatedRMSNorm(nn.Module):
    """y = scale * x / rms(x) * sigmoid(gate * x), elementwise scale and gate (ReLA's)."""

    def __init__(self, width: int, eps: float = 1e-8):
        super().__init__()
        self.eps, self.scale, self.gate = eps, nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * torch.sigmoid(self.gate * x)


class HeadGate(nn.Module):
    """x (B, L, dim) -> factor sigmoid(G_h(x)) (B, H, L, 1).

    kind: "head": G linear on the head's own slice of x; "head_mlp": with a hidden layer, `hidden` wide (None: a quarter of the slice);
    "heads": linear on all of x; "mean": "head" averaged over the tokens, so in both directions only; "constant": a number a head.
    init: the gate's start. factor: 1 / init makes the gated layer start as the ungated one.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kind: str,
        init: float = 0.5,
        factor: float = 1.0,
        std: float | None = None,
        hidden: int | None = None,
    ):
        super().__init__()
        if not 0 < init < 1:
            raise RegardError(f"gate_init={init}; expected a number between 0 and 1")
        if kind not in ("head", "head_mlp", "heads", "mean", "constant"):
            raise RegardError(f"out_gate={kind!r}; expected head, head_mlp, heads, mean, constant, silu, sigmoid or linear")
        if kind not in ("heads", "constant") and dim % heads:
            raise RegardError(f"out_gate={kind!r} cuts dim={dim} into heads={heads} slices; expected a multiple, or out_gate='heads'")
        self.kind, self.heads, self.factor = kind, heads, factor
        own = dim if kind == "heads" else dim // heads
        width = own
        self.hidden = self.hidden_bias = None
        if kind == "head_mlp":
            width = hidden or max(1, own // 4)
            self.hidden = nn.Parameter(torch.randn(heads, own, width) / own**0.5)
            self.hidden_bias = nn.Parameter(torch.zeros(heads, width))
        self.weight = None if kind == "constant" else nn.Parameter(torch.randn(heads, width) * (width**-0.5 if std is None else std))
        self.bias = nn.Parameter(torch.full((heads,), math.log(init / (1 - init))))

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is None:
            return self.factor * torch.sigmoid(self.bias)[:, None, None].expand(x.shape[0], -1, x.shape[1], -1)
        parts = x.unsqueeze(-2).expand(*x.shape[:-1], self.heads, -1) if self.kind == "heads" else x.unflatten(-1, (self.heads, -1))
        if self.hidden is not None and self.hidden_bias is not None:
            parts = torch.relu(torch.einsum("blhd,hdf->blhf", parts, self.hidden) + self.hidden_bias)
        logits = (parts * self.weight).sum(-1) + self.bias
        logits = logits.mean(1, keepdim=True).expand_as(logits) if self.kind == "mean" else logits
        return self.factor * torch.sigmoid(logits).transpose(1, 2).unsqueeze(-1)


class ShortConv(nn.Module):
    """Causal depthwise convolution over the length of x (B, L, channels), with the bias and activation given; the state is the last
    width - 1 inputs."""

    def __init__(self, channels: int, width: int, bias: bool = False, activation: Callable[[Tensor], Tensor] | None = None):
        super().__init__()
        self.width, self.activation = width, activation
        self.weight = nn.Parameter(torch.empty(channels, 1, width).uniform_(-1, 1) / width**0.5)
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(self, x: Tensor, state: Tensor | None = None, documents: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """documents (B or 1, L): numbers of what the tokens belong to, none of which reads another; below zero is padding, read as zero."""
        past = x.new_zeros(x.shape[0], self.width - 1, x.shape[2]) if state is None else state
        x = x if documents is None else torch.where(documents[..., None] >= 0, x, 0.0)
        wide = torch.cat((past, x), 1)
        if documents is None:
            out = F.conv1d(wide.transpose(1, 2), self.weight, self.bias, groups=x.shape[2]).transpose(1, 2)
        else:
            out = conv_apart(wide, self.weight, self.bias, documents)
        return out if self.activation is None else self.activation(out), wide[:, wide.shape[1] - self.width + 1 :]


def conv_apart(wide: Tensor, weight: Tensor, bias: Tensor | None, documents: Tensor) -> Tensor:
    """A causal depthwise convolution as a sum over lags, each of which reads tokens of the same document alone: wide (..., width - 1 + L, channels),
    weight (channels, 1, width), documents (..., L) -> (..., L, channels)."""
    length, width = documents.shape[-1], weight.shape[-1]
    of = F.pad(documents, (width - 1, 0))
    total: Tensor | float = 0.0 if bias is None else bias
    for tap in range(width):
        at = slice(tap, tap + length)
        total = total + torch.where((of[..., at] == documents)[..., None], wide[..., at, :], 0.0) * weight[:, 0, tap]
    return torch.as_tensor(total)


def documents_of(mask: Any, inputs: Mapping[str, Any], length: int) -> Tensor | None:
    """What `ShortConv` must know of a call's mask: numbers of documents (B or 1, length), -1 at padding, or None where all is one text."""
    documents: Tensor | None = None
    for part in () if mask is None else conjuncts(mask):
        if isinstance(part, Segments):
            ids = inputs["segments"][..., -length:]
            documents = ids - ids.min() if documents is None else torch.where(documents >= 0, ids - ids.min(), -1)
        elif isinstance(part, Padding):
            keep = inputs["keep"][..., -length:]
            documents = torch.where(keep, 0 if documents is None else documents, -1)
        elif isinstance(part, Explicit) and inputs["visible"].shape[1:3] == (1, 1):  # a mask of keys alone
            documents = torch.where(inputs["visible"][:, 0, 0, -length:], 0 if documents is None else documents, -1)
        elif not isinstance(part, (Full, Causal)):
            raise RegardError(
                f"mask={part!r}: a short convolution reads neighbours, so it takes Causal(), Padding(), Segments() or no mask"
            )
    return documents


class Projection(nn.Module):
    """x (B, L, dim) -> (B, heads, L, channels), through `rank` channels if given; `bias` None: no bias, else its start."""

    def __init__(self, dim: int, heads: int, channels: int, rank: int | None, bias: float | None):
        super().__init__()
        self.channels = channels
        self.down = nn.Linear(dim, rank, False) if rank else nn.Identity()
        self.up = nn.Linear(rank or dim, heads * channels, bias is not None)
        if bias is not None:
            nn.init.constant_(self.up.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x)).unflatten(-1, (-1, self.channels)).transpose(1, 2)  # type: ignore[no-any-return]


class GatedMLP(nn.Module):
    """W3(act(W1 x) * W2 x): kind "swiglu" (act silu) or "sglu" (no act)."""

    def __init__(self, dim: int, hidden: int, kind: str = "swiglu"):
        super().__init__()
        if kind not in ("swiglu", "sglu"):
            raise RegardError(f"mlp {kind!r}; expected swiglu or sglu")
        self.act = F.silu if kind == "swiglu" else nn.Identity()
        self.gate, self.up, self.down = nn.Linear(dim, hidden, False), nn.Linear(dim, hidden, False), nn.Linear(hidden, dim, False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


class SwiGLU(GatedMLP):
    """W3(silu(W1 x) * W2 x)."""


class LayerScale(nn.Module):
    """A learned factor a channel on a residual branch, starting small (1e-4 in the sigmoid-attention recipe)."""

    def __init__(self, dim: int, init: float = 1e-4):
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight
