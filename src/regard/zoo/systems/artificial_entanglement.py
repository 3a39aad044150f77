"""Artificial entanglement: matrices as states of a chain of small legs, and how much each cut of the chain shares (id 203; 2026).

psi = vec(M) / |M|, legs: digits of the row index, then of the column index;   cut l: singular values s of psi as (first l legs) x (the others),
p = s^2 / sum s^2, S(l) = -sum p log p.   Middle cut: S <= log rank(M);   BA of rank r: a valley there;   Gaussian: Page's curve log m - m / (2 n)
MPS adapter: dW[o, i] = sum over bonds of prod_j G_j[b_{j-1}, o_j, i_j, b_j]
`probe` fine-tunes a language model's W_Q and W_V by LoRA, in full and by MPS; `no_hair` compares two of them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError

if TYPE_CHECKING:
    from regard.adapt.recipe import Draw


def factors(size: int) -> list[int]:
    """Prime factors, the smallest first; [1] of 1."""
    found, p = [], 2
    while size > 1:
        while size % p == 0:
            found.append(p)
            size //= p
        p += 1
    return found or [1]


def entropy(matrix: Tensor) -> Tensor:
    """Von Neumann entropy -sum p log p (natural log) of singular values squared and normalised, (..., m, n) -> (...)."""
    s = torch.linalg.svdvals(matrix.to(torch.promote_types(matrix.dtype, torch.float64)))
    p = s.square()
    p = p / p.sum(-1, keepdim=True)
    return -torch.special.xlogy(p, p).sum(-1)


@register("artificial-entanglement", kind="experiment")
def entanglement_profile(matrix: Tensor, rows: Sequence[int] | None = None, cols: Sequence[int] | None = None) -> Tensor:
    """Entropies of a matrix (..., R, C) at every cut between legs, (..., legs - 1).

    rows, cols: sizes of legs, the slowest index first (None: prime factors, so bits for powers of two). The cut behind the last row leg is rows
    against columns. RegardError for a matrix of zeros or sizes that do not multiply to R and C.
    """
    if matrix.dim() < 2 or not matrix.is_floating_point() or not bool(matrix.isfinite().all()):
        raise RegardError(f"matrix {tuple(matrix.shape)} {matrix.dtype}: expected finite numbers (..., rows, columns)")
    legs = [*(factors(matrix.shape[-2]) if rows is None else rows), *(factors(matrix.shape[-1]) if cols is None else cols)]
    split = len(legs) - len(factors(matrix.shape[-1]) if cols is None else cols)
    if math.prod(legs[:split]) != matrix.shape[-2] or math.prod(legs[split:]) != matrix.shape[-1]:
        raise RegardError(f"rows={rows}, cols={cols}: expected sizes that multiply to {matrix.shape[-2]} and {matrix.shape[-1]}")
    if bool((matrix.flatten(-2).abs().amax(-1) == 0).any()):
        raise RegardError("matrix is all zeros, which is no state; expected some number that is not")
    flat = matrix.flatten(-2)
    cuts = [math.prod(legs[:at]) for at in range(1, len(legs))]
    return torch.stack([entropy(flat.unflatten(-1, (cut, -1))) for cut in cuts], -1)


def attention_entanglement(weights: Tensor) -> Tensor:
    """Entropies of attention maps (B, H, Lq, Lk) between queries and keys, (B, H)."""
    if weights.dim() != 4:
        raise RegardError(f"weights {tuple(weights.shape)}: expected (B, H, Lq, Lk)")
    return entropy(weights)


def page(rows: int, cols: int) -> float:
    """Mean entropy of a Gaussian matrix, nearly: log m - m / (2 n), m the smaller size."""
    m, n = min(rows, cols), max(rows, cols)
    return math.log(m) - m / (2 * n)


class MPSAdapter(nn.Module):
    """x (..., in) -> base(x) + scale x dW^T, dW (out, in) a matrix product state of bond dimension `bond`; base is left as it is.

    outs, ins: sizes of legs, equally many (None: prime factors, the shorter list filled with ones). The last core is zero at first. Parameters: sum of
    bond * o_j * i_j * bond, one bond at the ends.
    """

    def __init__(self, base: nn.Linear, bond: int, alpha: float = 1.0, outs: Sequence[int] | None = None, ins: Sequence[int] | None = None):
        super().__init__()
        o = factors(base.out_features) if outs is None else list(outs)
        i = factors(base.in_features) if ins is None else list(ins)
        count = max(len(o), len(i))
        o, i = [1] * (count - len(o)) + o, [1] * (count - len(i)) + i
        if bond < 1 or math.prod(o) != base.out_features or math.prod(i) != base.in_features:
            raise RegardError(
                f"bond={bond}, outs={outs}, ins={ins}: expected at least 1, and sizes that multiply to {base.out_features} and {base.in_features}"
            )
        self.base, self.alpha = base, alpha
        ends = [1, *[bond] * (count - 1), 1]
        shapes = [(ends[j], o[j], i[j], ends[j + 1]) for j in range(count)]
        like = base.weight
        self.cores = nn.ParameterList(
            nn.Parameter(torch.randn(s, device=like.device, dtype=like.dtype) * (s[0] * s[2]) ** -0.5) for s in shapes
        )
        nn.init.zeros_(self.cores[-1])

    def update(self) -> Tensor:
        """dW (out, in), times alpha."""
        total: Tensor = self.cores[0][0]  # (o, i, bond)
        for core in list(self.cores)[1:]:
            total = torch.einsum("oib,bpjc->opijc", total, core).flatten(2, 3).flatten(0, 1)
        return self.alpha * total[..., 0]

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.update().T  # type: ignore[no-any-return]


def no_hair(first: Sequence[Tensor], second: Sequence[Tensor], maps: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Two ways of fine-tuning compared: updates dW of the same matrices, and the attention maps (B, H, L, L) that they lead to.

    internal: mean over matrices and cuts of |S - S'| of the updates; external: mean over maps of |S - S'|; internal_scale, external_scale: mean S.
    """
    if not first or len(first) != len(second):
        raise RegardError(f"first, second: {len(first)} and {len(second)} updates; expected as many, at least one")
    inside = [(entanglement_profile(a), entanglement_profile(b)) for a, b in zip(first, second, strict=True)]
    a, b = (attention_entanglement(x) for x in maps)
    return {
        "internal": sum(float((x - y).abs().mean()) for x, y in inside) / len(inside),
        "internal_scale": sum(float((x + y).mean()) / 2 for x, y in inside) / len(inside),
        "external": float((a - b).abs().mean()),
        "external_scale": float((a + b).mean() / 2),
    }


@dataclass(frozen=True)
class Tuned:
    """A way of fine-tuning: losses of its steps, updates dW (out, in) by the names of the matrices, maps (B, layers H, L, L) of the held-out text."""

    losses: list[float]
    updates: dict[str, Tensor]
    maps: Tensor


def probe(
    model: nn.Module,
    draw: Draw,
    held: Tensor,
    *,
    steps: int = 100,
    lr: float = 1e-3,
    rank: int = 4,
    bond: int = 4,
    targets: tuple[str, ...] = ("q_proj", "v_proj"),
    seed: int = 0,
) -> dict[str, Tuned]:
    """A transformers decoder's `targets` alone fine-tuned on next tokens three ways, "lora", "full" and "mps", each from the model as it is, which
    stays so. draw: batches, as `regard.adapt.carry_out` has it, the same for all three; held (B, L): ids whose attention maps are taken.

    Two ways side by side: no_hair(list(a.updates.values()), list(b.updates.values()), (a.maps, b.maps)).
    """
    from regard.adapt.conversion import Conversion
    from regard.adapt.recipe import carry_out
    from regard.adapt.replace import Replaced, replace
    from regard.adapt.stages import Lora, Tune

    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.endswith(targets)]
    if not names or steps < 1:
        raise RegardError(f"targets={targets}, steps={steps}: expected ends of names of linear layers of the model, and at least one step")
    found = {}
    for way in ("lora", "full", "mps"):
        own: Any = copy.deepcopy(model)
        before = {name: own.get_submodule(name).weight.detach().clone() for name in names}
        torch.manual_seed(seed)
        if way == "mps":
            replace(own, lambda name, m: name in names, lambda m: MPSAdapter(m, bond))  # type: ignore[arg-type]
        stage: Any = {
            "lora": lambda: Lora(steps, lr, targets=targets, rank=rank, alpha=rank),
            "full": lambda: Tune(steps, lr, learn=tuple(f"{name}.weight" for name in names)),
            "mps": lambda: Tune(steps, lr, learn=tuple(f"{name}.cores.*" for name in names)),
        }[way]()
        report = carry_out(Conversion(own, Replaced(own, {}), {}), [stage], draw, seed=seed)
        parts = {name: own.get_submodule(name) for name in names}
        with torch.no_grad():
            updates = {name: part.update() if way == "mps" else part.weight - before[name] for name, part in parts.items()}
            own.eval().set_attn_implementation("eager")
            maps = torch.cat(own(input_ids=held, output_attentions=True, use_cache=False).attentions, 1)
        found[way] = Tuned(report.losses[0], {name: x.detach() for name, x in updates.items()}, maps)
    return found
