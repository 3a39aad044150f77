"""Rows of padded batches and packed documents: whatever chooses by blocks, ranks or places gives each what it gives it alone."""

from __future__ import annotations

import pytest
import torch
from samples import SMALL

import regard
from regard import Causal, Padding, RegardError, Segments, Weighted, Window
from regard.engine.alone import counts_places

ROW = 46
LEFT, RIGHT = [(7, 46), (0, 46)], [(0, 39), (0, 21)]
DOCUMENTS = [[(0, 3), (3, 26), (26, 46)], [(0, 46)]]
WHOLE_ROWS = {"levels": "psa", "docs": "nabla"}  # inputs that describe whole rows


def named():
    """Every registered mechanism whose reading depends on where its sequence starts."""
    for name in regard.names():
        try:
            mechanism = regard.get(name, **SMALL.get(name, {}))
        except (RegardError, TypeError):  # layers, policies and experiments
            continue
        if isinstance(mechanism, regard.algebra.Mechanism) and counts_places(mechanism):
            yield name


NAMES = [*named(), "spargeattn causal", "psa causal", "hyperattention causal"]


def made(name):
    slug, _, causal = name.partition(" ")
    options = SMALL.get(slug, {})
    mechanism = regard.get(slug, **options, **({"causal": True} if causal and slug != "hyperattention" else {}))
    return mechanism, mechanism.causal_only or bool(causal) or getattr(mechanism, "under", "") == "causal" or looks_causal(mechanism)


def looks_causal(mechanism):
    return isinstance(mechanism, Weighted) and mechanism.mask.causal


def tensors(length=ROW, batch=2):
    torch.manual_seed(0)
    q, k, v = (torch.randn(batch, h, length, 8, dtype=torch.float64) for h in (4, 2, 2))
    return q, k, v


def inputs_of(mechanism):
    torch.manual_seed(1)
    return {"centroids": torch.randn(4, 3, 8, dtype=torch.float64)} if any(i.name == "centroids" for i in mechanism.declared) else {}


def alone(mechanism, causal, q, k, v, spans):
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    for row, mine in enumerate(spans):
        for a, b in mine:
            parts = [x[row : row + 1, :, a:b] for x in (q, k, v)]
            out[row, :, a:b] = regard.attend(*parts, mechanism, mask=Causal() if causal else None, **inputs_of(mechanism))[0]
    return out


def marked(spans):
    """Which document each token is of, -1 at padding."""
    ids = torch.full((len(spans), ROW), -1)
    for row, mine in enumerate(spans):
        for number, (a, b) in enumerate(mine):
            ids[row, a:b] = number
    return ids


def forms(ids, causal):
    """The same sequences as masks of regard, as a table, and as a function that reads a table."""
    table = (ids[:, :, None] == ids[:, None]) & (ids[:, None] >= 0)
    table = table.tril() if causal else table
    start = Causal() if causal else regard.algebra.Full()
    packed = bool((ids.amax(-1) > 0).any())
    yield "named", start & (Segments() if packed else Padding()), {"segments": ids} if packed else {"keep": ids >= 0}
    yield "table", table[:, None], {}
    if not packed:  # as models write it: padded queries see the real tokens
        shown = (ids >= 0)[:, None, None].expand(-1, 1, ROW, -1)
        yield "table of keys", shown.tril() if causal else shown, {}


@pytest.mark.parametrize("spans", [[[s] for s in LEFT], [[s] for s in RIGHT], DOCUMENTS], ids=["left", "right", "packed"])
@pytest.mark.parametrize("name", NAMES)
def test_equal_to_the_row_alone(name, spans):
    mechanism, causal = made(name)
    q, k, v = (x.requires_grad_() for x in tensors())
    truth = alone(mechanism, causal, q, k, v, spans)
    pull = torch.randn_like(truth)
    wanted = torch.autograd.grad(truth, (q, k, v), pull)
    ids = marked(spans)
    real = (ids >= 0)[:, None, :, None]
    for form, mask, inputs in forms(ids, causal):
        for executor in (None, "reference") if form == "named" else (None,):
            out = regard.attend(q, k, v, mechanism, mask=mask, executor=executor, **inputs, **inputs_of(mechanism))
            assert torch.allclose(out, torch.where(real, truth, out), atol=1e-10), (form, executor)
            if executor is None and form == "named":
                found = torch.autograd.grad(out, (q, k, v), torch.where(real, pull, 0.0))
                for one, other in zip(found, wanted, strict=True):
                    assert torch.allclose(one, other, atol=1e-10), form


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WHOLE_ROWS.values()])
def test_padding_reaches_nothing(name):
    mechanism, causal = made(name)
    q, k, v = tensors()
    ids = marked([[s] for s in LEFT])
    hidden = (ids < 0)[:, None, :, None]
    outs = []
    for fill in (0.0, float("nan")):
        parts = [x.masked_fill(hidden, fill) for x in (q, k, v)]
        outs.append(
            regard.attend(*parts, mechanism, mask=Causal() & Padding() if causal else Padding(), keep=ids >= 0, **inputs_of(mechanism))
        )
    for out in outs[1:]:
        assert torch.equal(out, outs[0])


@pytest.mark.parametrize(
    "name", ["moba", "dhsa", "hip", "flexprefill", "spargeattn causal", "proxyattn", "powerattention", "delta-attention"]
)
def test_a_token_after_a_padded_prompt(name):
    """Keys in a cache, padded on the left, and room that is not filled yet."""
    mechanism, _ = made(name)
    q, k, v = tensors()
    truth = torch.cat(
        [regard.attend(q[r : r + 1, :, -1:], *(x[r : r + 1, :, a:] for x in (k, v)), mechanism) for r, (a, _) in enumerate(LEFT)]
    )
    keep = marked([[s] for s in LEFT]) >= 0
    out = regard.attend(q[:, :, -1:], k, v, mechanism, mask=Causal() & Padding(), keep=keep)
    assert torch.allclose(out, truth, atol=1e-10)
    room = [torch.cat((x, torch.full_like(x, 7.0)), 2) for x in (k, v)]
    wide = torch.cat((keep, torch.zeros_like(keep)), 1)
    assert torch.allclose(regard.attend(q[:, :, -1:], *room, mechanism, mask=wide[:, None, None]), truth, atol=1e-10)


def test_a_stream_of_padded_rows():
    mechanism, _ = made("moba")
    q, k, v = tensors()
    truth = alone(mechanism, True, q, k, v, [[s] for s in LEFT])
    keep, state, outs = marked([[s] for s in LEFT]) >= 0, None, []
    for start, stop in ((0, 20), (20, 21), (21, 40), (40, ROW)):
        out, state = regard.step(*(x[:, :, start:stop] for x in (q, k, v)), mechanism, state, mask=Padding(), keep=keep[:, :stop])
        outs.append(out)
    assert torch.allclose(torch.cat(outs, 2), truth, atol=1e-10)


@pytest.mark.parametrize("window", [5, 20])
def test_a_stream_under_a_window_keeps_its_blocks(window):
    mechanism, _ = made("moba")
    q, k, v = tensors()
    full = regard.attend(q, k, v, mechanism, mask=Causal() & Window(window))
    state, outs = None, []
    for t in range(ROW):
        out, state = regard.step(*(x[:, :, t : t + 1] for x in (q, k, v)), mechanism, state, mask=Window(window))
        outs.append(out)
    assert torch.allclose(torch.cat(outs, 2), full, atol=1e-10)


def test_what_remains_of_the_mask_holds_inside_a_sequence():
    """moba written out in loops: documents, a window, and a function of absolute places."""
    mechanism, _ = made("moba")  # blocks of 8, two a query
    q, k, v = tensors(batch=1)
    ids = torch.tensor([[0] * 17 + [1] * 29])

    def odd(b, h, i, j):
        return (j % 5 != 1) | (i == j)

    out = regard.attend(q, k, v, mechanism, mask=Causal() & Segments() & Window(21) & regard.algebra.Where(odd), segments=ids)
    for h in range(4):
        for i in range(ROW):
            start = 0 if i < 17 else 17
            own = (i - start) // 8
            gate = [float(q[0, h, i] @ k[0, h // 2, start + 8 * c : start + 8 * c + 8].mean(0)) for c in range(own)]
            read = {own, *sorted(range(own), key=lambda c: -gate[c])[:1]}
            js = [j for j in range(start, i + 1) if (j - start) // 8 in read and i - j < 21 and (j % 5 != 1 or i == j)]
            p = (k[0, h // 2, js] @ q[0, h, i] * 8**-0.5).softmax(0)
            assert torch.allclose(out[0, h, i], p @ v[0, h // 2, js], atol=1e-12)


def test_what_cannot_be_divided_is_refused():
    q, k, v = tensors(batch=1)
    with pytest.raises(RegardError, match="in one piece"):
        regard.attend(q, k, v, made("moba")[0], mask=Causal() & Padding(), keep=(torch.arange(ROW) % 3 > 0)[None])
    with pytest.raises(RegardError, match="in one piece"):
        regard.attend(q, k, v, made("moba")[0], mask=Causal() & Segments(), segments=(torch.arange(ROW) // 9 % 2)[None])
    with pytest.raises(RegardError, match="'docs'"):
        regard.attend(
            q, k, v, made("nabla")[0], mask=Padding(), keep=(torch.arange(ROW) > 5)[None], docs=torch.zeros(1, ROW, dtype=torch.long)
        )


def test_tables_that_are_no_padding_hide_pairs_only():
    """A table with holes says nothing about sequences: blocks are chosen as without it."""
    mechanism, _ = made("moba")
    q, k, v = tensors(batch=1)
    torch.manual_seed(5)
    table = torch.rand(1, 1, ROW, ROW) < 0.7
    out = regard.attend(q, k, v, mechanism, mask=table)
    for h in range(4):
        for i in range(ROW):
            own = i // 8
            gate = [float(q[0, h, i] @ k[0, h // 2, 8 * c : 8 * c + 8].mean(0)) for c in range(own)]
            read = {own, *sorted(range(own), key=lambda c: -gate[c])[:1]}
            js = [j for j in range(i + 1) if j // 8 in read and bool(table[0, 0, i, j])]
            wanted = (k[0, h // 2, js] @ q[0, h, i] * 8**-0.5).softmax(0) @ v[0, h // 2, js] if js else torch.zeros(8, dtype=q.dtype)
            assert torch.allclose(out[0, h, i], wanted, atol=1e-12)
