"""ACM: adaptive computation modules, N small learners whose sums refine an output, of which each token runs a few (id 183; Wójcik et al., 2023).

l_n(x) = act(x W1_n + b1_n) W2_n + b2_n,   h_n = b2_0 + sum_{j <= n} l_j(x),   y = h_n with n chosen by a gate, a token each
1. distil: mean over n of MSE(h_n, y_base), gradients of h_n to l_n alone (detach)   2. gate: cross-entropy with the first n that the next barely
improves, err_{n-1} / err_n < factor   3. CE + w_b |cost / full cost - beta| - w_e mean entropy of choices - w_d 2 mean |cost_i - cost_j|
The released sparse pass never runs the last learner of the tokens that choose the most in a batch; here y = h_n for all of them. Its gate's
loss takes the logarithm of sampled one-hot choices; here it is of the gate's logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.adapt.conversion import Conversion, convert
from regard.adapt.stages import Lesson, Transfer, Tune, first, next_token_loss
from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.conditional import ACTS, GumbelGate, spent, spread, variety
from regard.nn.parts import Momentary, takes

KINDS = {"ffn": ("mlp",), "q": ("q_proj",), "k": ("k_proj",), "v": ("v_proj",), "o": ("o_proj",)}


@register("acm", kind="module")
class ACM(Momentary):
    """x (B, L, dim) -> (B, L, out or dim). learners: N, each `block` wide inside. bias: True, False, "hidden_only" or "out_only".

    gate_hidden, gate_depth: of the gate's linear layers (depth 1: one), with gate_act between them (none, as released); tau: of its Gumbel
    softmax in training (None: learned, from 1); at inference the largest is taken. least: learners that every token runs. straight: in training
    outputs are mixed by the gate's choice, so that it learns from them; False, as released: the gate learns from its own losses alone.
    detach: in `outputs`, h_n teaches learner n alone. `fixed`: a number of learners for all tokens, in place of the gate, or None. `choice`
    (B, L, N + 1): which were taken last.
    """

    def __init__(
        self,
        dim: int,
        learners: int = 4,
        block: int = 64,
        act: str = "gelu",
        out: int | None = None,
        bias: bool | str = True,
        dropout: float = 0.0,
        gate_hidden: int = 128,
        gate_depth: int = 2,
        gate_act: str = "identity",
        tau: float | None = 0.8,
        least: int = 0,
        straight: bool = True,
        detach: bool = True,
    ):
        super().__init__()
        if act not in ACTS or bias not in (True, False, "hidden_only", "out_only") or min(dim, learners, block) < 1:
            raise RegardError(
                f"dim={dim}, learners={learners}, block={block}, act={act!r}, bias={bias!r}: expected sizes of at least 1, one of "
                f"{', '.join(ACTS)}, and True, False, 'hidden_only' or 'out_only'"
            )
        self.dim, self.out, self.learners, self.block, self.act = dim, out or dim, learners, block, act
        self.dropout, self.straight, self.detach = dropout, straight, detach
        self.w1 = nn.Parameter(torch.empty(dim, learners * block))
        self.w2 = nn.Parameter(torch.empty(learners * block, self.out))
        self.b1 = nn.Parameter(torch.empty(learners * block)) if bias in (True, "hidden_only") else None
        self.b2 = nn.Parameter(torch.empty(learners + 1, self.out)) if bias in (True, "out_only") else None
        for w in (self.w1, self.w2):
            nn.init.kaiming_uniform_(w, a=5**0.5)
        for b, fan in ((self.b1, block), (self.b2, self.out)):  # fans as the released code counts them
            if b is not None:
                nn.init.uniform_(b, -(fan**-0.5), fan**-0.5)
        self.gate = GumbelGate(dim, learners + 1, gate_hidden, gate_depth, gate_act, tau, least)
        self.fixed: int | None = None
        self.choice: Tensor | None = None

    @property
    def flops(self) -> int:
        """Multiplications and additions of one learner, a token."""
        return 2 * self.block * (self.dim + self.out)

    def outputs(self, x: Tensor, detach: bool | None = None) -> Tensor:
        """h_0 .. h_N, (..., N + 1, out)."""
        hidden = x @ self.w1
        hidden = ACTS[self.act](hidden if self.b1 is None else hidden + self.b1)
        hidden = F.dropout(hidden, self.dropout, self.training).unflatten(-1, (self.learners, self.block))
        own = torch.einsum("...nb,nbd->...nd", hidden, self.w2.unflatten(0, (self.learners, self.block)))
        own = F.pad(own, (0, 0, 1, 0))
        own = own if self.b2 is None else own + self.b2
        total = own.cumsum(-2)
        total = own + (total - own).detach() if (self.detach if detach is None else detach) else total
        return F.dropout(total, self.dropout, self.training)

    @takes(x="batch length dim")
    def forward(self, x: Tensor) -> Tensor:
        if self.fixed is None:
            choice = self.gate(x)
        else:
            choice = F.one_hot(torch.full(x.shape[:-1], self.fixed, device=x.device), self.learners + 1).to(x.dtype)
        self.choice = choice
        if self.training and self.straight:
            return (choice.to(x.dtype)[..., None] * self.outputs(x, detach=False)).sum(-2)
        return self.few(x, choice.detach().argmax(-1))

    def few(self, x: Tensor, counts: Tensor) -> Tensor:
        """What counts (B, L) learners give, computing no others."""
        y = x.new_zeros(*x.shape[:-1], self.out) if self.b2 is None else self.b2[0].expand(*x.shape[:-1], -1).clone()
        for n in range(1, self.learners + 1):
            mine = counts >= n
            if not bool(mine.any()):
                break
            span = slice((n - 1) * self.block, n * self.block)
            hidden = x[mine] @ self.w1[:, span]
            hidden = ACTS[self.act](hidden if self.b1 is None else hidden + self.b1[span])
            part = F.dropout(hidden, self.dropout, self.training) @ self.w2[span]
            y = y.index_put((mine,), part if self.b2 is None else part + self.b2[n], accumulate=True)
        return F.dropout(y, self.dropout, self.training)


def width_for(share: float, dim: int, out: int) -> int:
    """The width at which one learner costs `share` of a dense layer from dim to out."""
    return max(1, round(share * (dim * out + out) / (dim + out + 1)))


def acmize(
    model: nn.Module,
    kinds: tuple[str, ...] = ("ffn",),
    learners: int = 4,
    share: float = 0.25,
    act: str = "gelu",
    layers: Iterable[int] | None = None,
    **options: Any,
) -> Conversion:
    """A transformers decoder's feed-forward layers ("ffn") and projections of attention ("q", "k", "v", "o") as ACMs, not trained yet.

    share: of the dense layer's cost, a learner: `share` of a feed-forward layer's inner width, or of a projection's products; projections have no
    activation. layers: numbers of the decoder's layers (None: all). Then `carry_out(conversion, [distilling(...), gating(...), budgeted(...)],
    draw)`.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds or share <= 0:
        raise RegardError(f"kinds={kinds}, share={share}; expected some of {', '.join(KINDS)}, and a share above 0")
    numbers = None if layers is None else {str(number) for number in layers}
    ends = {end: kind for kind in kinds for end in KINDS[kind]}

    def make(part: nn.Module) -> ACM:
        if isinstance(part, nn.Linear):
            block = width_for(share, part.in_features, part.out_features)
            return ACM(part.in_features, learners, block, "identity", part.out_features, part.bias is not None, **options)
        inner: Any = [linear for linear in part.modules() if isinstance(linear, nn.Linear)]
        if not inner:
            raise RegardError(f"{type(part).__name__} holds no linear layers; expected feed-forward layers named mlp")
        last = inner[-1]
        return ACM(last.out_features, learners, max(1, round(share * last.in_features)), act, bias=last.bias is not None, **options)

    def fits(name: str, part: nn.Module) -> bool:
        return name.rpartition(".")[2] in ends and (numbers is None or bool(numbers & set(name.split("."))))

    return convert(model, make, where=fits)


def distilled(student: ACM, lesson: Lesson) -> Tensor:
    """Mean over n = 0 .. N of the squared error of h_n."""
    args, kwargs, out = lesson
    found = student.outputs(args[0] if args else next(iter(kwargs.values())))
    return F.mse_loss(found, first(out).unsqueeze(-2).expand_as(found))


def gate_labels(errors: Tensor, factor: float, released: bool = False) -> Tensor:
    """How many learners are enough (...,), from errors (..., N + 1) of h_0 .. h_N: the first n >= 1 with err_{n-1} / err_n < factor, else N.

    released: as in the released code, where n = 1 is taken for none found.
    """
    enough = errors[..., :-1] / errors[..., 1:].clamp_min(torch.finfo(errors.dtype).tiny) < factor
    at = enough.to(torch.int8).argmax(-1)
    none = at == 0 if released else ~enough.any(-1)
    return torch.where(none, errors.shape[-1] - 1, at + 1)


@dataclass(frozen=True)
class GateLoss:
    """Cross-entropy of a gate with `gate_labels`; labels below `least` count as it."""

    factor: float = 1.2
    released: bool = False

    def __call__(self, student: ACM, lesson: Lesson) -> Tensor:
        args, kwargs, out = lesson
        x = args[0] if args else next(iter(kwargs.values()))
        with torch.no_grad():
            errors = (student.outputs(x) - first(out).unsqueeze(-2)).norm(dim=-1)
            labels = (gate_labels(errors, self.factor, self.released) - student.gate.least).clamp_min(0)
        return F.cross_entropy(student.gate.logits(x).flatten(0, -2), labels.flatten())


def choices(model: nn.Module) -> tuple[list[Tensor], list[int]]:
    """What the ACMs of a model took in its last call, and what a learner of each costs."""
    found = [part for part in model.modules() if isinstance(part, ACM)]
    taken = [part.choice for part in found if part.choice is not None]
    if not found or len(taken) < len(found):
        raise RegardError(f"{type(model).__name__}: expected ACM layers that have been called")
    return taken, [part.flops for part in found]


def flops_per_token(model: nn.Module) -> float:
    """Multiplications and additions of learners and gates in the last call, mean over tokens."""
    taken, prices = choices(model)
    whole = sum(price * (choice.shape[-1] - 1) for choice, price in zip(taken, prices, strict=True))
    return float(spent(taken, prices)) * whole + sum(part.gate.flops for part in model.modules() if isinstance(part, ACM))


@dataclass(frozen=True)
class BudgetLoss:
    """The third stage's loss. beta: the share of all learners' cost that is to be spent. kind: "l1", "l2", or "l2_scaled", (100 difference)^2.
    entropy, diversity: weights w_e, w_d. task: loss(model, batch), None for that of next tokens."""

    beta: float
    weight: float = 0.1
    kind: str = "l1"
    entropy: float = 0.05
    diversity: float = 0.05
    task: Callable[[Any, Any], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("l1", "l2", "l2_scaled") or not 0 <= self.beta <= 1:
            raise RegardError(f"BudgetLoss(beta={self.beta}, kind={self.kind!r}): expected a share from 0 to 1, and l1, l2 or l2_scaled")

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        task = next_token_loss(model(input_ids=batch, use_cache=False).logits, batch) if self.task is None else self.task(model, batch)
        return task + self.terms(model).to(task.dtype)

    def terms(self, model: nn.Module) -> Tensor:
        """Everything but the task's own loss."""
        taken, prices = choices(model)
        gap = spent(taken, prices) - self.beta
        budget = gap.abs() if self.kind == "l1" else gap.square() * (1e4 if self.kind == "l2_scaled" else 1.0)
        return self.weight * budget - self.entropy * variety(taken) - self.diversity * spread(taken)


def distilling(steps: int, lr: float = 1e-3, **options: Any) -> Transfer:
    """The first stage: learners from what the parts they replace read and give."""
    return Transfer(steps, lr, ("*.w1", "*.w2", "*.b1", "*.b2"), loss=distilled, **options)


def gating(steps: int, lr: float = 1e-3, factor: float = 1.2, released: bool = False, **options: Any) -> Transfer:
    """The second stage: gates from the errors of the distilled learners."""
    return Transfer(steps, lr, ("*.gate.*",), loss=GateLoss(factor, released), **options)


def budgeted(steps: int, beta: float, lr: float = 1e-4, loss: dict[str, Any] | None = None, **options: Any) -> Tune:
    """The third stage: the whole model under a budget; loss: of `BudgetLoss`."""
    return Tune(steps, lr, loss=BudgetLoss(beta, **(loss or {})), **options)
