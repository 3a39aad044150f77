"""What sparse rows say of themselves: bytes of caches, shares left out, plans under other costs, engines' hooks and schedules."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from regard import RegardError
from regard.engine import online
from regard.zoo.sparse import attention_engine as engine
from regard.zoo.sparse.alternating_sparse_attention import GlobalLatentAttention, LocalLatentAttention, cache_floats
from regard.zoo.sparse.dma import DynamicMaskAttention
from regard.zoo.sparse.hylra import ReusePlan, causal_weights, largest, plan, top_indices
from regard.zoo.sparse.landmark_attention import LandmarkAttention, LandmarkCache
from regard.zoo.sparse.ltri_llm import LtriStream, compactness, find_spans
from regard.zoo.sparse.recurrent_memory_transformer import RecurrentMemoryBlock
from regard.zoo.sparse.spargeattn import int8, sparge_attention
from regard.zoo.sparse.superlinear_attention import span_search


def test_bytes_held_by_dma() -> None:
    """Keys, values and a bias a kv head of at most `window` tokens."""
    layer, x = DynamicMaskAttention(16, 4, 2, window=5), torch.randn(3, 9, 16)
    for count, kept in ((2, 2), (5, 5), (9, 5)):
        state = layer.step(x[:, :count])[1]
        assert state.bytes == 3 * 2 * kept * (4 + 4 + 1) * 4 and state.length == count
    assert layer.double().step(x.double())[1].bytes == 3 * 2 * 5 * 9 * 8


def test_bytes_held_by_landmark_attention() -> None:
    layer, x = LandmarkAttention(16, 2, block=3, top_blocks=1), torch.randn(2, 7, 16)
    assert LandmarkCache().bytes == LandmarkCache().length == 0
    cache = layer.step(x[:, :5])[1]
    assert cache.bytes == 2 * 5 * 2 * 16 * 4 and layer.step(x[:, 5:], cache)[1].bytes == 2 * 7 * 2 * 16 * 4


def test_bytes_held_by_recurrent_memory_transformer() -> None:
    for whole in (False, True):
        layer, x = RecurrentMemoryBlock(16, 2, chunk=4, slots=3, use_global=whole), torch.randn(2, 10, 16)
        for count in (3, 4, 10):
            state = layer.step(x[:, :count])[1]
            entries = 3 + count % 4 + (count if whole else 0)
            assert state.bytes == 2 * entries * 2 * 16 * 4 and state.length == count


def test_numbers_cached_by_alternating_sparse_attention() -> None:
    local, far = (
        LocalLatentAttention(16, 4, rank=6, rope_dim=4, window=5),
        GlobalLatentAttention(16, 4, groups=2, rank=3, size=4, stride=2, block_size=4),
    )
    x = torch.randn(2, 8, 16)
    for count in (3, 8):
        held = [layer.step(x[:, :count])[1].floats for layer in (local, far)]
        assert held == [min(count, 5) * 10, count * 6] == [local.cache_floats(count), far.cache_floats(count)]
        assert cache_floats([local, far, torch.nn.Linear(2, 2)], count) == sum(held) / count


def test_ltri_llm_residents_are_sinks_and_window() -> None:
    torch.manual_seed(0)
    stream = LtriStream(window=12, sinks=3, top=2, budget=20, shortest=2, longest=5)
    assert stream.resident == 0
    for count in range(1, 9):
        q, k, v = (torch.randn(1, 2, 5, 4) for _ in range(3))
        stream(q, k, v)
        spans = sum(one.k.shape[2] for one in stream.index.spans)
        assert stream.resident + spans == 5 * count and stream.resident >= min(5 * count, 15)
        assert all(one.k.shape[2] <= 5 for one in stream.index.spans)
    found = sorted(one.span for one in stream.index.spans)
    assert found[0][0] == 3 and all(a[1] + 1 == b[0] for a, b in itertools.pairwise(found))


def test_ltri_llm_spans_keep_to_their_limits() -> None:
    torch.manual_seed(0)
    a = torch.rand(30, 30, dtype=torch.float64).tril()
    for shortest, longest in ((3, 6), (5, 5), (8, 12)):
        spans = find_spans(a, shortest, longest)
        assert [s for s, _ in spans] == [0, *(e + 1 for _, e in spans[:-1])] and spans[-1][1] == 29
        assert all(s <= e for s, e in spans)  # none is empty
        assert sum(shortest <= e - s + 1 <= longest for s, e in spans) >= 2
    assert compactness(torch.tensor(6.0), torch.tensor(0.5), torch.tensor(3.0), 0.1).item() == pytest.approx(6 / 3 - 0.5 - 0.3)
    chosen = find_spans(a, 4, 4, score=lambda mass, leak, size: (torch.arange(30)[:, None] == 7).to(a) * (size == 4))
    assert (7, 10) in chosen


def test_hylra_plans_under_other_costs_and_with_sensitive_layers() -> None:
    generator = torch.Generator().manual_seed(0)
    for case in range(12):
        error = torch.rand(5, 5, generator=generator, dtype=torch.float64).triu(1)
        sensitivity = torch.rand(5, generator=generator, dtype=torch.float64)
        options = {"weight": 0.2 + case / 20, "full_cost": 1.5, "reuse_cost": 0.4, "threshold": 0.6}
        best = math.inf
        for full in itertools.product((True, False), repeat=4):
            if any(not f and float(sensitivity[n]) > 0.6 for n, f in enumerate(full, 1)):
                continue
            cost, last = options["weight"] * 1.5, 0
            for n, f in enumerate(full, 1):
                last = n if f else last
                cost += options["weight"] * 1.5 if f else float(error[last, n]) + options["weight"] * 0.4
            best = min(best, cost)
        found = plan(error, sensitivity, **options)
        assert found.cost == pytest.approx(best) and isinstance(found, ReusePlan)
        assert all(n in found.full_layers for n in range(1, 5) if float(sensitivity[n]) > 0.6)
        assert plan(error, **options).cost <= found.cost and plan(error, sensitivity, **{**options, "threshold": math.inf}) == plan(
            error, **options
        )


def test_hylra_first_and_last_keys_stay_within_the_count() -> None:
    torch.manual_seed(0)
    p = torch.rand(1, 4, 3, 40)
    for count, sinks, recent in ((8, 4, 16), (12, 2, 3), (1, 4, 16), (40, 4, 16), (60, 4, 16)):
        found = top_indices(p, 2, count, sinks, recent)
        for h in range(2):
            mass = p[0, 2 * h : 2 * h + 2].sum((0, 1))
            forced = {*range(min(sinks, count // 4)), *range(40 - min(recent, max(1, count // 2)), 40)}
            rest = [n for n in mass.argsort(descending=True).tolist() if n not in forced]
            assert found[0, h].tolist() == sorted([*forced, *rest][: min(count, 40)])
    q, k = torch.randn(1, 4, 5, 3), torch.randn(1, 2, 9, 3)
    w = causal_weights(q, k)
    seen = torch.arange(9) <= torch.arange(4, 9)[:, None]
    torch.testing.assert_close(w, (q @ k.repeat_interleave(2, 1).mT / 3**0.5).masked_fill(~seen, -math.inf).softmax(-1))
    top = largest(w, 2, 3, first=4)
    for i in range(5):
        order = w[0, 2:, i].sum(0).argsort(descending=True)[:3]
        assert set(top[0, 1, i].nonzero().flatten().tolist()) == set(order.tolist())


@pytest.mark.parametrize("at", [0, 1, 3])
def test_spargeattn_skips_products_far_under_the_maximum(at: int) -> None:
    """One key block scores 20 above the others: tiles read behind it are scored and not multiplied, those before it are."""
    q, v = torch.zeros(1, 2, 16, 4), torch.randn(1, 2, 16, 3)
    q[..., 0] = 1
    k = torch.zeros(1, 2, 16, 4)
    k[:, :, 4 * at : 4 * at + 4, 0] = 20
    for limit, skipped in ((10.0, 2 * 2 * (3 - at)), (40.0, 0), (None, 0)):
        found = sparge_attention(q, k, v, theta=-1.0, tau=1.0, pv_lambda=limit, block_q=8, block_k=4, scale=1.0)
        assert found.pv_skips == skipped and found.qk_sparsity == 0 and bool(found.keep.all())
        torch.testing.assert_close(found.out, (q @ k.mT).softmax(-1) @ v, atol=1e-6, rtol=1e-4)


def test_spargeattn_share_left_out_is_of_visible_tiles() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 40, 4) for _ in range(3))
    for causal in (False, True):
        found = sparge_attention(3 * q, k, v, theta=-1.0, tau=0.5, causal=causal, block_q=8, block_k=8)
        visible = 2 * (15 if causal else 25)
        assert found.qk_sparsity == pytest.approx(1 - int(found.keep.sum()) / visible) and 0 < found.qk_sparsity < 1


def test_spargeattn_rounds_to_the_nearest_step() -> None:
    x = torch.tensor([[127.0, 2.6, -2.6, 0.4, -3.6, 1.4, 0.0, -254]])[..., None]
    steps, scale = int8(x, 4)
    assert steps.flatten().tolist() == [127, 3, -3, 0, -2, 1, 0, -127]
    torch.testing.assert_close(scale.flatten(), torch.tensor([1.0, 2.0]))
    assert int8(torch.zeros(1, 4, 1), 4)[1].item() == pytest.approx(1e-7)


def test_attention_engine_asks_for_its_tensors_and_device() -> None:
    q, k, v = (torch.randn(1, 2, 20, 4) for _ in range(3))
    made = engine.attention_engine(lambda s, bias, h: s + bias[h], custom_inputs=("bias",))
    for given, said in (({}, "missing: \\['bias'\\]"), ({"bias": torch.ones(2), "more": q}, "unknown: \\['more'\\]")):
        with pytest.raises(RegardError, match=said):
            made(q, k, v, **given)
        with pytest.raises(RegardError, match=said):
            made.reference(q, k, v, **given)
    with pytest.raises(RegardError, match="device='tpu'"):
        engine.attention_engine(device="tpu")
    torch.testing.assert_close(made(q, k, v, bias=torch.ones(2)), (q @ k.mT / 2).softmax(-1) @ v)
    scaled = engine.attention_engine(scale=0.3)
    torch.testing.assert_close(scaled(q, k[:, :1], v[:, :1]), (0.3 * q @ k[:, :1].mT).softmax(-1) @ v[:, :1])
    torch.testing.assert_close(scaled.reference(q, k, v), (0.3 * q @ k.mT).softmax(-1) @ v)


def test_attention_engine_is_tuned_over_the_first_schedules(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(1, 1, 40, 4) for _ in range(3))
    seen: list[online.Schedule] = []

    def last(run: object, candidates: list[online.Schedule]) -> online.Schedule:
        seen[:] = candidates
        for one in candidates:
            torch.testing.assert_close(run(one), (q @ k.mT * 0.7).softmax(-1) @ v)  # type: ignore[operator]
        return candidates[-1]

    monkeypatch.setattr(engine, "autotune", last)
    made = engine.attention_engine(scale=0.7)
    for count in (2, 4):
        tuned = made.tuned(q, k, v, count)
        assert seen == online.schedules(online.DEVICES["cpu"], 4, 4, 4)[:count] and tuned.schedule == seen[-1]
        torch.testing.assert_close(tuned(q, k, v), (q @ k.mT * 0.7).softmax(-1) @ v)
    fixed = engine.attention_engine(scale=0.7, schedule=online.Schedule(16, 16))
    assert fixed.schedule == online.Schedule(16, 16)


def test_attention_engine_linear_hooks_each_have_their_tensor() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 7, 3, dtype=torch.float64) for _ in range(3))
    decay, gain = torch.rand(1, 2, 7, dtype=torch.float64), torch.rand(1, 2, 7, 1, dtype=torch.float64)
    run = engine.linear_attention_engine(lambda q: q.relu(), lambda k, gain: k * gain, lambda v: v + 1, lambda decay: -decay)
    for given in (decay, None):
        state, rows = torch.zeros(1, 2, 3, 3, dtype=torch.float64), []
        for t in range(7):
            faded = state if given is None else torch.exp(-given[:, :, t, None, None]) * state
            state = faded + (k * gain)[:, :, t, :, None] * (v + 1)[:, :, t, None]
            rows.append((q.relu()[:, :, t, None] @ state)[:, :, 0])
        torch.testing.assert_close(run(q, k, v, given, gain=gain), torch.stack(rows, 2))
    plain = engine.linear_attention_engine()
    torch.testing.assert_close(plain(q, k, v, -decay)[:, :, 0], (q * k)[:, :, 0].sum(-1, keepdim=True) * v[:, :, 0])


def test_superlinear_attention_says_which_anchors_are_none() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 10, 4), torch.randn(1, 2, 10, 4)
    anchors, found = span_search(q, k, 0, 3, 1)
    for t in range(10):
        real = [t - i * i + 1 for i in range(2, 4) if i * i <= t + 1]
        for h in range(2):
            ranked = sorted(real, key=lambda a, h=h, t=t: -float(q[0, h, t] @ k[0, h, a]))
            assert anchors[0, h, t].tolist() == ranked + [-1] * (3 - len(real))
            assert found[0, h, t].tolist() == pytest.approx(
                [float(q[0, h, t] @ k[0, h, a]) for a in ranked] + [-1e9] * (3 - len(real)), rel=1e-5
            )
