"""What the checks of normgrad do not hold: bad input, other shapes, frozen models."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import regard
from regard.interpret import class_sensitivity, combine, meta_saliency, saliency


def net():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GELU(), nn.Conv2d(4, 5, 3, padding="same"), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)
    )


def test_frozen_models_and_resized_maps():
    model, x = net(), torch.randn(2, 3, 7, 9)
    own = saliency(model, x, 1, "1")
    model.requires_grad_(False)
    torch.testing.assert_close(saliency(model, x, lambda out: out[:, 1], model[1]), own)
    assert saliency(model, x, 1, "0", resize=True).shape == (2, 1, 7, 9) and saliency(model, x, 1, "0", resize=(3, 5)).shape == (2, 1, 3, 5)
    assert all(p.grad is None for p in model.parameters()) and not model[0]._forward_hooks
    with torch.no_grad():
        torch.testing.assert_close(saliency(model, x, 1, "1"), own)
    before = [p.clone() for p in model.parameters()]
    meta_saliency(lambda: saliency(model, x, 1, "1"), model, x, 1, lr=1.0)
    assert all(torch.equal(a, b) and not b.requires_grad for a, b in zip(before, model.parameters()))


def test_decoders_give_maps_of_tokens():
    model, ids = regard.nn.Decoder(vocab=9, dim=16, layers=2, heads=4), torch.randint(9, (2, 5))
    for layer in ("blocks.0.mixer.q", "blocks.1.mlp.down", "blocks.1"):
        found = saliency(model, ids, lambda out: out[:, 2, 3], layer)
        assert found.shape == (2, 5) and not found[:, 3:].any() and found[:, 2].all()  # nothing behind token 2 has a part in it


def test_bad_input_is_refused():
    model, x = net(), torch.randn(2, 3, 7, 9)
    for args, options, message in (
        ((1, "7"), {}, "layer"),
        ((1, nn.Linear(2, 2)), {}, "layer"),
        ((1, "0"), {"rule": "cam"}, "rule"),
        ((4, "0"), {}, "target"),
        ((1, "1"), {"rule": "true_layer"}, "nn.Linear"),
        ((1, "2"), {"rule": "true_layer"}, "nn.Conv2d"),
        ((lambda out: torch.ones(2, requires_grad=True), "0"), {}, "does not depend"),
    ):
        with pytest.raises(regard.RegardError, match=message):
            saliency(model, x, *args, **options)
    with pytest.raises(regard.RegardError, match="expected"):
        combine([x[:, :1]], mode="max")
    for weights in ([1, 2], [-1], [0], "accuracy"):
        with pytest.raises(regard.RegardError, match="weights"):
            combine([x[:, :1]], weights)
    even = combine([torch.ones(1, 1, 2, 2), torch.rand(1, 1, 2, 2)])
    assert bool(even.isfinite().all())


def test_maps_as_one_by_hand():
    maps = [torch.rand(2, 1, 4, 6), 3 * torch.rand(2, 1, 4, 6) + 1, torch.rand(2, 1, 2, 3)]
    unit = []
    for m in maps:
        m = nn.functional.interpolate(m, (4, 6), mode="bilinear") if m.shape[2] == 2 else m
        low, high = m.flatten(1).min(1).values[:, None, None, None], m.flatten(1).max(1).values[:, None, None, None]
        unit.append((m - low) / (high - low))
    for weights, w in (("uniform", (1, 1, 1)), ("linear", (1, 2, 3)), ((2, 0, 6), (2, 0, 6))):
        w = [x / sum(w) for x in w]
        torch.testing.assert_close(combine(maps, weights), sum(x * m for x, m in zip(w, unit, strict=True)))
        product = unit[0] ** w[0] * unit[1] ** w[1] * unit[2] ** w[2]
        torch.testing.assert_close(combine(maps, weights, "product"), product)
    torch.testing.assert_close(combine(maps), combine(maps, "uniform", "sum"))


@pytest.mark.parametrize("options", [{}, {"padding": 1, "stride": 2}, {"padding": (0, 2), "dilation": (1, 2), "stride": (2, 1)}])
def test_a_convolution_s_own_weights(options):
    """|d score / d y_u| times the length of what the kernel reads at u, place by place."""
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, (3, 2), **options)
    model, x = nn.Sequential(conv, nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)), torch.randn(2, 2, 7, 8)
    y = conv(x).detach().requires_grad_()
    (slope,) = torch.autograd.grad(model[1:](y)[:, 1].sum(), y)
    pad, step, gap = (one if isinstance(one, tuple) else (one, one) for one in (conv.padding, conv.stride, conv.dilation))
    padded = nn.functional.pad(x, (pad[1], pad[1], pad[0], pad[0]))
    found = saliency(model, x, 1, "0", "true_layer")
    for i in range(y.shape[2]):
        for j in range(y.shape[3]):
            patch = torch.stack([padded[:, :, i * step[0] + a * gap[0], j * step[1] + b * gap[1]] for a in range(3) for b in range(2)], -1)
            truth = slope[:, :, i, j].norm(dim=1) * patch.flatten(1).norm(dim=1)
            torch.testing.assert_close(found[:, 0, i, j], truth)
    with torch.no_grad():
        resized = nn.functional.interpolate(found, (7, 8), mode="bilinear", align_corners=False)
    torch.testing.assert_close(saliency(model, x, 1, "0", "true_layer", resize=True), resized)


def test_scores_of_dense_outputs_and_classes_of_each_example():
    dense, x = nn.Conv2d(2, 3, 1), torch.randn(2, 2, 4, 5)
    found = saliency(dense, x, torch.tensor([2, 0]), dense, "gradient")
    assert torch.equal(found, torch.ones(2, 1, 4, 5))  # logits (B, classes, H, W) are summed over places
    model, x = net(), torch.randn(3, 3, 7, 9)
    both = saliency(model, x, torch.tensor([1, 3, 0]), "1")
    torch.testing.assert_close(both, torch.cat([saliency(model, x[n : n + 1], k, "1") for n, k in enumerate((1, 3, 0))]))
    named = nn.Module()
    named.inner, named.forward = model, lambda pixels: SimpleNamespace(logits=model(pixels))
    torch.testing.assert_close(saliency(named, {"pixels": x}, 1, "inner.1"), saliency(model, x, 1, "1"))


def test_sensitivity_and_the_step_before_a_map_by_hand():
    model, x = net(), torch.randn(4, 3, 7, 9)
    maps = {k: torch.rand(4, 1, 3, 3) for k in range(4)}
    logits = model(x)

    def method(classes):
        return torch.stack([maps[int(k)][n] for n, k in enumerate(classes)])

    found = class_sensitivity(method, model, x)
    for n in range(4):
        a, b = (maps[int(at[n])][n].flatten() for at in (logits.argmax(1), logits.argmin(1)))
        assert float(found[n]) == pytest.approx(float(torch.corrcoef(torch.stack((a, b)))[0, 1]), abs=1e-5)
    assert not class_sensitivity(lambda classes: torch.ones(4, 1, 3, 3), model, x).any()
    model.train()
    for options, sign in (({"lr": 0.5}, -1), ({"lr": 0.5, "negate_loss": True}, 1), ({}, -0.0002)):
        loss = nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 3]))
        slope = torch.autograd.grad(loss, model[5].weight)[0]
        before, seen = model[5].weight.detach().clone(), []
        meta_saliency(
            lambda seen=seen: seen.append((model[5].weight.detach().clone(), model.training)),
            model,
            x,
            torch.tensor([0, 1, 2, 3]),
            **options,
        )
        torch.testing.assert_close(seen[0][0], before + sign * 0.5 * slope)
        assert not seen[0][1] and model.training and torch.equal(model[5].weight, before)


class Reader(nn.Module):
    """A recurrent layer, whose output is a tuple, a mark behind its first part, and a readout that reads its state too."""

    def __init__(self):
        super().__init__()
        self.read, self.mark, self.last, self.idle = nn.GRU(3, 4, batch_first=True), nn.Identity(), nn.Linear(4, 2), nn.Linear(4, 4)

    def forward(self, x):
        y, state = self.read(x)
        return self.last(input=self.mark(y).tanh()).mean(1) + state[0][:, :2]


@pytest.mark.parametrize("frozen", [False, True])
def test_layers_that_give_more_than_one_tensor_are_seen_by_their_first(frozen):
    torch.manual_seed(0)
    model, x = Reader().requires_grad_(not frozen), torch.randn(2, 5, 3)
    for rule in ("normgrad", "gradient_x_input"):
        own, behind = (saliency(model, x, 1, layer, rule) for layer in ("read", "mark"))
        assert own.shape == (2, 5) and bool(own.all())
        torch.testing.assert_close(own, behind)


def test_a_layer_that_is_called_by_the_name_of_its_input():
    torch.manual_seed(0)
    model, x = Reader(), torch.randn(2, 5, 3)
    found = saliency(model, x, 1, "last", "true_layer")
    torch.testing.assert_close(found, model.read(x)[0].detach().tanh().norm(dim=-1) / 5)  # the slope of a mean of five


def test_layers_that_do_not_run_once_are_refused():
    model, x = Reader(), torch.randn(2, 5, 3)
    twice = nn.Sequential(model.idle, nn.ReLU(), model.idle)
    for net, given, layer, times in ((model, x, "idle", 0), (twice, torch.randn(2, 4), "0", 2)):
        with pytest.raises(regard.RegardError, match=f"ran {times} times"):
            saliency(net, given, 1, layer)
        assert not any(part._forward_hooks for part in net.modules())


def test_the_largest_map_has_the_most_places():
    maps = [torch.rand(1, 1, *shape) for shape in ((8, 2), (4, 6), (3, 7))]
    found = combine(maps)
    assert found.shape == (1, 1, 4, 6) and combine(maps[::-1]).shape == (1, 1, 4, 6)
    own = (maps[1] - maps[1].min()) / (maps[1].max() - maps[1].min())
    torch.testing.assert_close(combine(maps, (0, 1, 0)), own)
