"""MiniCPM-SALA's conversion and stages: what is copied, to the bit and in its type, and what each stage's optimiser is given."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.nn import Decoder
from regard.zoo.sparse import minicpm_sala as sala

CONFIG = sala.SALAConfig(
    vocab=9, dim=16, layers=4, heads=2, kv_heads=1, share=0.5, block_size=4, top_k=1, window=4, dense_len=4, kernel=2, stride=2
)


def dense() -> Decoder:
    torch.manual_seed(0)
    return Decoder("softmax", vocab=9, dim=16, layers=4, heads=2, kv_heads=1, rope=True).double()


def test_the_ends_stay_softmax() -> None:
    assert sala.softmax_layers(8, 0.1) == (0, 7) and sala.softmax_layers(2) == (0, 1) and sala.softmax_layers(9, 0.34) == (0, 4, 8)
    assert sala.softmax_layers(8, 0.1, [0.0] * 8) == (0, 7)
    assert sala.softmax_layers(8, 0.5, [9, 1, 5, 5, 7, 0, 1, 9]) == (0, 2, 4, 7)  # of equals the first


def test_a_conversion_copies_to_the_bit_in_double_precision() -> None:
    model, old = sala.convert(dense(), CONFIG), dense()
    kept = dict(old.named_parameters())
    for name, p in model.named_parameters():
        assert p.dtype == torch.float64
        if name in kept:
            assert torch.equal(p, kept[name]), name
        elif ".gate" in name:
            assert float(p.detach().abs().max()) == 0
    assert set(kept) <= {name for name, _ in model.named_parameters()}
    assert [type(b.mixer.mechanism).__name__ for b in model.blocks] == ["Weighted", "Recurrent", "Recurrent", "Weighted"]
    assert [b.mixer.rope is not None for b in model.blocks] == [False, True, True, False]
    assert {b.mixer.kv_heads for b in model.blocks} == {1}
    plain = sala.convert(dense(), CONFIG, (1, 2), plain=True)
    assert [b.mixer.gate is None for b in plain.blocks] == [False, True, True, False]
    built = sala.build_sala(CONFIG)
    assert [b.mixer.rope is not None for b in built.blocks] == [False, True, True, False] and len(built.blocks) == 4


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_stages_step_by_step(stage: int) -> None:
    """Three steps of a stage by hand: its loss, its parameters, its batches, and what the sparse layers read meanwhile."""
    teacher, asked = dense(), []

    def batches(name: str) -> object:
        def make(step: int) -> Tensor:
            asked.append((name, step))
            return torch.randint(9, (2, 12), generator=torch.Generator().manual_seed(step))

        return make

    model, other = sala.convert(teacher, CONFIG), sala.convert(teacher, CONFIG)
    steps = tuple(3 * (at == stage) for at in range(3))
    log = sala.train_stages(model, teacher, batches("usual"), steps, 0.01, long=batches("long"))
    assert asked == [("long" if stage == 2 else "usual", step) for step in range(3)]
    moved = [p for n in (1, 2) for p in other.blocks[n].mixer.parameters()] if stage == 0 else list(other.parameters())
    optimizer = torch.optim.AdamW(moved, lr=0.01)
    for step in range(3):
        tokens = torch.randint(9, (2, 12), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        if stage == 2:
            loss = F.cross_entropy(other(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        else:
            with sala.reading_all(other):
                loss = (sala.align_loss, sala.distil_loss)[stage](other, teacher, tokens)
        loss.backward()
        optimizer.step()
        assert log[("align", "distil", "long")[stage]][step] == pytest.approx(float(loss.detach()))
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_without_long_batches_there_are_two_stages() -> None:
    model = sala.convert(dense(), CONFIG)
    log = sala.train_stages(model, dense(), lambda step: torch.zeros(1, 6, dtype=torch.long), (1, 0))
    assert {name: len(losses) for name, losses in log.items()} == {"align": 1, "distil": 0}
