"""Layers that work through long sequences a piece at a time: lengths above a piece are those of steps, which cut elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from regard.zoo.sparse.alternating_sparse_attention import GlobalLatentAttention
from regard.zoo.sparse.hyperattention import whole
from regard.zoo.sparse.landmark_attention import LandmarkAttention
from regard.zoo.sparse.superlinear_attention import SuperlinearAttention

LAYERS: dict[str, tuple[Callable[[], Any], int, int]] = {  # layer, tokens, tokens a step
    "alternating-sparse-attention": (lambda: GlobalLatentAttention(8, 2, size=4, stride=2, block_size=8, top_k=3), 300, 150),
    "landmark-attention": (lambda: LandmarkAttention(8, 2, block=15), 530, 265),
    "superlinear-attention": (lambda: SuperlinearAttention(8, 2, skip=1), 300, 100),
}


@pytest.mark.parametrize("slug", LAYERS)
def test_pieces_are_one_sequence(slug: str) -> None:
    torch.manual_seed(0)
    make, length, size = LAYERS[slug]
    layer, x = make().double().eval(), torch.randn(1, length, 8, dtype=torch.float64)
    with torch.no_grad():
        outs, state = [], None
        for part in x.split(size, 1):
            out, state = layer.step(part, state)
            outs.append(out)
        torch.testing.assert_close(layer(x), torch.cat(outs, 1))


def test_landmark_attention_of_named_places_in_pieces() -> None:
    torch.manual_seed(0)
    layer, x = LandmarkAttention(8, 2, block=15).double(), torch.randn(1, 530, 8, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, (torch.arange(530) % 16 == 15)[None]), layer(x))


@pytest.mark.parametrize("causal", [False, True])
def test_hyperattention_exact_rows_in_pieces(causal: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, n, 4, dtype=torch.float64, requires_grad=True) for n in (2060, 2070, 2070))
    out, lse = whole(q, k, v, causal)
    s = q @ k.mT
    s = s.masked_fill(torch.arange(2070) > torch.arange(10, 2070)[:, None], -torch.inf) if causal else s
    torch.testing.assert_close(out, s.softmax(-1) @ v)
    torch.testing.assert_close(lse, s.logsumexp(-1, keepdim=True))
