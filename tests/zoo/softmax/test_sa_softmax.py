"""Self-Adjust softmax: both variants and their constants, rows whose logits are all of one sign, masks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import regard


def row(s: Tensor, variant: str, c_num: float, c_den: float) -> Tensor:
    p = torch.exp(s) / torch.exp(s).sum()
    if variant == "v1":
        return s * p
    low, high = min(0.0, float(s.min())), max(0.0, float(s.max()))
    return p * (s - low + c_num) / (high - low + c_den)


@pytest.mark.parametrize(
    ("options", "variant", "c_num", "c_den"),
    [({}, "v2", 0.0, 1e-10), ({"c_num": 0.2, "c_den": 0.7}, "v2", 0.2, 0.7), ({"variant": "v1"}, "v1", 0.0, 0.0)],
)
@pytest.mark.parametrize("shift", [0.0, 9.0, -9.0, 300.0])  # the last cannot do without the row's maximum
def test_attention(options: dict[str, object], variant: str, c_num: float, c_den: float, shift: float) -> None:
    s, v = 2 * torch.randn(6, 6, dtype=torch.float64) + shift, torch.randn(1, 1, 6, 3, dtype=torch.float64)
    eye = torch.eye(6, dtype=torch.float64)[None, None]
    for causal in (False, True):
        want = torch.stack(
            [row(s[i, : i + 1 if causal else 6], variant, c_num, c_den) @ v[0, 0, : i + 1 if causal else 6] for i in range(6)]
        )
        found = regard.attend(
            s[None, None], eye, v, regard.get("sa-softmax", **options), scale=1.0, mask=regard.Causal() if causal else None
        )
        torch.testing.assert_close(found[0, 0], want)


def test_extremes_carry_gradients() -> None:
    s, eye = torch.randn(1, 1, 3, 6, dtype=torch.float64, requires_grad=True), torch.eye(6, dtype=torch.float64)[None, None]
    seed = torch.randn(3, 6, dtype=torch.float64)
    for variant in ("v1", "v2"):
        out = regard.attend(s, eye, eye, regard.get("sa-softmax", variant=variant), scale=1.0)
        p = s[0, 0].softmax(-1)
        low, high = s[0, 0].amin(-1, keepdim=True).clamp_max(0), s[0, 0].amax(-1, keepdim=True).clamp_min(0)
        want = s[0, 0] * p if variant == "v1" else p * (s[0, 0] - low) / (high - low + 1e-10)
        grads = [torch.autograd.grad((y * seed).sum(), s)[0] for y in (out[0, 0], want)]
        torch.testing.assert_close(*grads)


def test_says_what_is_wrong() -> None:
    with pytest.raises(regard.RegardError, match="v1 or v2"):
        regard.get("sa-softmax", variant="v3")
