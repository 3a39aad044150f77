"""Checks of circuit-reuse."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.interpret import activation_patch, logit_difference, path_patch
from regard.lab import naive
from regard.lab.checks.shared.bare import Bare
from regard.lab.checks.shared.comparing import F64
from regard.lab.verification import check
from regard.nn.attention import Attention
from regard.taps import read
from regard.tasks.prompts import colored_objects, indirect_object
from regard.zoo.analysis.circuit_reuse import circuit_overlap, direct_attribution, find_circuit, repair


def bare() -> tuple[Bare, Tensor, Tensor, Tensor]:
    model = Bare().to(F64)
    for at in range(2):
        model.layer(at).q.weight.data.mul_(2)
    prompts = indirect_object(6, 12, torch.Generator().manual_seed(0))
    return model, prompts.clean, prompts.corrupt, prompts.answers


@check(
    "circuit-reuse",
    "no norms: direct effect of each head is <(z_corrupt - z_clean) W_O, W_U[a] - W_U[b]>; all heads together give the corrupt run's metric; 0 if alike",
    below=1e-10,
    control="activation patching, nothing held",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    model, clean, corrupt, answers = bare()
    metric = logit_difference(answers)
    found, whole = path_patch(model, clean, corrupt, metric).scores, []
    zs = []
    for ids in (clean, corrupt):
        with read(model, "heads") as seen:
            whole.append(float(metric(model(ids))))
        zs.append(seen.stack("heads")[:, :, :, -1])
    unembed = model.out.weight[answers[:, 0]] - model.out.weight[answers[:, 1]]
    truth = torch.zeros(2, 4, dtype=F64)
    for layer in range(2):
        for head in range(4):
            moved = (zs[1] - zs[0])[layer, :, head] @ model.layer(layer).out.weight[:, 6 * head : 6 * head + 6].T
            truth[layer, head] = (moved * unembed).sum(-1).mean() / (whole[1] - whole[0])
    everything = [(layer, head) for layer in range(2) for head in range(4)]
    group = path_patch(model, clean, corrupt, metric, senders=[everything]).scores
    again = path_patch(model, clean, corrupt, metric, senders=[(0, 1)]).scores
    with read(model, "heads") as seen:
        model(clean)
    own = direct_attribution(model, seen, unembed).scores
    with read(model, "heads") as seen:
        model(corrupt)
    moved = (direct_attribution(model, seen, unembed).scores - own) / (whole[1] - whole[0])
    gaps = [
        naive.gap(found, truth),
        naive.gap(group, torch.ones(2, 4, dtype=F64)),
        naive.gap(again[0, 1], truth[0, 1]),
        naive.gap(moved, truth),
    ]
    return max(gaps), naive.gap(activation_patch(model, clean, corrupt, metric, position=-1).scores, truth)


@check(
    "circuit-reuse",
    "effects through a later head's q, k, v and z at all tokens: equal two passes written out; heads of its layer have none",
    below=1e-10,
    control="activation patching, nothing held",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    model, clean, corrupt, answers = bare()
    metric, places = logit_difference(answers), list(range(clean.shape[1]))

    def streams(ids: Tensor) -> list[Tensor]:
        x = model.embed(ids) + model.place[: ids.shape[1]]
        return [x, model.blocks[0](x)]

    def z_of(layer: Attention, x: Tensor, replaced: dict[str, Tensor], head: int) -> Tensor:
        """(B, L, 4, 6); some of one head's q, k, v or z replaced."""
        parts = {name: getattr(layer, name)(x).unflatten(-1, (4, 6)).clone() for name in "qkv"}
        for name, new in replaced.items():
            if name != "z":
                parts[name][:, :, head] = new
        s = torch.einsum("bihd,bjhd->bhij", parts["q"], parts["k"]) * 6**-0.5
        p = s.masked_fill(torch.ones(s.shape[-2:]).triu(1).bool(), -torch.inf).softmax(-1)
        z = torch.einsum("bhij,bjhd->bihd", p, parts["v"])
        if "z" in replaced:
            z[:, :, head] = replaced["z"]
        return z

    clean_z, corrupt_z = (z_of(model.layer(0), streams(ids)[0], {}, 0) for ids in (clean, corrupt))
    base, other = (float(metric(model(ids))) for ids in (clean, corrupt))
    start, behind = streams(clean)
    gaps, plain = [], []
    for component in "qkvz":
        found = path_patch(model, clean, corrupt, metric, receivers=[(1, 2)], component=component, position=places).scores
        for sender in range(4):
            mixed = clean_z.clone()
            mixed[:, :, sender] = corrupt_z[:, :, sender]
            came = start + model.layer(0).out(mixed.flatten(-2))
            if component == "z":
                new = z_of(model.layer(1), came, {}, 2)[:, :, 2]
            else:
                new = getattr(model.layer(1), component)(came).unflatten(-1, (4, 6))[:, :, 2]
            x = behind + model.layer(1).out(z_of(model.layer(1), behind, {component: new}, 2).flatten(-2))
            gaps.append(abs(float(found[0, sender]) - (float(metric(model.out(x))) - base) / (other - base)))
        gaps.append(float(found[1].nan_to_num().abs().max()))
        plain.append(naive.gap(activation_patch(model, clean, corrupt, metric).scores[0], found[0]))
    return max(gaps), min(plain)


C = 6


def movers() -> Bare:
    """Tokens: 0 begin, 1 .. 6 candidates, 7 filler, 8 the question. Layer 1's head 0 moves whichever candidates it sees, unless layer 0's head 0,
    which by itself looks at the beginning, has told the question which token not to move."""
    model = Bare(vocab=9, dim=32, heads=2, length=12).to(F64)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        for token in range(1, C + 1):
            model.embed.weight[token, token - 1] = 1.0
            model.embed.weight[token, C] = 1.0  # "is a candidate"
            model.out.weight[token, 20 + token - 1] = 1.0
        model.embed.weight[0, C + 1] = model.embed.weight[8, C + 2] = 1.0
        inhibit, move = model.layer(0), model.layer(1)
        inhibit.q.weight[0, C + 2], inhibit.k.weight[0, C + 1] = 40.0, 40.0
        for layer, target in ((inhibit, 10), (move, 20)):
            for c in range(C):
                layer.v.weight[c, c] = 1.0
                layer.out.weight[target + c, c] = 1.0
        move.q.weight[15, C + 2], move.k.weight[15, C] = 40.0, 1.0
        for c in range(C):
            move.q.weight[c, 10 + c], move.k.weight[c, c] = -40.0, 1.0
    return model


@check(
    "circuit-reuse",
    "hand-wired movers that pick either of two candidates: accuracy with the silent inhibition head made to look at the wrong one",
    above=0.9,
    control="another head made to look there",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    model, generator = movers(), torch.Generator().manual_seed(0)
    pairs = torch.stack([1 + torch.randperm(C, generator=generator)[:2] for _ in range(64)])
    ids = torch.full((64, 6), 7)
    ids[:, 0], ids[:, -1], ids[:, 1:3] = 0, 8, pairs
    right = torch.rand(64, generator=generator) < 0.5
    wrong_at = torch.where(right, 2, 1)[:, None]
    answers = pairs.gather(1, 2 - wrong_at)[:, 0]

    def accuracy() -> float:
        return float((model(ids)[:, -1].argmax(-1) == answers).double().mean())

    plain, found = accuracy(), []
    for head in ((0, 0), (0, 1)):
        with repair(model, {head: wrong_at}):
            found.append(accuracy())
    with repair(model, {(1, 0): torch.cat((wrong_at, wrong_at * 0), 1)}), read(model, "weights", layers=[1]) as seen:
        model(ids)
    split = float((seen["weights", 1][:, 0, -1].gather(1, wrong_at) - 0.5).abs().max()) + float(
        (seen["weights", 1][:, 0, -1, 0] - 0.5).abs().max()
    )
    return found[0] if 0.3 < plain < 0.7 and split < 1e-6 else 0.0, found[1]


@check(
    "circuit-reuse",
    "circuits of the hand-wired model: heads missing or too many, from the logits and from the mover's queries",
    below=0,
    control="with the inhibition head never looking at a candidate",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    model, generator = movers(), torch.Generator().manual_seed(0)
    pairs = torch.stack([1 + torch.randperm(C, generator=generator)[:2] for _ in range(32)])
    clean, corrupt = torch.full((32, 6), 7), torch.full((32, 6), 7)
    for ids, order in ((clean, [0, 1]), (corrupt, [1, 0])):
        ids[:, 0], ids[:, -1], ids[:, 1:3] = 0, 8, pairs[:, order]
    metric = logit_difference(pairs)

    def mistakes() -> int:
        circuit = find_circuit(model, clean, corrupt, metric, threshold=0.2, components=["q"])
        return len(set(circuit.roles["logits"]) ^ {(1, 0)}) + len(set(circuit.roles.get("q of logits", [])) ^ {(0, 0)})

    blind = model.layer(0).q.weight.clone()
    model.layer(0).k.weight[0] = 0
    model.place[1, 30] = 1.0  # the inhibition head looks at the first place, where the runs have different candidates
    model.layer(0).k.weight[0, 30] = 40.0
    own = mistakes()
    model.layer(0).k.weight[0] = 0
    model.layer(0).k.weight[0, C + 1] = 40.0
    model.layer(1).k.weight[15, 30] = 1.0  # the mover prefers the first place by itself
    assert torch.equal(blind, model.layer(0).q.weight)
    return own, mistakes()


@check("circuit-reuse", "prompts: answers by reading them; overlap of circuits by counting", below=0, control="the corrupt prompts read")
def _() -> tuple[float, float]:
    ioi, colored = (
        make(200, *sizes, torch.Generator().manual_seed(1)) for make, sizes in ((indirect_object, (9,)), (colored_objects, (5, 6)))
    )  # type: ignore[operator]

    def wrong(corrupt: bool) -> int:
        bad = 0
        for row, (io, s) in zip((ioi.corrupt if corrupt else ioi.clean).tolist(), ioi.answers.tolist(), strict=True):
            names = [x for x in row if x >= 8]
            bad += [x for x in names if names.count(x) == 2] != [s, s] or [x for x in names if names.count(x) == 1] != [io]
        for row, (right, other) in zip((colored.corrupt if corrupt else colored.clean).tolist(), colored.answers.tolist(), strict=True):
            items = {row[3 + 3 * n]: row[2 + 3 * n] for n in range(3)}
            bad += len(items) != 3 or items[row[-2]] != right or other not in items.values() or other == right
        return bad

    found = circuit_overlap([(0, 1), (1, 2), (2, 3)], [(1, 2), (2, 3), (3, 3), (4, 0)])
    same = (found.union, found.first, found.second) == (2 / 5, 2 / 3, 1 / 2)
    alike = bool((ioi.clean != ioi.corrupt).sum(1).eq(1).all()) and bool((colored.clean != colored.corrupt).sum(1).eq(1).all())
    return wrong(False) if same and alike else 1, wrong(True)
