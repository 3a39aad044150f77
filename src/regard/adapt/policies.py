"""Policies in a patched model: its rotary positions taken back where they are applied too early, and what a policy cannot run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra import Rope
from ..engine.policy import Policy
from ..errors import RegardError
from .call import Call


def check_policy(policy: Policy, module: nn.Module, when: str, heads: Iterable[int] | None, given: dict[str, Any]) -> None:
    """Raise where a patch could not run the policy; tell it the model's rotary positions."""
    name = type(policy).__name__
    if when != "prefill" or heads is not None or given:
        raise RegardError(f"{name} runs whole prompts in all heads; expected when='prefill' and neither heads nor inputs")
    if not policy.rotated:
        policy.rope = rope_of(module.config, name)


def rope_of(config: Any, name: str) -> Rope:
    """The plain rotary positions of a model."""
    found = getattr(config, "rope_parameters", None) or {}
    if found.get("rope_type") != "default" or found.get("partial_rotary_factor", 1.0) != 1.0:
        raise RegardError(f"{name} moves keys to other positions; expected a model with plain rotary positions, not {found or 'none'}")
    return Rope(base=float(found["rope_theta"]))


def run_policy(policy: Policy, layer: int, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    name, sight, scale = type(policy).__name__, call.sight(True), call.scale
    if not sight.plain or not sight.causal or q.shape[2] != sight.k_len:
        raise RegardError(f"{name} runs whole causal prompts: expected no padding, and no cache before the prompt")
    for what, there in (("softcap", call.softcap), ("sinks", call.sinks), ("position_bias", call.bias(sight)), ("dropout", call.dropout)):
        if isinstance(there, Tensor) or there:
            raise RegardError(f"{name} runs plain softmax; the model's attention has {what}")
    k, v = k[:, :, : sight.k_len], v[:, :, : sight.k_len]
    if scale is not None and not math.isclose(scale, q.shape[-1] ** -0.5, rel_tol=1e-6):
        raise RegardError(f"{name} scales scores by head_dim^-1/2; the model's scale is {scale}")
    if not policy.rotated:
        back = -torch.arange(q.shape[2], device=q.device)
        q, k = policy.rope.rotate(q, back), policy.rope.rotate(k, back)
    return policy.prompt(layer, q, k, v)
