"""The study of sinks: its metric, ways to weigh and null keys by hand; its text and model."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import regard
from regard import Padding, RegardError, Segments
from regard.zoo.softmax import attention_sink as sinks


def test_the_metric() -> None:
    maps = (2 * torch.randn(3, 2, 6, 6)).masked_fill(~torch.ones(6, 6).tril().bool(), -math.inf).softmax(-1)
    for eps in (0.3, 0.6):
        found = sinks.sink_metric(maps) if eps == 0.3 else sinks.sink_metric(maps, eps)
        for k in range(6):
            share = [sum(float(one[i, k]) for i in range(k, 6)) / (6 - k) > eps for one in maps.flatten(0, 1)]
            assert float(found[k]) == pytest.approx(100 * sum(share) / 6)


KERNELS = {
    "softmax": (math.exp, True),
    "sigmoid": (lambda x: 1 / (1 + math.exp(-x)), False),
    "sigmoid-normalised": (lambda x: 1 / (1 + math.exp(-x)), True),
    "linear-normalised": (lambda x: x, True),
    "k-bias": (math.exp, True),
}


@pytest.mark.parametrize("name", KERNELS)
def test_ways_to_weigh(name: str) -> None:
    q, k, v = (torch.randn(1, 1, 7, 4, dtype=torch.float64) for _ in range(3))
    null = torch.randn(1, 1, 7, dtype=torch.float64)
    f, normalised = KERNELS[name]
    want = torch.zeros(7, 4, dtype=torch.float64)
    for i in range(7):
        shift = -math.log(i + 1) if name == "sigmoid" else 0.0
        w = [f(float(q[0, 0, i] @ k[0, 0, j]) / 2 + shift) for j in range(i + 1)]
        total = sum(abs(x) for x in w) + (math.exp(float(null[0, 0, i])) if name == "k-bias" else 0.0)
        want[i] = torch.tensor(w, dtype=torch.float64) @ v[0, 0, : i + 1] / (total if normalised else 1.0)
    given = {"sink": null} if name == "k-bias" else {}
    torch.testing.assert_close(regard.attend(q, k, v, sinks.studied(name), mask=regard.Causal(), **given)[0, 0], want)


@pytest.mark.parametrize("normalised", [True, False])
def test_kernels_of_features(normalised: bool) -> None:
    q, k, v = (torch.randn(1, 1, 7, 4, dtype=torch.float64) for _ in range(3))
    a, b = (torch.where(x > 0, x + 1, torch.exp(x)) for x in (q, k))
    w = (a @ b.mT).tril()
    w = w / w.sum(-1, keepdim=True) if normalised else w
    found = regard.attend(q, k, v, sinks.studied("elu-normalised" if normalised else "elu"), mask=regard.Causal())
    torch.testing.assert_close(found, w @ v)


def test_a_layer_s_null_logit_is_read_off_its_queries() -> None:
    layer, x = regard.nn.Attention(8, 2, sinks.studied("k-bias")).double(), torch.randn(1, 5, 8, dtype=torch.float64)
    assert 0 < float(layer.inputs.learned["sink"].detach().abs().max()) < 0.2
    nn.init.normal_(layer.inputs.learned["sink"])
    q, k, v = (w(x)[0].view(5, 2, 4) for w in (layer.q, layer.k, layer.v))
    o = torch.zeros(5, 2, 4, dtype=torch.float64)
    for h in range(2):
        for i in range(5):
            e = torch.exp(k[: i + 1, h] @ q[i, h] / 2)
            o[i, h] = e @ v[: i + 1, h] / (e.sum() + torch.exp(q[i, h] @ layer.inputs.learned["sink"][h]))
    torch.testing.assert_close(layer(x)[0], layer.out(o.flatten(1)))


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("kv_heads", [2, 1])
@torch.no_grad()
def test_one_more_key(value: bool, kv_heads: int) -> None:
    layer, x = sinks.KeyValueBias(8, 2, value=value, kv_heads=kv_heads).double(), torch.randn(2, 5, 8, dtype=torch.float64)
    assert layer.value_bias.requires_grad == value and bool((layer.value_bias == 0).all()) and layer.key_bias.shape == (kv_heads, 4)
    assert 0 < float(layer.key_bias.abs().max()) < 0.1
    nn.init.normal_(layer.key_bias)
    if value:
        nn.init.normal_(layer.value_bias)
    o = torch.zeros(2, 5, 2, 4, dtype=torch.float64)
    for b in range(2):
        q, k, v = layer.q(x[b]).view(5, 2, 4), layer.k(x[b]).view(5, kv_heads, 4), layer.v(x[b]).view(5, kv_heads, 4)
        for h in range(2):
            g = h * kv_heads // 2
            for i in range(5):
                keys, values = torch.cat((layer.key_bias[g][None], k[: i + 1, g])), torch.cat((layer.value_bias[g][None], v[: i + 1, g]))
                o[b, i, h] = (keys @ q[i, h] / 2).softmax(0) @ values
    torch.testing.assert_close(layer(x), layer.out(o.flatten(-2)))
    state, outs = None, []
    for a, c in ((0, 1), (1, 3), (3, 5)):
        y, state = layer.step(x[:, a:c], state)
        outs.append(y)
    torch.testing.assert_close(torch.cat(outs, 1), layer(x))


@torch.no_grad()
def test_one_more_key_beside_padding_and_masks() -> None:
    """A padded row gives what its text gives alone, whole and in steps; masks of the tokens leave the pair in sight."""
    layer = sinks.KeyValueBias(8, 2, rope=False).double()
    for p in (layer.key_bias, layer.value_bias):
        nn.init.normal_(p)
    texts = [torch.randn(1, n, 8, dtype=torch.float64) for n in (3, 5)]
    x, keep = (
        torch.cat((nn.functional.pad(texts[0], (0, 0, 2, 0), value=9.0), texts[1])),
        torch.tensor([[False] * 2 + [True] * 3, [True] * 5]),
    )
    truth = [layer(text) for text in texts]
    found = layer(x, mask=Padding(), keep=keep)
    torch.testing.assert_close(found[:1, 2:], truth[0])
    torch.testing.assert_close(found[1:], truth[1])
    torch.testing.assert_close(layer(x, mask=keep[:, None, None])[:1, 2:], truth[0])
    torch.testing.assert_close(layer(x, mask=torch.where(keep, 0.0, -torch.inf)[:, None, None].double())[:1, 2:], truth[0])
    y, state = layer.step(x[:, :4], mask=Padding(), keep=keep[:, :4])
    torch.testing.assert_close(y[:1, 2:], truth[0][:, :2])
    torch.testing.assert_close(layer.step(x[:, 4:], state, mask=Padding(), keep=keep)[0], found[:, 4:])
    with pytest.raises(RegardError, match="packed documents"):
        layer(x, mask=Segments(), segments=torch.zeros(2, 5, dtype=torch.long))


def test_the_chain_and_its_text() -> None:
    table = sinks.bigrams()
    torch.testing.assert_close(table.sum(-1), torch.ones(32))
    assert (
        bool((table[:, 0] == 0).all()) and all(torch.equal(table[n], table[0]) for n in (1, 2, 3)) and torch.equal(table, sinks.bigrams())
    )
    for n in (0, 5, 9):
        assert (
            float(table[n, 1])
            == float(table[n, 2])
            == float(table[n, 3])
            == pytest.approx(0.1 / 3 / (0.1 + float(1 - table[n, 1:4].sum()) * (0.1 / float(table[n, 1:4].sum()))))
        )
    drawn = torch.softmax(2.5 * torch.randn(32, 32, generator=torch.Generator().manual_seed(7)), -1)
    torch.testing.assert_close(table[9, 4:] / table[9, 4], drawn[9, 4:] / drawn[9, 4])
    tokens, copied = sinks.text(4000, 12, torch.Generator().manual_seed(0))
    assert (
        tokens.shape == (4000, 13)
        and copied.shape == (4000, 12)
        and bool((tokens[:, 0] == 0).all())
        and not bool(copied[:, :2].any() and copied[:, 0].any())
    )
    trigger = torch.isin(tokens, torch.tensor([1, 2, 3]))
    for t in range(1, 12):
        asked = trigger[:, t] & (tokens[:, t - 1] != 0)
        assert torch.equal(copied[:, t], asked)
        assert bool((tokens[asked, t + 1] == tokens[asked, t - 1]).all())
    free = ~copied[:, 6] & (tokens[:, 6] == 9)
    counts = torch.bincount(tokens[free, 7], minlength=32).float()
    torch.testing.assert_close(counts / counts.sum(), table[9], atol=0.12, rtol=0)
    first = torch.bincount(tokens[:, 1], minlength=32).float() / 4000
    torch.testing.assert_close(first, table[0], atol=0.03, rtol=0)


@torch.no_grad()
def test_the_model_adds_attention_to_what_is_known() -> None:
    model, tokens = sinks.Tiny("softmax", 8, 2, 12), torch.randint(32, (2, 7))
    x = model.embed.weight[tokens]
    x = model.norm.weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(model.stream(tokens), x)
    known = sinks.bigrams().clamp_min(1e-4).log()[tokens]
    torch.testing.assert_close(model(tokens), known + model.attention(x) @ model.head.weight.T)
    assert model.attention.rope is not None and model.head.bias is None


def test_an_experiment_s_numbers() -> None:
    given = {"steps": 2, "length": 6, "dim": 8, "heads": 2, "batch": 3}
    found, again, other = (sinks.sink_experiment("softmax", **given, seed=seed) for seed in (0, 0, 1))  # type: ignore[arg-type]
    assert found == again != other and len(found.loss) == 2 and len(found.head_rates) == 2 and 0 <= found.accuracy <= 1
    assert found.sink_rate == sum(found.head_rates) / 2 and math.isfinite(found.kurtosis) and found.logit_range > 0
    assert sinks.sink_experiment("softmax", **given, lr=1e-2) == found != sinks.sink_experiment("softmax", **given, lr=0.1)  # type: ignore[arg-type]
    assert sinks.trained.__wrapped__ is not None and math.isnan(sinks.SinkResult((), 1.0, 3.0, 1.0, ()).sink_rate)
    assert len(sinks.sink_experiment("sigmoid", steps=1, length=4, dim=4, heads=1, batch=2).head_rates) == 1


@pytest.mark.parametrize("options", [{}, {"post_norm": True}, {"prefix": 2}, {"prefix": 3, "window": 4}])
def test_an_experiment_reads_its_numbers_off_the_trained_model(options: dict[str, int]) -> None:
    """A rate of zero leaves the model as it begins, so that all of them can be made again."""
    found = sinks.sink_experiment("softmax", steps=2, length=9, dim=8, heads=2, lr=0.0, batch=4, seed=3, **options)  # type: ignore[arg-type]
    torch.manual_seed(3)
    model, generator = sinks.Tiny("softmax", 8, 2, 9, **options), torch.Generator().manual_seed(3)  # type: ignore[arg-type]
    prefix, losses = options.get("prefix", 0), []
    with torch.no_grad():
        for tokens in sinks.text(8, 9, generator)[0].split(4):
            log_p = model(tokens[:, :-1]).log_softmax(-1)
            losses.append(-sum(float(log_p[b, t, tokens[b, t + 1]]) for b in range(4) for t in range(prefix, 9)) / 4 / (9 - prefix))
        tokens, copied = sinks.text(256, 9, generator)
        x = model.stream(tokens[:, :-1])
        guess, w, added = model(tokens[:, :-1]).argmax(-1), model.weights(x), model.added(x).double().flatten()
    assert found.loss == pytest.approx(losses, rel=1e-4) and w is not None
    asked = [(b, t) for b in range(256) for t in range(prefix, 9) if copied[b, t]]
    assert found.accuracy == pytest.approx(sum(int(guess[b, t] == tokens[b, t + 1]) for b, t in asked) / len(asked))
    first = w[..., 0].double().mean(-1) > 0.3
    assert found.head_rates == pytest.approx(first.double().mean(0).tolist()) and found.logit_range == sinks.logit_range(model.attention, x)
    away = added - added.mean()
    assert found.kurtosis == pytest.approx(float((away**4).mean() / (away**2).mean() ** 2))
    assert found.positions == pytest.approx(sinks.sink_metric(w).tolist())


def test_training_warms_up_over_twenty_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[float, float]] = []

    class Watched(torch.optim.AdamW):
        def step(self, *given: object) -> None:  # type: ignore[override]
            seen.append((self.param_groups[0]["lr"], self.param_groups[0]["weight_decay"]))
            super().step(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    found = sinks.sink_experiment("softmax", steps=23, length=4, dim=8, heads=1, batch=8, lr=0.04)
    assert [one for one, _ in seen] == pytest.approx([0.04 * min(n, 20) / 20 for n in range(1, 24)]) and {two for _, two in seen} == {0.01}
    assert len(set(found.loss)) == 23 and found.plot().startswith("<svg")


@torch.no_grad()
def test_the_range_of_logits() -> None:
    layer, x = regard.nn.Attention(8, 2), torch.randn(2, 5, 8)
    q, k = (w(x).view(2, 5, 2, 4) for w in (layer.q, layer.k))
    spans = []
    for b in range(2):
        for h in range(2):
            for i in range(5):
                s = k[b, : i + 1, h] @ q[b, i, h] / 2
                spans.append(float(s.max() - s.min()))
    assert sinks.logit_range(layer, x) == pytest.approx(sum(spans) / len(spans), rel=1e-5)


def test_says_what_is_wrong() -> None:
    with pytest.raises(regard.RegardError, match="k-bias"):
        sinks.studied("kbias")
