"""Flux Attention: a router a layer decides, from the prompt, between full and sparse attention (id 205; Fu et al., 2026).

z = [class 1 of MLP(f(mean of q over the first and last P tokens, and heads))];  o = z FA(q, k, v) + (1 - z) SA(q, k, v)
loss = LM + lam1 |s - s*| + lam2 (s - s*)^2, s = 1 - mean z; lam1, lam2 >= 0 by gradient ascent
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.algebra import Causal, Mechanism, Sinks, Weighted, Window
from regard.catalog.registry import register
from regard.engine.door import attend
from regard.errors import RegardError
from regard.nn.attention import Attention
from regard.nn.decoder import Decoder
from regard.nn.parts import Momentary, takes, whole


class LayerRouter(nn.Module):
    """Queries before rotation (B, H, T, D) -> logits (B, 2), class 1: full attention, preferred at the start.

    ends: P, tokens at either end of the prompt that are looked at.
    """

    def __init__(self, head_dim: int, ends: int = 100, start: float = 4.5):
        super().__init__()
        d = head_dim
        self.ends = ends
        self.features = nn.Sequential(nn.Linear(d, 8 * d), nn.SiLU(), nn.Linear(8 * d, 2 * d))
        self.mlp = nn.Sequential(nn.Linear(2 * d, 4 * d), nn.SiLU(), nn.Linear(4 * d, d), nn.SiLU(), nn.Linear(d, 2))
        last = self.mlp[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        with torch.no_grad():
            last.bias.copy_(torch.tensor([0.0, start]))

    def forward(self, q: Tensor) -> Tensor:
        shown = torch.cat((q[..., : self.ends, :], q[..., -self.ends :, :]), -2) if q.shape[-2] > self.ends else q
        return self.mlp(self.features(shown.mean((-3, -2))))  # type: ignore[no-any-return]


@dataclass
class RoutedState:
    """What decoding remembers: who reads everything (B,), and for each group of samples (rows, k, v, tokens seen)."""

    full: Tensor
    parts: dict[bool, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    position: int = 0

    def entries(self) -> dict[bool, int]:
        """Keys held by the full and by the sparse path."""
        return {path: part[1].shape[2] for path, part in self.parts.items()}


@register("flux-attention", kind="module")
class FluxAttention(Momentary):
    """A routed `Attention`: x (B, L, dim) -> (B, L, dim), causal. inner: the pretrained layer (softmax, causal).

    sinks, window: the sparse path's first and last tokens; sparse: another mechanism for it, in prompts (decoding keeps sinks and window
    only). In training both paths run and z is a Gumbel sample with straight-through gradient at `tau`; `.z` (B,) keeps it. `decide` fixes
    z from outside (None: the router).
    """

    def __init__(
        self, inner: Attention, *, sinks: int = 128, window: int = 1024, ends: int = 100, sparse: Mechanism | None = None,
        full: Mechanism | None = None,
    ):  # fmt: skip
        super().__init__()
        self.dim = inner.dim
        self.inner, self.router, self.tau = inner, LayerRouter(inner.key_dim, ends), 1.0
        self.sinks, self.window = sinks, window
        self.full = full or Weighted(mask=Causal())
        self.sparse = sparse or Weighted(mask=Causal() & (Window(window) | Sinks(sinks)))
        self.decide: Tensor | None = None
        self.z: Tensor | None = None

    def route(self, x: Tensor) -> Tensor:
        """z (B,): 1 where all is read."""
        if self.decide is not None:
            return self.decide.to(x).expand(x.shape[0])
        logits = self.router(self.inner.q(x).unflatten(-1, (self.inner.heads, -1)).transpose(1, 2))
        if not self.training:
            return logits.argmax(-1).to(x)  # type: ignore[no-any-return]
        noise = -torch.log(-torch.log(torch.rand_like(logits).clamp(1e-9, 1 - 1e-9)))
        soft = ((logits + noise) / self.tau).softmax(-1)[..., 1]
        return (soft > 0.5).to(x) + soft - soft.detach()

    @takes(x="batch length dim")
    def forward(self, x: Tensor) -> Tensor:
        q, k, v, _ = self.inner.heads_of(x, x, 0, None)
        z = self.z = self.route(x)
        if self.training:
            w = z[:, None, None, None]
            return self.inner.close(w * attend(q, k, v, self.full) + (1 - w) * attend(q, k, v, self.sparse), x)
        out = q.new_empty(*q.shape[:3], v.shape[-1])
        for path, mechanism in ((True, self.full), (False, self.sparse)):
            rows = (z > 0.5) == path
            if rows.any():
                out[rows] = attend(q[rows], k[rows], v[rows], mechanism)
        return self.inner.close(out, x)

    @whole
    @takes(x="batch length dim")
    def step(self, x: Tensor, state: RoutedState | None = None) -> tuple[Tensor, RoutedState]:
        """The prompt decides the path; later tokens keep to it."""
        position = 0 if state is None else state.position
        q, k, v, _ = self.inner.heads_of(x, x, position, None)
        if state is None:
            out, z = self.forward(x), self.z
            assert z is not None
            state = RoutedState(z > 0.5)
            for path in (True, False):
                rows = (state.full == path).nonzero().squeeze(-1)
                if len(rows):
                    state.parts[path] = (rows, *self.trimmed(path, k[rows], v[rows]))
            state.position = x.shape[1]
            return out, state
        outs = []
        for t in range(x.shape[1]):
            one = q.new_empty(*q.shape[:2], 1, v.shape[-1])
            for path, (rows, past_k, past_v) in state.parts.items():
                grown = [torch.cat((past, new[rows, :, t : t + 1]), 2) for past, new in ((past_k, k), (past_v, v))]
                state.parts[path] = (rows, *self.trimmed(path, grown[0], grown[1]))
                one[rows] = attend(q[rows, :, t : t + 1], *state.parts[path][1:])
            outs.append(one)
        state.position += x.shape[1]
        return self.inner.close(torch.cat(outs, 2), x), state

    def trimmed(self, full: bool, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if full or k.shape[2] <= self.sinks + self.window:
            return k, v
        return tuple(torch.cat((x[:, :, : self.sinks], x[:, :, -self.window :]), 2) for x in (k, v))  # type: ignore[return-value]


def flux_model(model: Decoder, **options: int | Mechanism) -> Decoder:
    """Gives every softmax layer of a pretrained decoder a router, in place; its own weights no longer ask for gradients."""
    for p in model.parameters():
        p.requires_grad_(False)
    for block in model.blocks:
        if not isinstance(block.mixer, Attention):
            raise RegardError(f"layer {type(block.mixer).__name__} is no Attention; Flux routes softmax layers")
        block.mixer = FluxAttention(block.mixer, **options)  # type: ignore[arg-type]
    return model


def flux_layers(model: nn.Module) -> list[FluxAttention]:
    return [m for m in model.modules() if isinstance(m, FluxAttention)]


def sparsity(model: nn.Module) -> Tensor:
    """(B,): 1 - the mean over layers of the last decisions."""
    return 1 - torch.stack([layer.z for layer in flux_layers(model) if layer.z is not None]).mean(0)


def temperature(step: int, steps: int, high: float = 1.0, low: float = 0.3) -> float:
    """A cosine from high to low."""
    return low + (high - low) * (1 + math.cos(math.pi * min(step / max(1, steps), 1.0))) / 2


class SparsityController(nn.Module):
    """The multipliers lam1, lam2 of each task: a descent step of any optimiser raises them while s is off its target."""

    def __init__(self, targets: dict[str, float]):
        super().__init__()
        self.tasks = {name: at for at, name in enumerate(targets)}
        self.targets: Tensor
        self.register_buffer("targets", torch.tensor(list(targets.values())))
        self.multipliers = nn.Parameter(torch.rand(2, len(targets)) * 0.5)

    def forward(self, s: Tensor, tasks: list[str], warm: float = 1.0) -> Tensor:
        """The penalty of sparsities s (B,); warm in [0, 1] scales the targets."""
        at = torch.tensor([self.tasks[name] for name in tasks], device=s.device)
        lam = self.multipliers.clamp_min(0)
        ascending = 2 * lam.detach() - lam  # the same value, the opposite gradient
        off = s - warm * self.targets[at]
        return (ascending[0, at] * off.abs() + ascending[1, at] * off.square()).mean()


def train_router(
    model: Decoder, batches: list[tuple[Tensor, list[str]]], controller: SparsityController, steps: int, *,
    lr: float = 5e-4, controller_lr: float = 1e-3, lm_weight: float = 1.0,
) -> list[float]:  # fmt: skip
    """Trains routers and multipliers on (tokens (B, L + 1), task of each row), in turn; returns the loss of each step."""
    layers = flux_layers(model)
    routers = [p for layer in layers for p in layer.router.parameters()]
    optimizer = torch.optim.Adam([{"params": routers, "lr": lr}, {"params": controller.parameters(), "lr": controller_lr}])
    model.train()
    losses = []
    for step in range(steps):
        tokens, tasks = batches[step % len(batches)]
        for layer in layers:
            layer.tau = temperature(step, steps)
        logits = model(tokens[:, :-1])
        loss = controller(sparsity(model), tasks, min(1.0, 5 * (step + 1) / steps))
        if lm_weight:
            loss = loss + lm_weight * F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses
