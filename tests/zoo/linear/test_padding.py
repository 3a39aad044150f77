"""What stands in padding reaches no real token: recurrences in both directions, and causal ones with padding on the left."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import regard
from regard import Causal, Padding

OPTIONS: dict[str, dict[str, Any]] = {
    "based": {},
    "cosformer": {"horizon": 40.0},
    "efficient-attention": {},
    "fast-attention": {},
    "flatten": {},
    "flowformer": {},
    "galerkin": {},
    "hedgehog": {},
    "inline-attention": {},
    "l2vit": {},
    "lightnet": {},
    "lln-attention": {},
    "mala": {},
    "nalaformer": {},
    "performer": {"features": 16},
    "rala": {},
    "slab": {},
    "transnormer": {},
}
BOTH_WAYS_ALONE = {"lln-attention": {"statistics": "given"}, "flowformer": {"causal": True}, "rala": None}


def qkv(length: int) -> list[torch.Tensor]:
    return [torch.randn(2, 2, length, 8, dtype=torch.float64) for _ in range(3)]


@pytest.mark.parametrize("junk", [3.0, float("nan")])
@pytest.mark.parametrize("slug", OPTIONS)
def test_padding_on_the_right(slug: str, junk: float) -> None:
    torch.manual_seed(0)
    mechanism, real = regard.get(slug, **OPTIONS[slug]), qkv(11)
    padded = [torch.cat((x, torch.full((2, 2, 4, 8), junk, dtype=torch.float64)), 2) for x in real]
    keep = (torch.arange(15) < 11).expand(2, -1)
    out = regard.attend(*padded, mechanism, mask=Padding(), keep=keep)
    torch.testing.assert_close(out[:, :, :11], regard.attend(*real, mechanism), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("junk", [3.0, float("nan")])
@pytest.mark.parametrize("slug", [slug for slug in OPTIONS if BOTH_WAYS_ALONE.get(slug, {}) is not None])
def test_causal_padding_on_the_left(slug: str, junk: float) -> None:
    torch.manual_seed(0)
    mechanism, real = regard.get(slug, **{**OPTIONS[slug], **(BOTH_WAYS_ALONE.get(slug) or {})}), qkv(11)
    padded = [torch.cat((torch.full((2, 2, 4, 8), junk, dtype=torch.float64), x), 2) for x in real]
    keep = (torch.arange(15) >= 4).expand(2, -1)
    out = regard.attend(*padded, mechanism, mask=Causal() & Padding(), keep=keep)
    torch.testing.assert_close(out[:, :, 4:], regard.attend(*real, mechanism, mask=Causal()), rtol=1e-10, atol=1e-10)
