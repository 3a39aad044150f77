"""Entries that go one a step: what stays, where it stands and what was noted of it, by loops; the order of the text where it is asked for."""

import pytest
import torch

from regard.cache.layer import KeptLayer, rows_at
from regard.cache.policies import note
from regard.cache.policy import newest
from regard.cache.view import View

B, H, L, D, PROMPT = 3, 2, 40, 4, 12
PADS = (0, 7, 3)


def view_of(layer, n):
    part = layer.parts[0]
    return View(0, 1, False, layer.prompt, part, torch.randn(B, H, 1, n, D), 0.5, None, layer.memory)


@pytest.mark.parametrize("budgets", [(8, 8, 8), (9, 3, 5), (30, 30, 30)])
def test_what_stays_step_by_step(budgets):
    torch.manual_seed(0)
    k, v, worth = torch.randn(B, H, L, D), torch.randn(B, H, L, D), torch.randint(0, 6, (B, H, L)).float()  # many ties
    there = torch.arange(L) >= torch.tensor(PADS)[:, None]
    counts = torch.tensor(budgets)[:, None].expand(B, H)
    layer, at = KeptLayer(), 0
    kept = [[[] for _ in range(H)] for _ in range(B)]
    for n in (PROMPT, *[1] * 15, 3, *[1] * 10):
        layer.update(k[:, :, at : at + n], v[:, :, at : at + n])
        layer.take(None if at >= max(PADS) and n == 1 else there[:, at : at + n])
        if n == 3:
            assert all(part.ordered for part in layer.parts)
        (part,) = layer.parts
        view = view_of(layer, n)
        note(view, "place", part.places.float() if at == 0 else torch.where(part.places >= at, part.places, 0).float())
        for b in range(B):
            for h in range(H):
                kept[b][h] += [t for t in range(at, at + n) if there[b, t]]
                for count in (1, 3):
                    seen = newest(view, count)[b, h]
                    assert sorted(part.places[b, h, seen].tolist()) == kept[b][h][-count:]
        each = newest(view, torch.tensor([2, 0, 50]))
        assert all(sorted(part.places[b, 0, each[b, 0]].tolist()) == kept[b][0][-size or L :] for b, size in enumerate((2, 0, 50)))
        scores = worth.gather(2, part.places)
        layer.keep(0, counts, scores)
        at += n
        for b in range(B):
            for h in range(H):
                best = sorted(kept[b][h], key=lambda t: (-float(worth[b, h, t]), t))[: budgets[b]]
                kept[b][h] = sorted(best)
        (part,) = layer.parts
        assert part.places.shape[2] <= max(max(budgets), PROMPT) + (0 if n == 1 else 3)
        for b in range(B):
            for h in range(H):
                own = part.alive[b, h]
                places = part.places[b, h, own]
                assert sorted(places.tolist()) == kept[b][h], (at, b, h)
                assert torch.equal(part.keys[b, h, own], k[b, h, places]) and torch.equal(part.values[b, h, own], v[b, h, places])
                assert torch.equal(part.notes["place"][b, h, own], places.float())
        assert part.everything() == bool(part.alive.all())


def test_a_step_moves_one_entry_and_no_more():
    torch.manual_seed(0)
    layer = KeptLayer()
    for n in (PROMPT, 1, 1):
        layer.update(*(torch.randn(1, H, n, D) for _ in range(2)))
        layer.take(None)
        layer.keep(0, torch.full((1, H), 8), torch.rand(1, H, layer.parts[0].places.shape[2]))
    before = layer.parts[0].keys
    layer.update(*(torch.randn(1, H, 1, D) for _ in range(2)))
    layer.take(None)
    layer.keep(0, torch.full((1, H), 8), torch.arange(9.0).expand(1, H, 9))
    assert layer.parts[0].keys.data_ptr() == before.data_ptr() and not layer.parts[0].ordered
    assert layer.parts[0].keys.untyped_storage().nbytes() <= H * (8 + 1 + 32) * D * 4
    ordered = layer.parts[0].in_order()
    assert ordered.ordered and bool((ordered.places.diff(dim=2) > 0).all()) and torch.equal(ordered.in_order().places, ordered.places)


@pytest.mark.parametrize("layout", ["whole", "with room", "turned", "learning"])
def test_rows_are_those_that_gather_gives(layout):
    x = torch.randn(2, 3, 9, 4)
    if layout == "with room":
        x = torch.randn(2, 3, 15, 4)[:, :, :9]
    if layout == "turned":
        x = torch.randn(2, 9, 3, 4).transpose(1, 2)
    if layout == "learning":
        x.requires_grad_()
    index = torch.randint(0, 9, (2, 3, 6))
    found = rows_at(x, index)
    assert torch.equal(found, x.gather(2, index[..., None].expand(-1, -1, -1, 4)))
    if layout == "learning":
        found.sum().backward()
        assert x.grad.sum() == found.numel()
