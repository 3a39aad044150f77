"""What softmax rows have beside their mechanism: sign reports, variants of the study of sinks, counts, blocks without norms, fused decoding."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from regard import RegardError, nn
from regard.tasks.permutations import permutation_states
from regard.zoo.softmax import attention_sink as sinks
from regard.zoo.softmax.cog_attention import sign_report
from regard.zoo.softmax.gin_attention import GraphAdapted, SparseGINAdapter
from regard.zoo.softmax.localist_dial import LocalistDecoder
from regard.zoo.softmax.relaxed_attention import shallow_fusion
from regard.zoo.softmax.reluformer import length_sweep, memory_sweep
from regard.zoo.softmax.shaped_transformer import ShapedBlock
from regard.zoo.softmax.sparsemax import Reader, selective_attention, sparsemax_weights
from regard.zoo.softmax.super_attention import FrugalAttention


def test_cog_attention_s_signs_and_circuits() -> None:
    torch.manual_seed(0)
    model = nn.Decoder(["softmax", "cog-attention"], vocab=12, dim=16, layers=2, heads=2).double()
    ids = torch.randint(12, (2, 9))
    found = sign_report(model, ids)
    assert float(found.negative.scores[0].abs().max()) == 0 and 0.2 < float(found.negative.scores[1].min()) < 0.8
    w = model.blocks[1].mixer.weights(model.blocks[1].norm1(model.blocks[0](model.embed(ids))))
    assert w is not None
    share = (-w[:, 0]).clamp_min(0).sum() / w[:, 0].abs().sum()
    torch.testing.assert_close(found.negative.scores[1, 0], share.detach(), check_dtype=False)
    mixer = model.blocks[0].mixer
    ov = mixer.v.weight[:8].T @ mixer.out.weight[:, :8].T
    values = torch.linalg.eigvals(ov.detach())
    assert float(found.copying.scores[0, 0]) == pytest.approx(float(values.real.sum() / values.abs().sum()))
    with torch.no_grad():
        mixer.out.weight[:, :8] = -mixer.v.weight[:8].T
    assert float(sign_report(model, ids).copying.scores[0, 0]) == pytest.approx(-1)
    assert found.collapse.shape == (3,) and bool((found.collapse > 0).all())


def test_attention_sink_s_variants() -> None:
    tokens = torch.randint(4, 32, (2, 8))
    for given in ({"prefix": 3}, {"window": 2}, {"prefix": 3, "window": 2}):
        torch.manual_seed(0)
        model = sinks.Tiny("softmax", 8, 2, 8, **given).double()
        w = model.weights(model.stream(tokens))
        assert w is not None
        for i, j in itertools.product(range(8), range(8)):
            seen = (j <= i and (i - j < 2 or "window" not in given)) or j < given.get("prefix", 0)
            assert bool((w[:, :, i, j] > 0).all()) == seen
        x = model.stream(tokens)
        v = model.attention.v(x).unflatten(-1, (2, 4)).transpose(1, 2)
        torch.testing.assert_close(model.added(x), model.attention.out((w @ v).transpose(1, 2).flatten(2)))
    torch.manual_seed(0)
    before, after = sinks.Tiny("softmax", 8, 2, 8), sinks.Tiny("softmax", 8, 2, 8, post_norm=True)
    after.load_state_dict(before.state_dict())
    assert torch.equal(after.stream(tokens), after.embed(tokens)) and not torch.equal(after(tokens), before(tokens))
    torch.testing.assert_close(after.added(after.stream(tokens)), after.norm(after.attention(after.embed(tokens))))
    found = sinks.sink_experiment("softmax", steps=3, length=8, dim=8, batch=4, prefix=2, window=4, post_norm=True)
    with pytest.raises(RegardError, match="prefix=8"):
        sinks.sink_experiment("softmax", steps=1, length=8, prefix=8)
    assert found.positions is not None and len(found.positions) == 8 and len(found.loss) == 3


def test_super_attention_s_operations() -> None:
    n, d = 6, 8
    for kind, projections, mixes in (("standard", 4, 2), ("optimised", 3, 2), ("efficient", 2, 2), ("super", 2, 3)):
        layer = FrugalAttention(d, 2, kind, length=n if kind == "super" else None)
        # each head: scores n n d/h, values n n d/h; super mixes positions once for all channels
        assert layer.operations(n) == 2 * (projections * n * d * d + mixes * n * n * d)
        assert layer.parameter_count == projections * d * d + (n * n if kind == "super" else 0)
        causal = FrugalAttention(d, 2, kind, length=n if kind == "super" else None, causal=True)
        assert causal.operations(n) == 2 * (projections * n * d * d + mixes * sum(range(1, n + 1)) * d)


def test_shaped_transformer_s_blocks_by_hand_and_in_depth() -> None:
    torch.manual_seed(0)
    block, x = ShapedBlock(8, gamma=0.6, slopes=(0.5, -0.25), hidden=5).double(), torch.randn(1, 4, 8, dtype=torch.float64)
    q, k, v = (x[0] @ getattr(block.attention, name).weight.T for name in "qkv")
    a = torch.eye(4) + torch.softmax(q @ k.T / math.sqrt(8) / math.sqrt(8), -1) - 1 / 4
    y = 0.8 * x[0] + 0.6 * a @ v
    h = y @ block.up.weight.T
    h = torch.where(h > 0, h * (1 + 0.5 / math.sqrt(8)), h * (1 - 0.25 / math.sqrt(8)))
    torch.testing.assert_close(block(x)[0], 0.8 * y + 0.6 * h @ block.down.weight.T)

    def alike(blocks: list[torch.nn.Module]) -> float:
        y = torch.randn(4, 6, 64, generator=torch.Generator().manual_seed(1))
        for one in blocks:
            y = one(y)
        unit = torch.nn.functional.normalize(y, dim=-1)
        return float(((unit @ unit.mT).abs().sum((-1, -2)) - 6).mean() / 30)

    with torch.no_grad():
        shaped = [ShapedBlock(64) for _ in range(24)]
        plain = [ShapedBlock(64) for _ in range(24)]
        for one in plain:
            one.attention.mechanism = nn.Attention(64, 1).mechanism
        size = float(torch.nn.Sequential(*shaped)(torch.randn(4, 6, 64)).square().mean())
        assert alike(shaped) < 0.8 < 0.97 < alike(plain) and 0.3 < size < 3
    lost = (1 + (1 - 1 / 8) ** 2) / 2
    for name, p in shaped[0].named_parameters():
        assert float(p.std()) == pytest.approx((64 * (lost if "down" in name else 1)) ** -0.5, rel=0.05)
    with pytest.raises(RegardError, match="gamma=1"):
        ShapedBlock(8, gamma=1.0)


def test_relaxed_attention_s_fused_decoding() -> None:
    torch.manual_seed(0)
    tables = [torch.randn(5, 5, dtype=torch.float64) for _ in range(3)]
    decoder, language, internal = ((lambda ids, table=table: table[ids]) for table in tables)
    start = torch.tensor([[1], [3]])

    def best(row: int, ended: int | None = None) -> list[int]:
        logs = [table.log_softmax(-1) for table in tables]
        found = (-math.inf, [])
        for tokens in itertools.product(range(5), repeat=3):
            total, before, over = 0.0, row, False
            for token in tokens:
                if over:
                    total += 0.0 if token == ended else -math.inf
                else:
                    total += float(logs[0][before, token] + 0.4 * logs[1][before, token] - 0.2 * logs[2][before, token])
                over = over or token == ended
                before = token
            found = max(found, (total, list(tokens)))
        return found[1]

    given = {"weight": 0.4, "internal": internal, "internal_weight": 0.2}
    for ended in (None, 2):
        found = shallow_fusion(decoder, language, start, 3, beams=125, end=ended, **given)
        assert found[:, 1:].tolist() == [best(1, ended), best(3, ended)]
    greedy = shallow_fusion(decoder, language, start, 1, weight=0.0)
    assert greedy[:, 1].tolist() == [int(tables[0][row].argmax()) for row in (1, 3)]
    forbidding = tables[1].masked_fill(torch.tensor([True, False, False, False, False]), -math.inf)
    for share, model in ((0.0, forbidding), (0.4, forbidding)):
        logs = [table.log_softmax(-1) for table in (tables[0], model)]
        want = [int((logs[0] + (share * logs[1] if share else 0))[row].argmax()) for row in (1, 3)]
        assert shallow_fusion(decoder, lambda ids, model=model: model[ids], start, 1, weight=share)[:, 1].tolist() == want
    both = shallow_fusion(
        lambda ids: forbidding[ids], language, start, 1, internal=lambda ids: forbidding[ids], internal_weight=0.2, beams=5
    )
    assert bool((both[:, 1] != 0).all())  # never the forbidden one, though the internal model gives it nothing either
    with pytest.raises(RegardError, match="internal"):
        shallow_fusion(decoder, language, start, 1, internal_weight=0.1)
    with pytest.raises(RegardError, match="5 and 4 symbols"):
        shallow_fusion(decoder, lambda ids: tables[1][ids][..., :4], start, 1)


def test_sparsemax_reads_one_fact_of_many() -> None:
    found = selective_attention(facts=4, symbols=6, dim=8, steps=120, lr=2e-2)
    assert found.mechanism == ("softmax", "sparsemax") and min(found.accuracy) > 0.9
    assert found.support[0] == 4 and found.support[1] < 2 and found.right[1] > found.right[0] > 0.5
    again = selective_attention(("softmax",), facts=4, symbols=6, dim=8, steps=120, lr=2e-2)
    assert (again.accuracy[0], again.right[0]) == (found.accuracy[0], found.right[0])
    torch.manual_seed(0)
    reader = Reader("sparsemax", 12, 6)
    facts, question = torch.randint(12, (2, 5, 2)), torch.tensor([3, 4])
    w = reader.weights(facts, question)
    context = torch.cat((reader.key(facts[..., 0]), reader.value(facts[..., 1])), -1)
    asked = torch.cat((reader.key(question), torch.zeros(2, 6)), -1)
    z = (reader.attention.q(asked)[:, None] * reader.attention.k(context)).sum(-1) / 12**0.5
    torch.testing.assert_close(w, sparsemax_weights(z).detach())
    mixed = (w[..., None] * reader.attention.v(context)).sum(1)
    torch.testing.assert_close(reader(facts, question), reader.head(reader.attention.out(mixed)))


def test_reluformer_s_memories_and_lengths() -> None:
    left = memory_sweep((4, 64), ("relu", "softmax"), dim=8, pairs=24, steps=60, lr=2e-2)
    assert left["relu"][64] < 0.3 < left["relu"][4] and left["relu"][64] < left["softmax"][64]
    sizes = length_sweep((32, 512))
    assert 0.8 < sizes["reluformer"][32] < 1.25 and 0.8 < sizes["reluformer"][512] < 1.25
    assert sizes == length_sweep((32, 512)) != length_sweep((32, 512), seed=1)
    assert sizes["relu"][512] == pytest.approx(256, rel=0.25) and sizes["softmax"][512] < 0.02


def test_localist_dial_of_a_language_model() -> None:
    torch.manual_seed(0)
    model = LocalistDecoder(torch.arange(12) // 4, dim=16).double()
    tokens = torch.randint(12, (2, 9))
    free = model(tokens)
    other = tokens // 4 * 4 + (tokens + 1) % 4  # another symbol of the same block
    changed = torch.where(model.block_of[tokens] == model.block_of[tokens[:, -1:]], tokens, other)
    model.dial = 1.0
    confined = model(tokens)
    torch.testing.assert_close(model(changed)[:, -1], confined[:, -1])  # tokens of other blocks are not read
    assert not torch.allclose(free, confined)
    model.dial = [0.0, 1.0]
    half = model(tokens)
    assert not torch.allclose(half, confined) and not torch.allclose(half, free)
    model.dial = 0.0
    torch.testing.assert_close(model(tokens), free)
    torch.testing.assert_close(model(tokens[:, :5]), free[:, :5])
    plain = nn.Decoder("softmax", vocab=12, dim=16, layers=2, heads=2, hidden=32).double()
    plain.load_state_dict({name: x for name, x in model.state_dict().items() if name != "block_of"})
    torch.testing.assert_close(plain(tokens), free)
    assert len(model.groups()) == 4 and all(x.shape == (8, 16) for x in model.groups())
    model.dial = [0.5]
    with pytest.raises(RegardError, match="one a layer"):
        model(tokens)
    with pytest.raises(RegardError, match="block_of"):
        LocalistDecoder(torch.rand(3))


def test_compositions_of_permutations() -> None:
    for size in (2, 3, 4):
        tokens, labels = permutation_states(5, 7, torch.Generator().manual_seed(0), size)
        every = list(itertools.permutations(range(size)))
        for row, told in zip(tokens.tolist(), labels.tolist(), strict=True):
            things = tuple(range(size))
            for token, label in zip(row, told, strict=True):
                things = tuple(every[token][x] for x in things)
                assert every[label] == things
    with pytest.raises(RegardError, match="size=6"):
        permutation_states(1, 1, torch.Generator(), 6)


def test_gin_attention_in_a_frozen_decoder() -> None:
    torch.manual_seed(0)
    model, tokens = nn.Decoder("softmax", vocab=12, dim=16, layers=2, heads=2).double(), torch.randint(12, (2, 7))
    plain = model(tokens)
    adapted = GraphAdapted(model, 16, layers=[0])
    assert all(isinstance(x, SparseGINAdapter) for x in adapted.adapters.values()) and len(adapted.adapters) == 1
    torch.testing.assert_close(adapted(tokens), plain)
    with torch.no_grad():
        adapted.adapters["0"].scale.fill_(0.3)
        adapted.adapters["0"].eps.fill_(0.5)
    x = model.embed(tokens)
    maps = model.blocks[0].mixer.weights(model.blocks[0].norm1(x))
    h = adapted.adapters["0"](model.blocks[0](x), maps)
    torch.testing.assert_close(adapted(tokens), model.logits(model.blocks[1](h)))
    adapted(tokens).sum().backward()
    assert all((p.grad is not None) == name.startswith("adapters") for name, p in adapted.named_parameters())
    with pytest.raises(RegardError, match=r"0 \.\. 1"):
        GraphAdapted(model, 16, layers=[2])
