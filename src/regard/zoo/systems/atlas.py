"""aTLAS: what several fine-tunes learnt, composed block by block (id 180; Zhang et al., 2024).

tau_i = theta_i - theta_0 in blocks, one a named tensor;   theta(l) = theta_0 + sum_i sum_j l_ij tau_i^(j), only l learns, from zeros
aTLAS x K: the entries of a tensor fall at random into K groups, each with its own l;   linearised: f(x; theta_0) + J f(x; theta_0) (theta(l) - theta_0)
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from regard.adapt.task_vectors import TaskVectors
from regard.catalog.registry import register
from regard.errors import RegardError


@register("atlas", kind="function")
class Atlas(nn.Module):
    """`base` with weights base + learned combination of `vectors`; called as base is. Only `coefficients` learn: (n, m) for n vectors of m
    blocks, (n, m, K) with partition=K, (n,) with isotropic=True (task arithmetic). Buffers are base's.

    linearised: the first-order expansion around base, for a model that returns a tensor. groups: entries' group numbers by shape of tensor
    (as the released code shares them); None draws them. matrices: with partition, tensors that are no matrices stay as they are, as released; False:
    their entries are in groups too. `base` itself is copied and stays as it is.
    """

    def __init__(
        self,
        base: nn.Module,
        vectors: TaskVectors,
        partition: int | None = None,
        isotropic: bool = False,
        linearised: bool = False,
        groups: dict[tuple[int, ...], Tensor] | None = None,
        matrices: bool = True,
    ):
        super().__init__()
        self.base, self.names, self.linearised = copy.deepcopy(base).requires_grad_(False), list(vectors.names), linearised
        blocks = dict(self.base.named_parameters())
        if any(name not in blocks or t.shape != blocks[name].shape for vector in vectors.vectors for name, t in vector.items()):
            raise RegardError("vectors: made for another architecture; expected TaskVectors of this base")
        if (partition is not None and (partition < 1 or isotropic)) or (groups is not None and partition is None):
            raise RegardError(f"partition={partition}, isotropic={isotropic}: expected partition of at least 1 and no isotropic with it")
        self.count, self.partition, self.matrices = len(vectors.vectors), partition, matrices
        for j, name in enumerate(self.names):
            for i, vector in enumerate(vectors.vectors):
                self.register_buffer(f"tau_{i}_{j}", vector.get(name), persistent=False)
        self.shapes = sorted({tuple(blocks[name].shape) for name in self.names if self.moves(blocks[name])}) if partition else []
        for at, shape in enumerate(self.shapes):
            drawn = torch.randint(partition or 1, shape) if groups is None else groups.get(shape)
            if drawn is None or tuple(drawn.shape) != shape or not 0 <= int(drawn.min()) <= int(drawn.max()) < (partition or 1):
                raise RegardError(f"groups[{shape}]: expected numbers from 0 to {(partition or 1) - 1} of that shape")
            self.register_buffer(f"groups_{at}", drawn)
        first = blocks[self.names[0]]
        size = (self.count,) if isotropic else (self.count, len(self.names), *([partition] if partition else []))
        self.coefficients = nn.Parameter(torch.zeros(size, dtype=torch.promote_types(first.dtype, torch.float32), device=first.device))

    def moves(self, block: Tensor) -> bool:
        return not (self.partition and self.matrices) or block.dim() == 2

    def change(self) -> dict[str, Tensor]:
        """theta(l) - theta_0, by name of parameter."""
        blocks, made = dict(self.base.named_parameters()), {}
        for j, name in enumerate(self.names):
            own = self.coefficients if self.coefficients.dim() == 1 else self.coefficients[:, j]
            if not self.moves(blocks[name]):
                made[name] = torch.zeros_like(blocks[name])
                continue
            if self.partition:
                own = own[:, getattr(self, f"groups_{self.shapes.index(tuple(blocks[name].shape))}")]
            total = torch.zeros_like(blocks[name])
            for i in range(self.count):
                tau = getattr(self, f"tau_{i}_{j}")
                total = total if tau is None else total + (own[i] * tau).to(total.dtype)
            made[name] = total
        return made

    def weights(self) -> dict[str, Tensor]:
        blocks = dict(self.base.named_parameters())
        return {name: blocks[name] + delta for name, delta in self.change().items()}

    def forward(self, *args: Any, **named: Any) -> Any:
        if not self.linearised:
            return functional_call(self.base, self.weights(), args, named)
        blocks, change = dict(self.base.named_parameters()), self.change()
        at = {name: blocks[name].detach() for name in change}
        try:
            with sdpa_kernel(SDPBackend.MATH):  # fused kernels have no forward derivative
                both: tuple[Tensor, ...] = jvp(lambda weights: functional_call(self.base, weights, args, named), (at,), (change,))
        except (NotImplementedError, RuntimeError) as why:
            raise RegardError(
                f"linearised=True: base's call has no forward derivative ({why}); expected a tensor of PyTorch operators"
            ) from why
        return both[0] + both[1]

    @torch.no_grad()
    def merge(self) -> dict[str, Tensor]:
        """A plain state dict of base's architecture; tensors that base ties stay equal."""
        made, state = self.weights(), {name: t.clone() for name, t in self.base.state_dict().items()}
        names = {id(p): name for name, p in self.base.named_parameters()}
        for name, p in self.base.named_parameters(remove_duplicate=False):
            if name in state and names[id(p)] in made:
                state[name] = made[names[id(p)]].clone()
        return state

    def report(self) -> list[tuple[str, list[float]]]:
        """Blocks and each vector's coefficient there (mean over groups), those that transfer most first."""
        own = self.coefficients.detach()
        table = own[:, None].expand(-1, len(self.names)) if own.dim() == 1 else own.flatten(2).mean(2) if own.dim() == 3 else own
        order = table.abs().amax(0).argsort(descending=True, stable=True).tolist()
        return [(self.names[j], table[:, j].tolist()) for j in order]


def negation_loss(target: Tensor, labels: Tensor, control: Tensor, control_labels: Tensor) -> Tensor:
    """-CE on what is to be forgotten + CE on the control task; logits (B, classes), labels (B,)."""
    return F.cross_entropy(control, control_labels) - F.cross_entropy(target, labels)


def penalty(coefficients: Tensor, l1: float = 0.0, l2: float = 0.0) -> Tensor:
    return l1 * coefficients.abs().sum() + l2 * coefficients.square().sum()


def trusted(logits: Tensor, count: int) -> Tensor:
    """Which of the samples (N,) are among the `count` surest of some class, by softmax(logits), of logits (N, classes) before adapting."""
    if not 1 <= count <= len(logits):
        raise RegardError(f"count={count} of {len(logits)} samples; expected 1 to {len(logits)}")
    return torch.zeros(len(logits), dtype=torch.bool, device=logits.device).index_fill(
        0, logits.softmax(-1).topk(count, 0).indices.flatten(), True
    )


def adaptation_loss(weak: Tensor, strong: Tensor, first: Tensor | None = None, sure: Tensor | None = None, above: float = 0.99) -> Tensor:
    """Test-time adaptation without labels: cross-entropy of strong views' logits against softmax(weak views' logits), over samples whose
    largest target exceeds `above`. first (B, classes), sure (B,) bool: `sure` samples take the class of the logits from before adapting."""
    goal = weak.detach().softmax(-1)
    if (first is None) != (sure is None):
        raise RegardError("first and sure: one came without the other; expected both or neither")
    if first is not None and sure is not None:
        goal = torch.where(sure[:, None], F.one_hot(first.argmax(-1), first.shape[-1]).to(goal), goal)
    kept = (goal.amax(-1) > above).to(goal)
    return (F.cross_entropy(strong, goal, reduction="none") * kept).sum() / kept.sum().clamp_min(1)


@torch.no_grad()
def interference(composed: Atlas, error: Callable[[nn.Module], float], own: int, other: int) -> float:
    """error(theta_0 + tau_own + tau_other) - error(theta_0 + tau_own) of a task whose vector is `own`: 0 where the two are disentangled."""
    found, kept = [], composed.coefficients.detach().clone()
    try:
        for taken in ([own, other], [own]):
            composed.coefficients.zero_()[taken] = 1
            found.append(error(composed))
    finally:
        composed.coefficients.copy_(kept)
    return found[0] - found[1]
