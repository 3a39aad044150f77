"""Searches, tuners and trainings of sparse rows, step by step: what they draw, measure and move, against counts and loops by hand."""

from __future__ import annotations

import copy
import math
import random
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regard import RegardError
from regard.algebra.select import Chosen
from regard.nn import Decoder
from regard.search.space import Arch, Space, flops
from regard.search.supernet import SuperNet
from regard.zoo.sparse import attention_nas, dbsa, spargeattn
from regard.zoo.sparse import flux_attention as flux
from regard.zoo.sparse import minicpm_sala as sala
from regard.zoo.sparse.attention_nas import accuracy, attention_search, evolve, train
from regard.zoo.sparse.dbsa import BM25, many_shot_task
from regard.zoo.sparse.hylra import ReusedIndices, ReusePlan
from regard.zoo.sparse.hyperattention import hyper_attention, spectral_parameters
from regard.zoo.sparse.psa import psa_plan, similarity_cap

SPACE = Space(("softmax", "cosformer"), (1, 2), (16,), (2,), (16, 32))


@dataclass(frozen=True)
class Counted(Space):
    """A space that writes down what is asked of it."""

    log: list[tuple[str, Any]] = field(default_factory=list, compare=False)

    def sample(self, draw: random.Random) -> Arch:
        self.log.append(("sample", None))
        return super().sample(draw)

    def mutate(self, arch: Arch, draw: random.Random, p: float = 0.15) -> Arch:
        self.log.append(("mutate", (arch, p)))
        return super().mutate(arch, draw, p)

    def cross(self, a: Arch, b: Arch, draw: random.Random) -> Arch:
        self.log.append(("cross", (a, b)))
        return super().cross(a, b, draw)


def cost(arch: Arch) -> float:
    return flops(arch, 10)


def test_attention_nas_draws_half_a_population_each_way_from_the_best_quarter() -> None:
    space = Counted(dims=(32, 64))
    found = evolve(space, cost, math.inf, 10, population=12, rounds=3, mutation=0.3)
    kinds = [kind for kind, _ in space.log]
    assert [kinds.count(kind) for kind in ("sample", "mutate", "cross")] == [12, 18, 18]
    assert kinds[12:24] == ["mutate"] * 6 + ["cross"] * 6
    assert {what[1] for kind, what in space.log if kind == "mutate"} == {0.3}
    for start in (12, 24, 36):  # a round's parents are the best quarter, 3 of 12
        parents = {arch for kind, what in space.log[start : start + 12] for arch in (what[:1] if kind == "mutate" else what)}
        assert len(parents) == 3 and all(cost(arch) <= cost(found) for arch in parents)
    two = Counted(dims=(32, 64))
    evolve(two, cost, math.inf, 10, population=4, rounds=1)
    parents = {arch for kind, what in two.log[4:] for arch in (what[:1] if kind == "mutate" else what)}
    assert len(parents) == 2  # never fewer than two


def test_attention_nas_keeps_to_its_budget_and_says_where_there_is_none() -> None:
    cheapest = min(SPACE.every(), key=cost)
    assert evolve(SPACE, cost, cost(cheapest), 10, population=8, rounds=2) == cheapest  # what costs the budget is within it
    with pytest.raises(RegardError, match="no architecture of the space fits"):
        evolve(SPACE, cost, 0.5 * cost(cheapest), 10, population=4, rounds=1)
    assert evolve(SPACE, cost, math.inf, 10, seed=3) == evolve(SPACE, cost, math.inf, 10, seed=3)


def test_attention_nas_accuracy_is_of_what_is_asked() -> None:
    torch.manual_seed(0)
    net, arch = SuperNet(SPACE, 5, 4, 6), SPACE.sample(random.Random(0))
    tokens = torch.randint(5, (3, 6))
    with torch.no_grad():
        guess = net(tokens, arch).argmax(-1)
    labels = torch.full_like(guess, -100)
    labels[0, :3], labels[1, 0] = guess[0, :3], (guess[1, 0] + 1) % 4
    assert accuracy(net, arch, (tokens, labels)) == 0.75


def batches(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step % 7)
    tokens = torch.randint(5, (4, 6), generator=generator)
    labels = (tokens + 1) % 4
    labels[:, 0] = -100
    return tokens, labels


def test_attention_nas_trains_one_architecture_a_step_by_adamw() -> None:
    torch.manual_seed(0)
    net = SuperNet(SPACE, 5, 4, 6)
    other, archs = copy.deepcopy(net), [SPACE.sample(random.Random(n)) for n in range(3)]
    drawn = iter(archs)
    train(net, batches, 3, lambda: next(drawn), 0.02)
    optimizer = torch.optim.AdamW(other.parameters(), lr=0.02)
    for step, arch in enumerate(archs):
        tokens, labels = batches(step)
        logits = other(tokens, arch).log_softmax(-1)
        asked = labels != -100
        loss = -logits[asked].gather(-1, labels[asked][:, None]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_attention_nas_result_is_trained_anew_beside_nets_of_one_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    best, asked = next(arch for arch in SPACE.every() if len({one.attention for one in arch.layers}) == 2), {}

    def found_at_once(space: Space, fitness: Any, budget: float, length: int, **options: Any) -> Arch:
        asked.update(options, space=space, budget=budget, length=length, fitness=fitness(best))
        return best

    monkeypatch.setattr(attention_nas, "evolve", found_at_once)
    found = attention_search(SPACE, batches, 5, 4, 6, 1e6, steps=2, scored=3, final_steps=5, seed=2, lr=0.01)
    assert isinstance(asked.pop("fitness"), float) and asked == {"space": SPACE, "budget": 1e6, "length": 6, "seed": 2}
    assert found.best == best and found.cost == flops(best, 6)
    held_out = batches(-1)

    def scratch(arch: Arch) -> float:
        """A net that has this architecture alone, from the seed on."""
        space = SuperNet(SPACE, 5, 4, 6).standalone(arch).space
        torch.manual_seed(2)
        SuperNet(space, 5, 4, 6)  # draws as much as the slices that are copied into it
        own = SuperNet(space, 5, 4, 6)
        train(own, batches, 5, lambda: arch, 0.01)
        return accuracy(own, arch, held_out)

    kinds = {kind: Arch(found.best.dim, tuple(replace(x, attention=kind) for x in found.best.layers)) for kind in SPACE.attentions}
    assert found.accuracy == pytest.approx(scratch(found.best)) and set(found.baselines) == {"softmax", "cosformer"}
    assert found.baselines == pytest.approx({kind: scratch(arch) for kind, arch in kinds.items()})


def test_flux_attention_routers_are_trained_as_by_hand() -> None:
    """Routers and multipliers alone, at rates of their own; temperatures, warm targets and the language loss beside the penalty."""

    def made() -> tuple[Decoder, flux.SparsityController]:
        torch.manual_seed(0)
        model = flux.flux_model(Decoder("softmax", vocab=9, dim=8, layers=2, heads=2, rope=True), sinks=1, window=3, ends=2)
        return model, flux.SparsityController({"a": 0.25, "b": 1.0})

    torch.manual_seed(1)
    data = [(torch.randint(9, (2, 8)), ["a", "b"]), (torch.randint(9, (3, 8)), ["b", "b", "a"])]
    for lm in (0.5, 0.0):
        model, controller = made()
        before = {name: p.clone() for name, p in model.named_parameters()}
        torch.manual_seed(2)
        losses = flux.train_router(model, data, controller, 3, lr=0.01, controller_lr=0.1, lm_weight=lm)
        assert not model.training and all(torch.equal(p, before[name]) for name, p in model.named_parameters() if "router" not in name)
        other, lam = made()
        other.train()
        routers = [p for name, p in other.named_parameters() if "router" in name]
        optimizers = torch.optim.Adam(routers, 0.01), torch.optim.Adam(lam.parameters(), 0.1)
        torch.manual_seed(2)
        for step in range(3):
            tokens, tasks = data[step % 2]
            for layer in flux.flux_layers(other):
                layer.tau = 0.3 + 0.7 * (1 + math.cos(math.pi * step / 3)) / 2
            logits = other(tokens[:, :-1])
            s = 1 - sum(layer.z for layer in flux.flux_layers(other)) / 2
            loss = lam(s, tasks, (5 / 3, 1, 1)[step] if step else 1.0)
            if lm:
                loss = loss + lm * F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            assert losses[step] == pytest.approx(float(loss.detach()), rel=1e-5)
        for a, b in zip((*model.parameters(), *controller.parameters()), (*other.parameters(), *lam.parameters()), strict=True):
            torch.testing.assert_close(a, b)


def test_flux_attention_targets_warm_up_over_the_first_fifth() -> None:
    seen: list[float] = []

    class Watched(flux.SparsityController):
        def forward(self, s: Tensor, tasks: list[str], warm: float = 1.0) -> Tensor:
            seen.append(warm)
            return super().forward(s, tasks, warm)

    model = flux.flux_model(Decoder("softmax", vocab=9, dim=8, layers=1, heads=1), sinks=1, window=3, ends=2)
    flux.train_router(model, [(torch.randint(9, (1, 5)), ["a"])], Watched({"a": 0.5}), 10)
    assert seen == pytest.approx([0.5] + [1.0] * 9)
    assert [layer.tau for layer in flux.flux_layers(model)] == pytest.approx([flux.temperature(9, 10)])


def test_minicpm_sala_stages_move_their_parameters_by_their_rate() -> None:
    """AdamW's first step moves each parameter that has a gradient by the rate, and decays it by a hundredth of that."""
    config = sala.SALAConfig(
        vocab=9, dim=16, layers=3, heads=2, kv_heads=2, share=0.67, block_size=4, top_k=1, window=4, dense_len=4, kernel=2, stride=2
    )
    torch.manual_seed(0)
    dense = Decoder("softmax", vocab=9, dim=16, layers=3, heads=2, rope=True)
    tokens = torch.randint(9, (2, 12))
    for stage, moved in enumerate((("blocks.1.mixer",), ("",), ("",))):
        model = sala.convert(dense, config)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        steps = tuple(int(at == stage) for at in range(3))
        log = sala.train_stages(model, dense, lambda n: tokens, steps, 0.01, long=lambda n: tokens)
        assert [len(log[name]) for name in ("align", "distil", "long")] == list(steps)
        for name, p in model.named_parameters():
            apart = (p.detach() - before[name] * (1 - 1e-4)).abs() if name.startswith(moved) else (p.detach() - before[name]).abs()
            if name.startswith(moved):
                assert (
                    float(apart.max()) == pytest.approx(0.01, rel=0.01)
                    or float(apart.max()) < 1e-4 * float(before[name].abs().max()) + 1e-9
                ), name
            else:
                assert float(apart.max()) == 0, name


def test_dbsa_words_are_lower_case_and_constants_are_okapis() -> None:
    texts = ["A b  b\tC", "b d", "e e E f g h"]
    for k1, b in ((1.5, 0.75), (0.5, 0.2)):
        index = BM25(texts, k1, b)
        for query in ("B c", "e z e"):
            truth = []
            for text in texts:
                words, total = text.lower().split(), 0.0
                for word in query.lower().split():
                    holding = sum(word in other.lower().split() for other in texts)
                    idf = math.log(1 + (3 - holding + 0.5) / (holding + 0.5))
                    f = words.count(word)
                    total += idf * f * (k1 + 1) / (f + k1 * (1 - b + b * len(words) / (12 / 3)))
                truth.append(total)
            assert index.scores(query) == pytest.approx(truth)


def test_dbsa_many_shot_task_is_answered_by_its_demonstrations() -> None:
    task = many_shot_task(3, 4, 2, 5, 6, generator=torch.Generator().manual_seed(0))
    assert (
        len(task.groups) == len(task.texts) == 3
        and {len(group) for group in task.groups} == {12}
        and task.labels.tolist() == list(range(5))
    )
    shown = {tuple(row[:2].tolist()): int(row[2]) for group in task.groups for row in group.view(4, 3)}
    assert len(shown) == 12 and all(min(words) >= 5 and max(words) < 29 and 0 <= label < 5 for words, label in shown.items())
    assert len({word for words in shown for word in words}) == 24
    assert len(task.queries) == 6
    for tokens, text, truth in task.queries:
        assert shown[tuple(tokens.tolist())] == truth and text == " ".join(f"w{x}" for x in tokens.tolist())
        assert sum(text in other for other in task.texts) == 1


def test_dbsa_scores_of_one_text_and_of_none_that_holds_a_word() -> None:
    assert BM25(["a b a"]).scores("a")[0] == pytest.approx(math.log(1 + 0.5 / 1.5) * 2 * 2.5 / (2 + 1.5))
    assert BM25(["", ""]).scores("a b") == [0.0, 0.0]


def test_dbsa_many_shot_task_comes_from_its_generator_alone() -> None:
    one = many_shot_task(generator=torch.Generator().manual_seed(3))
    torch.manual_seed(99)
    two, other = (many_shot_task(generator=torch.Generator().manual_seed(seed)) for seed in (3, 4))
    for a, b in zip(one.groups, two.groups, strict=True):
        assert torch.equal(a, b)
    assert one.texts == two.texts != other.texts
    assert [(text, truth) for _, text, truth in one.queries] == [(text, truth) for _, text, truth in two.queries]
    assert len(one.groups) == 16 and len(one.groups[0]) == 18 and len(one.labels) == 8 and len(one.queries) == 32


def test_dbsa_evaluation_is_timed_a_query(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    cache = dbsa.DemonstrationCache(Decoder("softmax", vocab=9, dim=8, layers=1, heads=1))
    cache.encode_once([torch.tensor([1, 2]), torch.tensor([3])], ["a", "b"])
    clock = iter((10.0, 16.0))
    monkeypatch.setattr(dbsa.time, "perf_counter", lambda: next(clock))
    assert cache.evaluate([(torch.tensor([4]), "a", 0)] * 3, torch.tensor([1, 2]))["seconds"] == 2.0


def test_dbsa_and_hylra_keep_a_host_s_layer_scales() -> None:
    torch.manual_seed(0)
    model = Decoder("softmax", vocab=9, dim=8, layers=2, heads=2, layer_scale=0.3)
    tokens = torch.randint(9, (1, 12))
    cache = dbsa.DemonstrationCache(model, selected=None)
    cache.encode_once([tokens[0, :4], tokens[0, 4:7]], ["a", "b"])
    torch.testing.assert_close(cache.answer(tokens[0, 7:], "a"), model(tokens)[0, 7:])
    torch.testing.assert_close(ReusedIndices(model, ReusePlan((None, None), 0.0), 3)(tokens), model(tokens))


def test_hyperattention_spectral_parameters_by_hand() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 6, 3, dtype=torch.float64), torch.randn(1, 2, 6, 3, dtype=torch.float64)
    alpha, kappa = spectral_parameters(q, k)
    for h in range(4):
        e = [[math.exp(float(q[0, h, i] @ k[0, h // 2, j]) / math.sqrt(3)) for j in range(6)] for i in range(6)]
        sums = [sum(row) for row in e]
        columns = [sum((e[i][j] / sums[i]) ** 2 for i in range(6)) for j in range(6)]
        assert float(alpha[0, h]) == pytest.approx(6 * max(columns)) and float(kappa[0, h]) == pytest.approx(max(sums) / min(sums))


def test_hyperattention_refuses_draws_that_do_not_fit() -> None:
    q, k, v = (torch.randn(1, 2, 32, 4) for _ in range(3))
    sizes: dict[str, Any] = {"block_size": 8, "samples": 3, "min_length": 4}
    fitting = torch.randint(32, (1, 2, 3))
    assert hyper_attention(q, k, v, **sizes, draws=fitting)[0].isfinite().all()
    for wrong in (fitting[:, :, :2], fitting[:, :1], fitting - 32, fitting + 32, torch.cat((fitting, fitting), 1)):
        with pytest.raises(RegardError, match="draws"):
            hyper_attention(q, k, v, **sizes, draws=wrong)


def test_psa_levels_are_capped_by_the_likeness_of_neighbours() -> None:
    """A block of 8 may be pooled by f as long as the first and last key of its groups of f point alike on average."""
    torch.manual_seed(0)
    angle = torch.tensor([5.0, 12, 30, 60, 5]).deg2rad().double().repeat_interleave(8) * torch.arange(40)  # a turn of so much a token
    k, bounds = (
        torch.stack((angle.cos(), angle.sin()), -1).expand(1, 2, -1, -1) * torch.rand(1, 2, 40, 1, dtype=torch.float64),
        (0.7, 0.65, 0.6),
    )
    cap = similarity_cap(k, 8, bounds)
    for h in range(2):
        for n in range(5):
            allowed = 1
            for factor, bound in zip((2, 4, 8), bounds, strict=True):
                pairs = [(8 * n + at, 8 * n + at + factor - 1) for at in range(0, 8, factor)]
                alike = [float(F.cosine_similarity(k[0, h, a], k[0, h, b], dim=0)) for a, b in pairs]
                allowed = factor if sum(alike) / len(alike) > bound else allowed
            assert int(cap[0, h, n]) == allowed
    assert cap[0, 0].tolist() == [8, 4, 2, 1, 8]
    q = torch.randn(1, 2, 40, 2, dtype=torch.float64)
    rest: dict[str, Any] = {
        "mode": "topk",
        "ranges": ((1, 0.0), (8, 1.0)),
        "block_size": 8,
        "sample": 8,
        "text": 0,
        "seed": 0,
        "tile": 1,
        "floor": 0.06,
    }
    free, capped = (psa_plan(q, k, similarity=bound, **rest) for bound in (None, bounds))
    best = capped == 1
    assert torch.equal(capped[~best], torch.minimum(free, cap[:, :, None])[~best]) and bool((free[best & (free > 1)] > 0).all())
    assert bool(((capped == free) | (capped == cap[:, :, None])).all()) and not torch.equal(free, capped)


@pytest.mark.parametrize("causal", [False, True])
def test_psa_reads_blocks_with_text_in_full(causal: bool) -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(1, 2, 44, 6, dtype=torch.float64) for _ in range(2))  # the last block holds 4 tokens
    rest: dict[str, Any] = {
        "mode": "topk",
        "ranges": ((2, 0.4), (8, 0.8)),
        "block_size": 8,
        "sample": 8,
        "similarity": None,
        "seed": 0,
        "tile": 1,
        "floor": 0.06,
    }
    plain = psa_plan(q, k, text=0, causal=causal, **rest)
    u, w = torch.arange(6)[:, None], torch.arange(6)
    past = w <= u if causal else torch.ones(6, 6, dtype=torch.bool)
    for text, first in ((3, 5), (4, 5), (5, 4), (13, 3), (30, 1)):
        found = psa_plan(q, k, text=text, causal=causal, **rest)
        assert torch.equal(found, torch.where((w >= first) & past, 1, plain))
        assert causal or not torch.equal(found, plain)


def test_spargeattn_searches_by_halving() -> None:
    tried: list[float] = []

    def good(x: float) -> bool:
        tried.append(x)
        return x >= 0.3

    found = spargeattn.smallest(good, 0.0, 1.0, 1e-3)
    assert 0.3 <= found < 0.3 + 1e-3 and tried[:3] == [0.5, 0.25, 0.375]
    assert spargeattn.smallest(lambda x: False, 0.0, 1.0, 1e-3) == 1.0 and spargeattn.smallest(lambda x: True, 0.0, 1.0, 0.01) <= 0.01


def test_spargeattn_tunes_a_head_by_the_bins_that_leave_out_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors and shares told by a table in place of attention: thetas below 0 are refused by their error, the densest savings lie at 0.5."""
    truth = torch.ones(1, 1, 4, 2)

    def told(theta: float, tau: float, low: float) -> Tensor:
        """Relative error 0.1 (1 - tau) for theta >= 0; skipping products adds 0.1 below lambda = 20."""
        base = 0.1 * (1 - tau) if theta >= 0 else 1.0 - tau
        return truth * (1 + base + (0.1 if low < 20 else 0.0))

    monkeypatch.setattr(spargeattn, "sparge", lambda theta, tau, *rest, **options: (theta, tau))
    monkeypatch.setattr(spargeattn, "attend", lambda q, k, v, mechanism: told(*mechanism, 50.0))

    def tiles(q: Tensor, k: Tensor, v: Tensor, *, theta: float, tau: float, pv_lambda: float | None = None, **options: Any) -> Any:
        saved = 0.6 if 0.5 <= theta < 0.625 else 0.3 if theta >= 0 else 0.05
        return spargeattn.Sparged(told(theta, tau, 50.0 if pv_lambda is None else pv_lambda), truth, saved, 0)

    monkeypatch.setattr(spargeattn, "sparge_attention", tiles)
    tuner = spargeattn.SpargeTuner(l1=0.07, pv_l1=0.08).fit(*(torch.zeros(1, 2, 4, 2),) * 3)
    assert (
        len(tuner.theta) == len(tuner.tau) == len(tuner.pv_lambda) == 2 and tuner.theta[0] == 0.5625
    )  # two steps of 1/16 a bin, the larger
    assert tuner.tau[0] == pytest.approx(0.3, abs=2e-3) and tuner.pv_lambda[0] == pytest.approx(20, abs=0.11)
    assert spargeattn.SpargeTuner(worthwhile=0.6).fit(*(torch.zeros(1, 1, 4, 2),) * 3).theta == (1.0,)
    assert spargeattn.SpargeTuner(worthwhile=0.6).fit(*(torch.zeros(1, 1, 4, 2),) * 3).pv_lambda == (50.0,)
    coarse = spargeattn.SpargeTuner(grid=0.5).fit(*(torch.zeros(1, 1, 4, 2),) * 3)
    assert coarse.theta == (0.5,)


def test_ssa_takes_any_choice_of_blocks() -> None:

    from regard.zoo.sparse.ssa import SSAAttention, block_top

    torch.manual_seed(0)
    layer = SSAAttention(16, 2, select=block_top(4, 1)).eval()
    other = SSAAttention(16, 2, block_size=4, top_k=1).eval()
    other.load_state_dict(layer.state_dict())
    x = torch.randn(1, 24, 16)
    assert isinstance(layer.sparse.select, Chosen) and torch.equal(layer(x), other(x))
    layer.use("full")
    assert not torch.allclose(layer(x), other(x), atol=1e-4)
    with pytest.raises(RegardError, match="given a select"):
        layer.use("sparse", top_k=2)
    other.use("sparse", top_k=24)
    torch.testing.assert_close(layer(x), other(x))
