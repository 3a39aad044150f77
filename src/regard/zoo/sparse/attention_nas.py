"""Efficient attention by architecture search: softmax and linear attention mixed under a budget of FLOPs (id 37; Liu et al., 2022).

super-net trained one random architecture a step; ranker from pairs scored with inherited weights; evolution: max f, FLOPs <= budget
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.search.ranker import PairwiseRanker
from regard.search.space import Arch, Space, flops
from regard.search.supernet import SuperNet

Batch = Callable[[int], tuple[Tensor, Tensor]]  # step -> tokens (B, L), labels (B, L); -100: nothing asked


def evolve(
    space: Space, fitness: Callable[[Arch], float], budget: float, length: int, *, population: int = 32, rounds: int = 20, seed: int = 0,
    mutation: float = 0.15,
) -> Arch:  # fmt: skip
    """The fittest architecture found with flops(arch, length) <= budget."""
    draw = random.Random(seed)

    def affordable(make: Callable[[], Arch]) -> Arch | None:
        for _ in range(200):
            one = make()
            if flops(one, length) <= budget:
                return one
        return None

    found = {one for one in (affordable(lambda: space.sample(draw)) for _ in range(population)) if one is not None}
    if not found:
        raise RegardError(f"budget={budget:g} FLOPs: no architecture of the space fits; the cheapest drawn need more")
    for _ in range(rounds):
        best = sorted(found, key=fitness, reverse=True)[: max(2, population // 4)]
        fresh = [affordable(lambda: space.mutate(draw.choice(best), draw, mutation)) for _ in range(population // 2)]  # noqa: B023
        fresh += [affordable(lambda: space.cross(draw.choice(best), draw.choice(best), draw)) for _ in range(population // 2)]  # noqa: B023
        found = {*best, *[one for one in fresh if one is not None]}
    return max(found, key=fitness)


@dataclass(frozen=True)
class SearchResult:
    """best: the architecture found. cost: its FLOPs. accuracy: after training from scratch; baselines: of all-one-kind nets of its sizes."""

    best: Arch
    cost: float
    accuracy: float
    baselines: dict[str, float]


def accuracy(net: SuperNet, arch: Arch, batch: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        guess, labels = net(batch[0], arch).argmax(-1), batch[1]
    asked = labels != -100
    return float((guess[asked] == labels[asked]).float().mean())


def train(net: SuperNet, batches: Batch, steps: int, choose: Callable[[], Arch], lr: float = 3e-3) -> None:
    """One architecture a step."""
    optimizer = torch.optim.AdamW(net.parameters(), lr)
    for step in range(steps):
        tokens, labels = batches(step)
        loss = F.cross_entropy(net(tokens, choose()).flatten(0, 1), labels.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


@register("attention-nas", kind="function")
def attention_search(
    space: Space, batches: Batch, vocab: int, outputs: int, length: int, budget: float, *, steps: int = 300, scored: int = 24,
    final_steps: int = 300, seed: int = 0, lr: float = 3e-3,
) -> SearchResult:  # fmt: skip
    """Trains a super-net on `batches`, learns to rank `scored` architectures by held-out accuracy with inherited weights, searches under the
    budget, and trains the winner and its single-kind versions from scratch. lr: of all trainings."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    net = SuperNet(space, vocab, outputs, length)
    train(net, batches, steps, lambda: space.sample(draw), lr)
    held_out = batches(-1)
    archs = [space.sample(draw) for _ in range(scored)]
    values = [accuracy(net, one, held_out) for one in archs]
    features = torch.tensor([space.features(one) for one in archs])
    pairs = [(a, b) for a in range(scored) for b in range(scored) if values[a] > values[b]]
    ranker = PairwiseRanker(features.shape[1])
    if pairs:
        ranker.fit(features, pairs)

    def fitness(arch: Arch) -> float:
        with torch.no_grad():
            return float(ranker(torch.tensor(space.features(arch))))

    best = evolve(space, fitness, budget, length, seed=seed)

    def scratch(arch: Arch) -> float:
        torch.manual_seed(seed)
        own = net.standalone(arch)
        fresh = SuperNet(own.space, vocab, outputs, length)
        train(fresh, batches, final_steps, lambda: arch, lr)
        return accuracy(fresh, arch, held_out)

    single = {kind: Arch(best.dim, tuple(replace(one, attention=kind) for one in best.layers)) for kind in space.attentions}
    return SearchResult(best, flops(best, length), scratch(best), {kind: scratch(arch) for kind, arch in single.items()})
