"""Patches of models that call PyTorch's fused kernel themselves: timm's vision transformers, diffusers' UNet and transformers."""

from __future__ import annotations

import copy

import pytest
import torch

from regard import RegardError
from regard.adapt import patch
from regard.nn.images.timm_host import load


def vit(**options):
    torch.manual_seed(0)
    made = load("timm").create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=32, num_heads=2, num_classes=5, **options
    )
    return made.eval(), (torch.randn(2, 3, 32, 32),)


def unet():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    made = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    return made.eval(), (torch.randn(2, 4, 8, 8), torch.tensor(3), torch.randn(2, 5, 12))


def dit():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    made = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=6,
        out_channels=4,
        pos_embed_max_size=8,
    )
    return made.eval(), (torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12), torch.randn(2, 6), torch.tensor([3, 3]))


HOSTS = {"vit": vit, "unet": unet, "dit": dit}


def out_of(model, inputs):
    with torch.no_grad():
        found = model(*inputs)
    return found if isinstance(found, torch.Tensor) else found.sample


@pytest.mark.parametrize("host", HOSTS)
def test_softmax_is_what_it_was_and_others_are_not(host):
    model, inputs = HOSTS[host]()
    own = out_of(model, inputs)
    keys = set(model.state_dict())
    with patch(model, "softmax") as applied:
        torch.testing.assert_close(out_of(model, inputs), own, atol=1e-5, rtol=1e-5)
        assert len(applied.modules) >= 2
    with patch(model, "sigmoid"), patch(model, "softmax", layers=[0]):
        inner = out_of(model, inputs)
    with patch(model, "sigmoid"):
        outer = out_of(model, inputs)
    assert not torch.allclose(inner, own, atol=1e-4) and not torch.allclose(outer, own, atol=1e-4)
    assert torch.equal(out_of(model, inputs), own) and set(model.state_dict()) == keys
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_a_copy_is_not_patched_and_an_error_leaves_nothing_open():
    model, (images,) = vit()
    own = out_of(model, (images,))
    with patch(model, "sigmoid"):
        assert torch.equal(out_of(copy.deepcopy(model), (images,)), own)
        patched = out_of(model, (images,))
        with pytest.raises(RuntimeError):
            model.blocks[0].attn(torch.zeros(1, 4, 7))
        assert torch.equal(torch.nn.functional.scaled_dot_product_attention(*[torch.ones(1, 1, 2, 4)] * 3), torch.ones(1, 1, 2, 4))
        assert torch.equal(out_of(model, (images,)), patched)


def test_the_vit_computes_the_mechanism():
    """Sigmoid attention in each block, from the model's own weights."""
    model, (images,) = vit()
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    for block in model.blocks:
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        p = torch.sigmoid(q @ k.mT / 4 - torch.log(torch.tensor(float(k.shape[2]))))
        x = x + block.attn.proj((p @ v).transpose(1, 2).flatten(-2))
        x = x + block.mlp(block.norm2(x))
    with patch(model, "sigmoid"):
        torch.testing.assert_close(out_of(model, (images,)), model.forward_head(model.norm(x)).detach(), atol=1e-5, rtol=1e-5)


def test_layers_heads_inputs_and_gradients():
    model, (images,) = vit()
    own = out_of(model, (images,))
    with patch(model, "sigmoid", layers=[1], heads=[0]):
        one = out_of(model, (images,))
    with patch(model, "sigmoid", layers=[1], heads=[0, 1]):
        both = out_of(model, (images,))
    with patch(model, "sigmoid", layers=[1]):
        assert torch.equal(out_of(model, (images,)), both)
    assert len({float(x.sum()) for x in (own, one, both)}) == 3
    with patch(model, "ssmax") as applied:
        model(images).sum().backward()
        assert all(p.grad is not None for p in applied.inputs.parameters())
    assert model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


def test_refused():
    model, _ = vit()
    for options, words in (
        ({"mechanism": "gla"}, "reads the past alone|sees the whole|whole sequence"),
        ({"mechanism": "softpick", "layers": [7]}, r"layers=\[7\]"),
        ({"mechanism": "softpick", "heads": [2]}, r"heads=\[2\]"),
        ({"mechanism": "softpick", "when": "decode"}, "does not decode"),
        ({"mechanism": "sofpick"}, "Did you mean"),
    ):
        with pytest.raises(RegardError, match=words):
            patch(model, options.pop("mechanism"), **options)
    model.blocks[0].attn.fused_attn = False
    with pytest.raises(RegardError, match="fused_attn"):
        patch(model, "softpick")
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_a_processor_that_computes_attention_itself_is_said_so():
    model, inputs = unet()
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    model.set_attn_processor(AttnProcessor())
    with patch(model, "sigmoid"), pytest.raises(RegardError, match="set_attn_processor"):
        model(*inputs)
    model.set_attn_processor(AttnProcessor2_0())
    with patch(model, "sigmoid"):
        assert out_of(model, inputs).isfinite().all()
