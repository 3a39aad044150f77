"""NABLA's blocks in a line with sliding tiles, and ids of packed videos that half precision does not tell apart."""

from __future__ import annotations

import pytest
import torch

import regard


def heads(length: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(1, count, length, 8).to(dtype) for count in (4, 2, 2))


@pytest.mark.parametrize(("window", "reach"), [((1, 1, 1), 0), ((9, 9, 3), 1), ((1, 2, 5), 2)])
def test_tiles_slide_along_a_line_of_blocks(window: tuple[int, int, int], reach: int) -> None:
    q, k, v = heads(28)
    found = regard.attend(q, k, v, regard.get("nabla", patch=2, thr=0.3, tile_window=window))
    alone = regard.attend(q, k, v, regard.get("nabla", patch=2, thr=0.3))
    block = torch.arange(28) // 4
    near = (block[:, None] - block).abs() <= reach
    means = [x.unflatten(2, (7, 4)).mean(3) for x in (q, k.repeat_interleave(2, 1))]
    p = (means[0] @ means[1].mT / 8**0.5).softmax(-1)
    ordered, ranked = p.sort(-1)
    keep = torch.zeros_like(p, dtype=torch.bool).scatter(-1, ranked, ordered.cumsum(-1) >= 0.7)
    seen = keep.repeat_interleave(4, -2).repeat_interleave(4, -1)
    torch.testing.assert_close(alone, regard.attend(q, k, v, mask=seen))
    torch.testing.assert_close(found, regard.attend(q, k, v, mask=seen | near))


def test_ids_of_videos_are_whole_numbers() -> None:
    q, k, v = heads(32, torch.bfloat16)
    mechanism = regard.get("nabla", grid=(2, 4, 4), patch=2, thr=0.5)
    docs = torch.arange(32)[None] // 16
    small, large = (regard.attend(q, k, v, mechanism, docs=docs + first) for first in (0, 70000))
    assert torch.equal(small, large) and not torch.equal(small, regard.attend(q, k, v, mechanism))
    with pytest.raises(regard.RegardError, match="docs"):
        regard.attend(q, k, v, mechanism, docs=docs.float())
