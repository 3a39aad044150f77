"""How far gradients go back, layers without memory, and a chunk that is not full."""

from __future__ import annotations

import pytest
import torch

from regard.zoo.sparse.recurrent_memory_transformer import RecurrentMemoryBlock


@pytest.mark.parametrize("bptt", [1, 2, 3, None])
def test_gradients_go_back_to_the_last_cut(bptt: int | None) -> None:
    torch.manual_seed(0)
    layer = RecurrentMemoryBlock(8, 2, chunk=4, slots=4, bptt=bptt).double()
    x = torch.randn(1, 5 * 4 + 2, 8, dtype=torch.float64, requires_grad=True)  # the last chunk is not full
    y = layer(x)
    for late in range(6):
        slope = torch.autograd.grad(y[:, 4 * late : 4 * late + 4].square().sum(), x, retain_graph=True)[0]
        start = 0 if bptt is None else late // bptt * bptt  # chunks from here on are read with their gradients
        for early in range(6):
            felt = float(slope[:, 4 * early : 4 * early + 4].abs().max())
            assert (felt > 0) == (start <= early <= late), (late, early)
    plain = RecurrentMemoryBlock(8, 2, chunk=4, slots=4).double()
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(plain(x), y)


def test_without_slots_chunks_are_apart_and_nothing_is_remembered() -> None:
    layer, x = RecurrentMemoryBlock(8, 2, chunk=4, slots=0), torch.randn(2, 10, 8)
    y, memory = layer(x, return_memory=True)
    assert memory[0].shape == memory[1].shape == (2, 2, 0, 4)
    torch.testing.assert_close(layer(x[:, 4:8], first=4), y[:, 4:8])
    torch.testing.assert_close(layer.step(x)[0], y)


def test_a_chunk_that_is_not_full_is_not_written() -> None:
    layer, x = RecurrentMemoryBlock(8, 2, chunk=4, slots=3), torch.randn(2, 11, 8)
    full, more, none = (layer(x[:, :n], return_memory=True)[1] for n in (8, 11, 3))
    assert all(torch.equal(a, b) for a, b in zip(full, more, strict=True)) and not any(m.any() for m in none)
    assert not torch.equal(full[0], layer(x[:, :4], return_memory=True)[1][0])
