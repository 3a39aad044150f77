"""Checks of sparse-attention-decomposition."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from regard import taps
from regard.interpret.stream import parts_of
from regard.interpret.weights import HeadWeights, head_weights
from regard.lab import naive
from regard.lab.checks.shared.bare import Bare
from regard.lab.checks.shared.byhand import rotary
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.decoding import llama
from regard.lab.verification import check
from regard.zoo.analysis.sparse_attention_decomposition import omega_svd, removed, score_components, sparse_set, trace


def drawn(seed: int = 0) -> HeadWeights:
    generator = torch.Generator().manual_seed(seed)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64) * 64**-0.5

    return HeadWeights(
        made(2, 64, 16), made(2, 16), made(2, 64, 16), made(2, 16), made(2, 64, 16), made(2, 16), made(2, 16, 64), made(64), 0.25
    )


@check(
    "sparse-attention-decomposition",
    "terms add up to (x W_Q + b_Q).(x' W_K + b_K); Omega written out has these triplets and rank 16",
    below=1e-12,
    control="without the bias rows",
)
def _() -> tuple[float, float]:
    w, gaps, bare = drawn(), [], []
    for head in range(2):
        found = omega_svd(w, head)
        whole = torch.zeros(65, 65, dtype=F64)
        whole[:64, :64], whole[:64, 64] = w.wq[head] @ w.wk[head].T, w.wq[head] @ w.bk[head]
        whole[64, :64], whole[64, 64] = w.bq[head] @ w.wk[head].T, w.bq[head] @ w.bk[head]
        gaps += [naive.gap(found.u @ torch.diag(found.s) @ found.v.T, whole), naive.gap(found.s, torch.linalg.svdvals(whole)[:16])]
        gaps += [naive.gap(found.u.T @ found.u, torch.eye(16, dtype=F64)), float(torch.linalg.svdvals(whole)[16])]
        for _ in range(6):
            a, b = torch.randn(2, 64, dtype=F64)
            truth = (a @ w.wq[head] + w.bq[head]) @ (b @ w.wk[head] + w.bk[head])
            terms = score_components(found, a, b)
            gaps.append(naive.gap(terms.sum(), truth))
            bare.append(naive.gap((found.u[:64].T @ a * found.s * (found.v[:64].T @ b)).sum(), truth))
    return max(gaps), max(bare)


@check(
    "sparse-attention-decomposition",
    "6 planted along the directions 1 and 4: share of the score left without the sparse set (which must be these two)",
    below=0.05,
    control="two other directions taken away",
)
def _() -> tuple[float, float]:
    w = drawn()
    found = omega_svd(w, 0)
    generator = torch.Generator().manual_seed(3)
    dst, src = (0.3 * torch.randn(64, generator=generator, dtype=F64) for _ in range(2))
    for k in (1, 4):
        dst, src = dst + 6 * found.u[:64, k], src + 6 * found.v[:64, k]
    terms = score_components(found, dst, src)
    used = sparse_set(terms)

    def left(basis: list[int]) -> float:
        x = torch.cat((dst, torch.ones(1, dtype=F64)))
        x = x - found.u[:, basis] @ (found.u[:, basis].T @ x)
        return abs(float((x @ found.u * found.s * (found.v.T @ torch.cat((src, torch.ones(1, dtype=F64))))).sum() / terms.sum()))

    negative = sparse_set(torch.tensor([3.0, -1.0, -9.0, -4.0]), 0.9)
    counted = (
        used.sort().values.tolist() == [1, 4]
        and negative.tolist() == [2, 3]
        and sparse_set(torch.tensor([5.0, 3.0, 1.0]), 0.7).tolist() == [0, 1]
    )
    counted = counted and len(sparse_set(torch.tensor([5.0, 3.0]), 1.0)) == 2 and len(sparse_set(torch.tensor([5.0, 3.0, -1.0]), 0.99)) == 2
    return left(used.tolist()) if counted else 1.0, left([0, 9])


def wired(norm: bool) -> tuple[Bare, Tensor]:
    """Layer 0: head 1 looks from token 2 at 1 and writes a mark there; head 2 looks from the last at 3 and writes another; layer 1's head 0 looks
    from the last token at 2 by both marks."""
    torch.manual_seed(0)
    model = Bare(vocab=12, dim=32, heads=4, norm=norm, bias=True).to(F64)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.05)
        model.embed.weight[:, :12] += torch.eye(12, dtype=F64)
        if norm:
            for block in model.blocks:
                block.norm1.weight.fill_(1.0)  # type: ignore[union-attr, operator]
        first, second = model.layer(0), model.layer(1)
        gain = 12.0 if not norm else 3.0
        for head, (dst, src, mark) in {1: (2, 1, 20), 2: (7, 3, 21)}.items():
            at = 8 * head
            first.q.weight[at, dst], first.k.weight[at, src] = gain, gain
            first.v.weight[at, src], first.out.weight[mark, at] = 1.0 if not norm else 0.3, 4.0
        second.q.weight[0, 21], second.k.weight[0, 20] = 2.0, 2.0
    return model, torch.tensor([[5, 1, 2, 3, 9, 8, 6, 7]])


@check(
    "sparse-attention-decomposition",
    "hand-wired paths, without and with LayerNorm: top senders of both sides that are not the head that wrote the mark, weights against loops",
    below=1e-8,
    control="the sides taken for one another",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    wrong, swapped = 0.0, 0.0
    for norm in (False, True):
        model, ids = wired(norm)
        found = trace(model, ids, 1, 0, 7, 2)
        best = {side: next(e for e in found.edges if e.side == side) for side in ("src", "dst")}
        wrong += (best["src"].sender, best["src"].token) != ((0, 1), 2)
        wrong += (best["dst"].sender, best["dst"].token) != ((0, 2), 7)
        swapped += best["src"].sender != (0, 2)
        with taps.read(model, ["residual_in", "heads", "weights"]) as seen:
            model(ids)
        stream, z = seen["residual_in", 1][0], seen["heads", 0][0]
        w = head_weights(taps.sites(model)[1])
        directions = omega_svd(w, 0)
        x = model.blocks[1].norm1(stream)  # type: ignore[union-attr, operator]
        for e in best.values():
            head = e.sender[1]
            out = model.layer(0).out.weight[:, 8 * head : 8 * head + 8] @ z[head, e.token]
            if norm:
                out = (out - out.mean()) / (stream[e.token].var(correction=0) + 1e-5).sqrt()
            one = torch.ones(1, dtype=F64)
            truth = 0.0
            for k in e.used:
                sign = torch.sign(torch.cat((x[7], one)) @ directions.u[:, k])
                read = directions.u[:, k] if e.side == "dst" else directions.v[:, k]
                truth += float(sign * directions.s[k].sqrt() * (read @ torch.cat((out, one))))
            wrong += abs(e.weight - truth)
        graph = found.graph()
        wrong += graph.number_of_edges() != len(found.edges)
    return wrong, swapped


@check(
    "sparse-attention-decomposition",
    "hand-wired paths: the head's weight on its source without the directions used, at the key, and in the sending head's part alone",
    below=0.3,
    control="without as many others",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    model, ids = wired(False)
    used = trace(model, ids, 1, 0, 7, 2).edges[0].used
    others = [k for k in range(8) if k not in used][: len(used)]

    def weight(chosen: list[int], side: str, sender: tuple[int, int] | None) -> float:
        with removed(model, ids, 1, 0, chosen, side, 7, 2, sender), taps.read(model, "weights", layers=[1]) as seen:
            model(ids)
        return float(seen["weights", 1][0, 0, 7, 2])

    ways = (("src", None), ("dst", None), ("src", (0, 1)), ("dst", (0, 2)))
    return max(weight(list(used), *way) for way in ways), min(weight(others, *way) for way in ways)


@check(
    "sparse-attention-decomposition",
    "a Llama with grouped heads, every pair of all heads: terms of the Omega turned by the distance add up to the score, which rotary "
    "positions make; without the sparse set's terms the head's score is what is left of it",
    below=1e-6,
    control="Omega not turned",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    torch.manual_seed(0)
    model, ids = llama(layers=2), torch.randint(50, (1, 7))
    parts, off, still = parts_of(model, ids, turned=True), [], []
    with taps.read(model, "logits") as seen:
        model(ids)
    for layer, h, i in itertools.product(range(2), range(4), range(7)):
        part, found = parts[layer], seen["logits", layer][0, h, i]
        for j in range(i + 1):
            turned, plain = (omega_svd(part.weights, h, t) for t in ((part.turns[i], part.turns[j]), None))  # type: ignore[index]
            score = score_components(turned, part.x[i], part.x[j])
            off.append(abs(float(score.sum() * 8**-0.5 - found[j])) / (1 + abs(float(found[j]))))
            still.append(abs(float(score_components(plain, part.x[i], part.x[j]).sum() * 8**-0.5 - found[j])) / (1 + abs(float(found[j]))))
    places = rotary(torch.eye(8, dtype=F64)[:, None].expand(-1, 7, -1), torch.arange(7)).transpose(0, 1)
    off.append(naive.gap(parts[1].turns, places))  # type: ignore[arg-type]
    for (i, j), side in itertools.product(((6, 2), (5, 5)), ("dst", "src")):
        terms = score_components(omega_svd(parts[1].weights, 2, (parts[1].turns[i], parts[1].turns[j])), parts[1].x[i], parts[1].x[j])  # type: ignore[index]
        used = sparse_set(terms).tolist()
        with removed(model, ids, 1, 2, used, side, i, j), taps.read(model, "logits", layers=[1]) as cut:
            model(ids)
        left = float((terms.sum() - terms[used].sum()) * 8**-0.5)
        off.append(abs(float(cut["logits", 1][0, 2, i, j]) - left) / (1 + abs(left)))
    return max(off), max(still)
