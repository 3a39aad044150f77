"""Signed weights: gradients by hand, scores of zero, models that keep softmax at their ends."""

from __future__ import annotations

import pytest
import torch

import regard
from regard.tasks.statistics import negative_mass


@pytest.mark.parametrize("executor", ["tiled", "reference"])
def test_gradients(executor: str) -> None:
    """dA_i / ds_j = sign_i sign_j a_i (delta_ij - a_j) with a = softmax|s|."""
    s, eye = 2 * torch.randn(1, 1, 3, 6, dtype=torch.float64), torch.eye(6, dtype=torch.float64)[None, None]
    leaf = s.clone().requires_grad_()
    seed = torch.randn(3, 6, dtype=torch.float64)
    out = regard.attend(leaf, eye, eye, "cog-attention", scale=1.0, executor=executor)
    (grad,) = torch.autograd.grad((out[0, 0] * seed).sum(), leaf)
    a, sign = s[0, 0].abs().softmax(-1), s[0, 0].sign()
    torch.testing.assert_close(out[0, 0], sign * a)
    want = torch.zeros(3, 6, dtype=torch.float64)
    for row in range(3):
        for j in range(6):
            want[row, j] = sum(seed[row, i] * sign[row, i] * sign[row, j] * a[row, i] * (float(i == j) - a[row, j]) for i in range(6))
    torch.testing.assert_close(grad[0, 0], want)
    assert negative_mass(out) == pytest.approx(float((a * (sign < 0)).sum()) / 3)


def test_large_scores_of_either_sign_stay_finite() -> None:
    s, eye = torch.tensor([[[[-900.0, 899.0, 0.0]]]], dtype=torch.float64), torch.eye(3, dtype=torch.float64)[None, None]
    a = torch.tensor([0.0, -1.0], dtype=torch.float64).softmax(0).tolist()
    found = regard.attend(s, eye, eye, "cog-attention", scale=1.0)[0, 0, 0].tolist()
    assert found == pytest.approx([-a[0], a[1], 0.0])


def test_a_model_keeps_softmax_in_its_first_and_last_layer() -> None:
    model = regard.nn.Decoder(["softmax", *["cog-attention"] * 2, "softmax"], layers=4, vocab=9, dim=8, heads=2)
    assert [block.mixer.mechanism == regard.get("softmax") for block in model.blocks] == [True, False, False, True]
    assert bool(model(torch.randint(9, (1, 5))).isfinite().all())
