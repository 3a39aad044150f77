"""Scores of units and what is measured of outliers, image by image and token by token."""

import pytest
import torch
from layers import vit

from regard import RegardError
from regard.nn.images.vit_host import embedded
from regard.zoo.vision.test_time_registers import TestTimeRegisters, find_register_neurons, outlier_metrics, watched


def host():
    torch.manual_seed(0)
    return vit().double().eval(), torch.randn(3, 3, 8, 8, dtype=torch.float64)


@torch.no_grad()
def by_hand(model, images):
    """Of each block, activations, the class token's weights on patches (mean of heads), and tokens behind it."""
    x, found = embedded(model, images), []
    for block in model.blocks:
        y = block.norm1(x)
        q, k, _ = block.attn.qkv(y).unflatten(-1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        p = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(1)[:, 0, 1:]
        x = x + block.attn(y)
        act = torch.nn.functional.gelu(block.mlp.fc1(block.norm2(x)))
        x = block.mlp.fc2(act) + x
        found.append((act, p, x))
    return found


def test_what_is_watched():
    model, images = host()
    seen, truth = watched(model, images), by_hand(model, images)
    for at, (act, _, x) in enumerate(truth):
        torch.testing.assert_close(seen.acts[at], act)
        torch.testing.assert_close(seen.norms[at], x.norm(dim=-1))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("quiet", [None, (0.1, 0.75)])
def test_units_rank_by_their_activation_on_outliers(layer, quiet):
    model, images = host()
    truth = by_hand(model, images)
    norms = truth[layer][2].norm(dim=-1)[:, 1:]
    threshold = float(norms[:2].max(1).values.min()) - 1e-6
    scores = {}
    for at, (act, _, _) in enumerate(truth):
        for unit in range(act.shape[2]):
            total = 0.0
            for b in range(3):
                places = [1 + t for t in range(4) if float(norms[b, t]) > threshold]
                still = sum(float(v) < quiet[0] for v in act[b, :, unit]) / 5 >= quiet[1] if quiet else True
                if places and still:
                    total += sum(abs(float(act[b, t, unit])) for t in places) / len(places)
            scores[at, unit] = total
    for last in (None, 0):
        allowed = sorted((key for key in scores if last is None or key[0] <= last), key=lambda key: -scores[key])[:6]
        wanted = {at: [unit for level, unit in allowed if level == at] for at in dict(allowed)}
        assert find_register_neurons(model, images, threshold, layer, top=6, last=last, quiet=quiet) == wanted
    assert sum(map(len, find_register_neurons(model, images, threshold, layer).values())) == 10


def test_sizes_and_shares_of_outliers():
    model, images = host()
    outliers = torch.tensor([[True, False, True, False], [False] * 4, [False, False, False, True]])
    found = outlier_metrics(model, images, outliers)
    for at, (_, p, x) in enumerate(by_hand(model, images)):
        sizes = x[:, 1:].norm(dim=-1)
        ratios = [float(row.max()) / sorted(row.tolist())[1] for row in sizes]  # the lower of the two in the middle
        assert float(found["norms"][at]) == pytest.approx(max(ratios))
        assert float(found["share"][at]) == pytest.approx(sum(float(p[b][outliers[b]].sum()) for b in range(3)) / 3)
    assert float(outlier_metrics(model, images)["share"].abs().max()) == 0 and found["share"].shape == (2,)


def test_registers_stand_behind_the_patches_and_are_no_patches():
    model, images = host()
    net = TestTimeRegisters(model, {0: [1]}, 2, (1.0, 0.5))
    with torch.no_grad():
        tokens = net.all_tokens(images)
        sizes = tokens[:, 1:5].norm(dim=-1)
        assert tokens.shape == (3, 7, 16)
        torch.testing.assert_close(net.forward_features(images), model.norm(tokens[:, :5]))
        assert float(outlier_metrics(net, images)["norms"][1]) == pytest.approx(float((sizes.amax(1) / sizes.median(1).values).max()))
    whole = TestTimeRegisters(model, {}, 0)
    with torch.no_grad():
        torch.testing.assert_close(whole(images), model(images))
    for place in (0, 3):
        assert TestTimeRegisters(model, {0: [1]}, 0, place=place).all_tokens(images).shape == (3, 5, 16)


def test_inputs_refused():
    model, images = host()
    net = TestTimeRegisters(model, {0: [1]})
    for bad in (images[0], images[:, :2]):
        with pytest.raises(RegardError, match="colours=3"):
            net(bad)
    with pytest.raises(RegardError, match="expected a tensor"):
        net(images.tolist())
    with pytest.raises(RegardError, match="top=0"):
        find_register_neurons(model, images, 0.0, top=0)
    for place in (-1, 4):
        with pytest.raises(RegardError, match=f"place={place}"):
            TestTimeRegisters(model, {0: [1]}, 0, place=place)(images)
    model.blocks[0].mlp.act = None
    with pytest.raises(RegardError, match="expected timm's Mlp"):
        watched(model, images)
