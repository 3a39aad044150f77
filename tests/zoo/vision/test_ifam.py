"""First values, noise, refusals and extreme scores of the two-stage transformer and the losses of part maps."""

import pytest
import torch

from regard import RegardError, models
from regard.nn.images import part_maps, timm_host
from regard.nn.images.part_discovery import PartDiscovery
from regard.nn.images.vit_host import masked_tokens
from regard.zoo.vision.ifam import WEIGHTS, TwoStageFaithful, faithfulness_test, ifam_losses


def vit(**options):
    made = timm_host.load("timm").models.vision_transformer.VisionTransformer
    return made(**{"img_size": 16, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2, "num_classes": 0, **options})


def test_first_values():
    torch.manual_seed(0)
    layer = PartDiscovery(100, 8, 200)
    assert float(layer.prototypes.abs().max()) <= 0.1 < 0.12 and float(layer.prototypes.std()) == pytest.approx(0.1 / 3**0.5, rel=0.1)
    assert (
        float(layer.head.weight.std()) == pytest.approx(0.02, rel=0.1)
        and layer.head.bias is None
        and layer.norm.normalized_shape == (100, 9)
    )
    assert layer.drop.p == layer.mask_dropout == 0.3 and layer.temperature == 1.0 and WEIGHTS["border"] == 2.0 and len(WEIGHTS) == 8
    model = TwoStageFaithful(vit(), vit())
    assert model.head.weight.shape == (200, 8) and model.discovery.parts == 8 and model.norm is not model.second.norm


def test_noise_is_drawn_always_or_in_training():
    x = torch.randn(2, 4, 6)
    for draws, training, same in (("always", False, False), ("training", False, True), ("training", True, False)):
        layer = PartDiscovery(6, 3, 4, draws=draws).train(training)
        assert torch.equal(layer(x, (2, 2)).maps, layer(x, (2, 2)).maps) == same
    torch.manual_seed(0)
    drawn = torch.stack([PartDiscovery(6, 1, 4, draws="always").eval()(torch.zeros(1, 400, 6), (20, 20)).maps for _ in range(5)])
    assert 0.4 < float((drawn[:, :, 0] > 0.5).float().mean()) < 0.6


def test_hidden_keys_may_be_huge():
    host, images = vit().double(), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        for block in host.blocks:
            block.attn.qkv.weight.mul_(100)
    keep = torch.ones(2, 16, dtype=torch.float64)
    keep[0, 3:] = 0
    keep.requires_grad_()
    out = masked_tokens(host, images, keep)
    assert out.isfinite().all()
    out.sum().backward()
    assert keep.grad.isfinite().all() and float(keep.grad.abs().max()) > 0
    nothing = masked_tokens(host, images, torch.zeros(2, 16, dtype=torch.float64), remove=True)
    assert nothing.shape == (2, 2, 8) and nothing.isfinite().all()


def test_the_shipped_transformer_is_faithful():
    model = TwoStageFaithful(models.load("digits-vit"), models.load("digits-vit"), 10, 3).eval()
    images, mask = torch.randn(2, 3, 32, 32), (torch.rand(2, 64) < 0.3).float()
    assert float(faithfulness_test(model, images, mask, torch.Generator().manual_seed(0)).max()) < 1e-5
    out = model(images)
    assert out.logits.shape == (2, 10) and out.parts.logits.shape == (2, 3, 10) and out.parts.maps.shape == (2, 4, 8, 8)


def test_both_stages_are_trained_together():
    torch.manual_seed(0)
    model = TwoStageFaithful(vit(), vit(), 3, 2).train()
    found = ifam_losses(model, torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0]), 30.0, (1, -1), 0.9)
    sum(WEIGHTS[name] * term for name, term in found.items()).backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not float(p.grad.abs().max()) > 0]
    assert set(found) == set(WEIGHTS) and not idle


def test_turning_and_turning_back():
    torch.manual_seed(0)
    x = torch.zeros(1, 1, 21, 21)
    x[0, 0, 6:14, 5:16] = 1
    there = part_maps.turned(x, 40.0, (2, -1), 1.2)
    again = part_maps.turned(there, 40.0, (2, -1), 1.2, back=True)
    off = float((again - x).abs().mean())
    others = [part_maps.turned(there, *move, back=True) for move in ((-40.0, (2, -1), 1.2), (40.0, (-2, 1), 1.2), (40.0, (2, -1), 0.9))]
    assert off < 0.05 and all(float((one - x).abs().mean()) > off + 0.02 for one in others)


def test_refusals():
    images = torch.zeros(1, 3, 16, 16)
    for options in ({"draws": "never"}, {"parts": 0}, {"temperature": 0.0}, {"thresholds": torch.zeros(2)}):
        with pytest.raises(RegardError, match="positive numbers"):
            PartDiscovery(8, **{"parts": 3, **options})
    with pytest.raises(RegardError, match="class token"):
        TwoStageFaithful(vit(), vit(class_token=False, global_pool="avg"))
    model = TwoStageFaithful(vit(), vit(), 3, 2)
    with pytest.raises(RegardError, match="parts from 0 to 1"):
        model.eval()(images, removed=[2])
    with pytest.raises(RegardError, match=r"expected eval\(\)"):
        model.train()(images, removed=[1])
    with pytest.raises(RegardError, match="colours=3"):
        model(images[0])
    with pytest.raises(RegardError, match="patches=16"):
        model.seen(images, torch.ones(1, 15))
    with pytest.raises(RegardError, match="2 x 2, dim=8"):
        model.discovery(torch.zeros(1, 5, 8), (2, 2))
    with pytest.raises(RegardError, match="at least 3 x 3"):
        part_maps.presence(torch.ones(1, 2, 2, 2) / 2)
