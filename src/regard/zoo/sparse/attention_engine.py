"""AttentionEngine: attention from a few hooks, softmax-like or linear, compiled to tiles (id 242; Chen et al., 2025).

softmax-like: score_mod, mask_mod, and an online function (see `regard.engine.online`);  linear: q_mod, k_mod, v_mod, decay_mod
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.algebra import Input, Mask, Recurrent
from regard.algebra.blocks import heads_of
from regard.algebra.mask import as_mask
from regard.algebra.part import call
from regard.catalog.registry import register
from regard.engine.door import attend
from regard.engine.online import DEVICES, Definition, Online, OnlineFunction, Rows, Schedule, Tiles, autotune, schedules, whole
from regard.engine.problem import sizes_of
from regard.errors import RegardError


class Softmax:
    """e^S over its row sum, with a running maximum."""

    masked, state = float("-inf"), {"m": float("-inf"), "r": 0.0}

    def online(self, scores: Tensor, state: Rows) -> tuple[Tensor, Rows, Tensor]:
        m = torch.maximum(state["m"], scores.amax(-1, keepdim=True))
        safe = torch.where(m.isfinite(), m, 0.0)
        factor, p = torch.exp(torch.where(state["m"].isfinite(), state["m"] - safe, float("-inf"))), torch.exp(scores - safe)
        return p, {"m": m, "r": state["r"] * factor + p.sum(-1, keepdim=True)}, factor

    def epilogue(self, out: Tensor, state: Rows) -> tuple[Tensor, Rows]:
        r = state["r"]
        return out / torch.where(r == 0, 1.0, r), {"lse": torch.where(r == 0, float("inf"), r.log() + state["m"])}

    def normalised(self, scores: Tensor, final: Rows) -> Tensor:
        return torch.exp(scores - final["lse"])

    def gradient(self, dp: Tensor, p: Tensor, scores: Tensor, final: Rows, delta: Tensor) -> Tensor:
        return (dp - delta) * p


class Plain:
    """Weights are the scores themselves: what sigmoid and ReLU attention use, with the nonlinearity in score_mod."""

    masked, state = 0.0, {}  # type: ignore[var-annotated]

    def online(self, scores: Tensor, state: Rows) -> tuple[Tensor, Rows, float]:
        return scores, state, 1.0

    def epilogue(self, out: Tensor, state: Rows) -> tuple[Tensor, Rows]:
        return out, {}

    def normalised(self, scores: Tensor, final: Rows) -> Tensor:
        return scores

    def gradient(self, dp: Tensor, p: Tensor, scores: Tensor, final: Rows, delta: Tensor) -> Tensor:
        return dp


class Retention:
    """Scores over max(sum |S|, 1)."""

    masked, state = 0.0, {"r": 0.0}

    def online(self, scores: Tensor, state: Rows) -> tuple[Tensor, Rows, float]:
        return scores, {"r": state["r"] + scores.abs().sum(-1, keepdim=True)}, 1.0

    def epilogue(self, out: Tensor, state: Rows) -> tuple[Tensor, Rows]:
        n = state["r"].clamp(min=1)
        return out / n, {"n": n, "over": (state["r"] > 1).to(out)}

    def normalised(self, scores: Tensor, final: Rows) -> Tensor:
        return scores / final["n"]

    def gradient(self, dp: Tensor, p: Tensor, scores: Tensor, final: Rows, delta: Tensor) -> Tensor:
        return (dp - delta * scores.sign() * final["over"]) / final["n"]


@dataclass(frozen=True, eq=False)
class AttentionEngine:
    """What `attention_engine` returns: call it with q (B, H, Lq, D), k, v (B, Hkv, Lk, ..) and the custom tensors by name."""

    definition: Definition
    device: str
    scale: float | None
    schedule: Schedule | None = None

    def prepared(self, q: Tensor, k: Tensor, v: Tensor, custom: dict[str, Tensor]) -> tuple[Tensor, Tensor, float]:
        missing = [name for name in self.definition.names if name not in custom]
        unknown = [name for name in custom if name not in self.definition.names]
        if missing or unknown:
            raise RegardError(
                f"custom tensors missing: {missing or 'none'}, unknown: {unknown or 'none'}; declared: {self.definition.names}"
            )
        return heads_of(k, q.shape[1]), heads_of(v, q.shape[1]), q.shape[-1] ** -0.5 if self.scale is None else self.scale

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **custom: Tensor) -> Tensor:
        k, v, scale = self.prepared(q, k, v, custom)
        chosen = self.schedule or schedules(DEVICES[self.device], q.shape[-1], v.shape[-1], q.element_size())[0]
        tiles = Tiles.of(self.definition, sizes_of(q, k, v), chosen, scale, q.device)
        return Online.apply(tiles, q, k, v, *[custom[name] for name in self.definition.names])  # type: ignore[no-any-return, no-untyped-call]

    def reference(self, q: Tensor, k: Tensor, v: Tensor, **custom: Tensor) -> Tensor:
        """One tile, plain autograd."""
        k, v, scale = self.prepared(q, k, v, custom)
        return whole(self.definition, sizes_of(q, k, v), q, k, v, scale, custom)

    def tuned(self, q: Tensor, k: Tensor, v: Tensor, candidates: int = 4, **custom: Tensor) -> AttentionEngine:
        """The same with the fastest of the first `candidates` schedules, measured on these tensors."""
        first = schedules(DEVICES[self.device], q.shape[-1], v.shape[-1], q.element_size())[:candidates]

        def run(schedule: Schedule) -> Tensor:
            return AttentionEngine(self.definition, self.device, self.scale, schedule)(q, k, v, **custom)

        return AttentionEngine(self.definition, self.device, self.scale, autotune(run, first))


@register("attention-engine", kind="function")
def attention_engine(
    score_mod: Callable[..., Tensor] | None = None,
    mask_mod: Mask | Callable[..., Tensor] | None = None,
    online_func: OnlineFunction | None = None,
    custom_inputs: tuple[str, ...] = (),
    *,
    scale: float | None = None,
    device: str = "cpu",
    schedule: Schedule | None = None,
) -> AttentionEngine:
    """score_mod(s, any of b, h, i, j and custom_inputs by name) -> s. mask_mod(b, h, i, j) -> bool. online_func: `Softmax()` unless given.

    scale: of q k^T (None: D^-1/2). device: whose tile table to use; schedule: a tile of your own."""
    if device not in DEVICES:
        raise RegardError(f"device={device!r}; expected one of {', '.join(DEVICES)}")
    return AttentionEngine(
        Definition(score_mod, as_mask(mask_mod), online_func or Softmax(), tuple(custom_inputs)), device, scale, schedule
    )


def linear_attention_engine(
    q_mod: Callable[..., Tensor] | None = None,
    k_mod: Callable[..., Tensor] | None = None,
    v_mod: Callable[..., Tensor] | None = None,
    decay_mod: Callable[..., Tensor] | None = None,
) -> Callable[..., Tensor]:
    """A function of q, k (B, H, L, D), v (B, H, L, Dv), decay and custom tensors: o_t = q'_t S_t, S_t = e^{g_t} S_{t-1} + k'_t v'_t.

    Each mod gets its tensor, and custom tensors by name; decay_mod gets `decay` and returns logs g (B, H, L), <= 0."""
    mechanism = Recurrent(decay="token", scaled=False, inputs=(Input("log_decay", "bhk"),))

    def run(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None, **custom: Any) -> Tensor:
        turned = [x if mod is None else call(mod, x, env=custom) for mod, x in ((q_mod, q), (k_mod, k), (v_mod, v))]
        g = torch.zeros(k.shape[:3], dtype=q.dtype, device=q.device) if decay is None else decay
        g = g if decay_mod is None or decay is None else call(decay_mod, g, env=custom)
        return attend(turned[0], turned[1], turned[2], mechanism, log_decay=g)

    return run
