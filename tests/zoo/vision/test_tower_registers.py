"""Registers at test time in vision towers of transformers, alone and inside a vision-language model."""

import pytest
import torch
from torch import nn

from regard import RegardError
from regard.nn.images import timm_host
from regard.nn.images.register_tokens import Registers, tower_registers

VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}


def language_model():
    timm_host.load("torchvision")  # transformers reads it
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    text = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2
    )
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION), text_config=text, image_token_index=39, image_seq_length=16
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


def tower_of(model):
    return model.model.vision_tower


def planted(tower, layer=1, unit=5):
    """Unit 5 of block 1 fires where a patch has a large first channel, and writes a large vector."""
    mlp = tower.encoder.layers[layer].mlp
    with torch.no_grad():
        mlp.fc1.weight[unit], mlp.fc1.bias[unit] = 0, -6.0
        mlp.fc1.weight[unit, 0] = 4.0
        mlp.fc2.weight[:, unit] = 8.0 * torch.randn(mlp.fc2.out_features).sign()
    return {layer: [unit]}


def hooks(tower):
    return [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in tower.modules()]


def sizes(hidden):
    norms = hidden[:, 1:].norm(dim=-1)
    return float((norms.amax(1) / norms.median(1).values).max())


@torch.no_grad()
def test_outliers_of_a_clip_tower_go_to_the_register_and_its_outputs_keep_their_length():
    tower, images = tower_of(language_model()), torch.randn(2, 3, 16, 16)
    neurons = planted(tower)
    before = tower(images, output_hidden_states=True)
    own = hooks(tower)  # transformers has some that read hidden states
    assert sizes(before.hidden_states[2]) > 3
    with tower_registers(tower, neurons):
        inside = tower(images, output_hidden_states=True)
    assert [x.shape for x in inside.hidden_states] == [x.shape for x in before.hidden_states] and len(inside.hidden_states) == 5
    assert inside.last_hidden_state.shape == (2, 17, 16) and sizes(inside.hidden_states[2]) < 2
    after = tower(images, output_hidden_states=True)
    assert torch.equal(after.last_hidden_state, before.last_hidden_state) and hooks(tower) == own
    with tower_registers(tower, {}, count=0):
        assert torch.equal(tower(images).last_hidden_state, before.last_hidden_state)


@torch.no_grad()
def test_a_tower_with_registers_by_hand():
    tower, images = tower_of(language_model()), torch.randn(2, 3, 16, 16)
    neurons = {**planted(tower), 2: [0, 7]}
    with tower_registers(tower, neurons, count=2, scale=0.5, patches="mean"):
        found = tower(images).last_hidden_state
    x = tower.pre_layrnorm(tower.embeddings(images))
    x = torch.cat((x, torch.zeros(2, 2, 16)), 1)
    for at, layer in enumerate(tower.encoder.layers):
        x = x + layer.self_attn(layer.layer_norm1(x))[0]
        act = layer.mlp.activation_fn(layer.mlp.fc1(layer.layer_norm2(x)))
        for unit in neurons.get(at, []):
            for image in act:
                peak = max(image[:, unit].tolist(), key=abs)
                image[1:17, unit] = image[1:17, unit].mean()
                image[17:, unit] = 0.5 * peak
        x = x + layer.mlp.fc2(act)
    assert torch.allclose(found, x[:, :17], atol=1e-5)


@torch.no_grad()
def test_a_vision_language_model_reads_as_many_image_tokens():
    model, images = language_model(), torch.randn(1, 3, 16, 16)
    neurons = planted(tower_of(model))
    words = torch.cat((torch.full((1, 16), 39), torch.tensor([[3, 7, 1]])), 1)
    plain = model(input_ids=words, pixel_values=images).logits
    with tower_registers(tower_of(model), neurons):
        moved = model(input_ids=words, pixel_values=images).logits
        told = model.generate(input_ids=words, pixel_values=images, max_new_tokens=3, do_sample=False)
    assert moved.shape == plain.shape and moved.isfinite().all() and not torch.allclose(moved, plain, atol=1e-4) and told.shape == (1, 22)
    assert torch.equal(model(input_ids=words, pixel_values=images).logits, plain)


def test_refusals():
    tower = tower_of(language_model())
    for options in ({"neurons": {9: [1]}}, {"neurons": {0: [32]}}, {"neurons": {0: [1]}, "count": 0}, {"neurons": {}, "patches": "half"}):
        with pytest.raises(RegardError, match="expected"), tower_registers(tower, **options):
            pass
    with pytest.raises(RegardError, match="vision tower"), tower_registers(nn.Linear(2, 2), {}):
        pass
    assert Registers({}).fit([]) is None
