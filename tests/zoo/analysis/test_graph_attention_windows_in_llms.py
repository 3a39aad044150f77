"""Graph windows: what the checks cannot hold."""

import pytest
import torch

import regard
from regard.interpret import graph_attention_report, graph_window
from regard.tasks.ego_graphs import FAR, ego_graphs, hop_distance, perturb
from regard.zoo.analysis.graph_attention_windows_in_llms import WindowedDecoder, attention_shift

# The centre 4 joins 0 and 1; 0 joins 2 and 1 joins 3.
EDGES, TOKENS, AT = torch.tensor([[4, 0], [1, 4], [0, 2], [3, 1]]), torch.tensor([10, 11, 12, 13, 14]), torch.tensor([1, 2, 3, 4, 5])


def generator():
    return torch.Generator().manual_seed(0)


def pairs(edges):
    return {frozenset(e) for e in edges.tolist()}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: graph_window([EDGES], [AT], 5), "rising places"),
        (lambda: graph_window([EDGES], [AT.flip(0)], 8), "rising places"),
        (lambda: graph_window([EDGES], [AT[:4]], 8), "edges"),
        (lambda: graph_window([EDGES], [AT], 8, 0), "k=0"),
        (lambda: graph_window([EDGES], [AT], 8, last="free"), "last='free'"),
        (lambda: graph_window([EDGES], [AT, AT], 8), "1 graphs"),
        (lambda: graph_window([EDGES], [AT], 8, keep=torch.ones(1, 7).bool()), "keep"),
        (lambda: graph_attention_report([torch.ones(2, 1, 8, 8)], [EDGES], [AT]), "attns"),
        (lambda: perturb(EDGES, TOKENS, "swapped", generator()), "swapped"),
        (lambda: perturb(EDGES, TOKENS, "replace", generator()), "pool"),
        (lambda: perturb(EDGES[:2], TOKENS, "second", generator()), "0 second hops"),
        (lambda: perturb(EDGES[:1], TOKENS, "swap", generator()), "1 neighbours"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(regard.RegardError, match=message):
        call()


def test_no_path_is_farther_than_any_window():
    hops = hop_distance(torch.tensor([[0, 1]]), 3)
    assert hops.tolist() == [[0, 1, FAR], [1, 0, FAR], [FAR, FAR, 0]]
    assert not graph_window([torch.zeros(0, 2).long()], [torch.tensor([1, 2])], 3, 9, last="window")[0, 0, 2, 1]


def test_the_mask_to_add_says_what_is_hidden_by_what():
    keep = torch.ones(1, 8).bool()
    keep[0, 7] = False
    seen = graph_window([EDGES], [AT], 8, 1, keep=keep)
    added = graph_window([EDGES], [AT], 8, 1, keep=keep, low=-6000.0)
    assert torch.equal(added == 0, seen) and added[0, 0, 1, 2] == -6000 and added[0, 0, 3, 2] == -6000
    least = torch.finfo(torch.float32).min
    assert added[0, 0, 0, 1] == least and added[0, 0, 7, 7] == least and added[0, 0, 1, 7] == least


def test_perturbed_graphs():
    swapped, tokens = perturb(EDGES, TOKENS, "swap", generator())
    assert pairs(swapped) == pairs(torch.tensor([[4, 0], [1, 4], [1, 2], [3, 0]])) and torch.equal(tokens, TOKENS)
    across, _ = perturb(EDGES, TOKENS, "across", generator())
    assert sorted(hop_distance(across, 5)[-1].tolist()) == [0, 1, 1, 2, 2] and pairs(across) != pairs(EDGES)
    assert (hop_distance(across, 5)[-1] != hop_distance(EDGES, 5)[-1]).sum() == 2
    found = {tuple(perturb(EDGES, TOKENS, "second", torch.Generator().manual_seed(s))[0].flatten().tolist()) for s in range(9)}
    assert found == {(4, 0, 1, 4, 0, 2, 3, 1), (4, 0, 1, 4, 0, 3, 2, 1)}
    edges, tokens = perturb(EDGES, TOKENS, "replace", generator(), share=0.5, pool=torch.tensor([99]))
    assert (tokens == 99).sum() == 2 and tokens[-1] == 14 and torch.equal(edges, EDGES)
    _, tokens = perturb(EDGES, TOKENS, "shuffle", generator())
    assert sorted(tokens.tolist()) == TOKENS.tolist() and tokens[-1] == 14 and not torch.equal(tokens, TOKENS)


def test_labels_are_of_the_neighbours():
    edges, ids, labels = ego_graphs(30, generator(), 3, 4, classes=3)
    for e, row, label in zip(edges, ids, labels, strict=True):
        hops = hop_distance(e, 8)[-1]
        counts = torch.bincount(row[1:-2][hops[:-1] == 1], minlength=3)
        assert (hops == 1).sum() == 3 and (hops == 2).sum() == 4 and counts[label] == counts.max() and row[-2:].tolist() == [4, 5]


def test_the_report_of_two_examples_plots():
    attention = torch.rand(2, 2, 8, 8).softmax(-1)
    found = graph_attention_report([attention], [EDGES, EDGES[:2]], [AT, AT])
    assert found.rings.shape == (1, 2, 5) and bool(found.rings[..., :3].isfinite().all()) and bool(found.rings[..., 3:].isnan().all())
    assert "<svg" in found.plot()
    shuffled = attention[..., torch.randperm(8, generator=generator())]
    assert bool((attention_shift([attention], [shuffled], [AT, AT]) > 0).all())


def test_the_report_and_the_shift_by_hand():
    attention = [torch.rand(2, 3, 8, 8).softmax(-1) for _ in range(2)]
    edges, nodes = [EDGES, EDGES[:2]], [AT, AT]
    found = graph_attention_report(attention, edges, nodes)
    for layer in range(2):
        for head in range(3):
            kept = {name: [] for name in ("text", "node", "sink", "corr")}
            rings = {r: [] for r in range(5)}
            for b in range(2):
                w, hops, at = attention[layer][b, head], hop_distance(edges[b], 5), AT.tolist()
                kept["text"].append(sum(float(w[i, j]) for i in range(6, 8) for j in at) / 2)
                kept["node"].append(sum(float(w[i, j]) for i in at for j in at) / 5)
                kept["sink"].append(sum(float(w[i, 0]) for i in at) / 5)
                pairs = [(float(w[at[i], at[j]]), float(hops[i, j] == 1)) for i in range(5) for j in range(5) if i != j]
                kept["corr"].append(float(torch.corrcoef(torch.tensor(pairs).T)[0, 1]))
                for r in range(5):
                    ring = [float(w[at[-1], at[j]]) for j in range(5) if hops[-1, j] == r]
                    rings[r] += [sum(ring) / len(ring)] if ring else []
            for name, own in (
                ("text", found.text_to_node),
                ("node", found.node_to_node),
                ("sink", found.sink),
                ("corr", found.correlation),
            ):
                assert float(own[layer, head]) == pytest.approx(sum(kept[name]) / 2, abs=1e-5)
            for r, own in rings.items():
                value = float(found.rings[layer, head, r])
                assert value == pytest.approx(sum(own) / len(own), abs=1e-6) if own else value != value
    changed = [torch.rand(2, 3, 8, 8).softmax(-1) for _ in range(2)]
    shift = attention_shift(attention, changed, nodes)
    for layer in range(2):
        for head in range(3):
            total = 0.0
            for b in range(2):
                p, q = (x[layer][b, head, 5, 1:6] for x in (attention, changed))
                p, q = p / p.sum(), q / q.sum()
                m = (p + q) / 2
                total += float((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2
            assert float(shift[layer, head]) == pytest.approx(total / 2, abs=1e-6)


def test_windows_with_every_option_by_hand():
    hops = hop_distance(EDGES, 5)
    for k in (1, 2, None):
        for both in (True, False):
            for last in ("causal", "window"):
                mask = graph_window([EDGES], [AT], 8, k, bidirectional=both, last=last)[0, 0]
                for i in range(8):
                    for j in range(8):
                        if 1 <= i <= 5 and 1 <= j <= 5:
                            a, b = i - 1, j - 1
                            near = k is None or int(hops[a, b]) <= k
                            if last == "causal" and k is not None:
                                near = True if a == 4 else int(hops[a, b]) <= 1 if b == 4 else near
                            truth = near and (both or j <= i)
                        else:
                            truth = j <= i
                        assert bool(mask[i, j]) == truth


def test_the_decoder_by_its_sizes():
    torch.manual_seed(0)
    model = WindowedDecoder(9, 3, dim=16, heads=2, layers=3, length=20)
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    ids = torch.randint(9, (2, 6))
    x = model.embed.weight[ids] + model.place[:6]
    for block in model.blocks:
        x = block(x, mask=mask)
    last = torch.nn.functional.layer_norm(x[:, -1], (16,), model.norm.weight, model.norm.bias)
    assert torch.allclose(model(ids, mask), last @ model.out.weight.T + model.out.bias, atol=1e-6) and len(model.blocks) == 3
    assert (
        abs(float(model.place.std()) / 0.02 - 1) < 0.15
        and WindowedDecoder(5, 2).place.shape == (32, 32)
        and len(WindowedDecoder(5, 2).blocks) == 2
    )
    assert any(getattr(m, "out_features", 0) == 32 for m in model.blocks[0].modules())  # 2 dim within
