"""DHA: plans that do not fit are refused; masks, biases and generation."""

import pytest
import torch

pytest.importorskip("transformers")
from regard import RegardError
from regard.lab.checks.shared.decoding import llama
from regard.zoo.systems.dha import DHAAttention, FusionLoss, fold_dha, fusing, fusion_loss, search, to_dha

PLAN = {"key": [(0, 1, 1, 0), (0, 0, 0, 0)], "value": [(0, 0, 1, 2), (0, 1, 2, 3)]}


def test_bad_plans_are_refused():
    model = llama(heads=8, kv_heads=4)
    for options in ({}, {"key_heads": [1, 1]}, {"key_heads": [1, 1], "value_heads": [1, 1], "total": 8}):
        with pytest.raises(RegardError, match="expected key_heads and value_heads"):
            search(model, **options)
    for options in (
        {"key_heads": [0, 1], "value_heads": [1, 1]},
        {"key_heads": [5, 1], "value_heads": [1, 1]},
        {"key_heads": [1], "value_heads": [1, 1]},
    ):
        with pytest.raises(RegardError, match="a number from 1 to 4"):
            search(model, **options)
    with pytest.raises(RegardError, match="from one a set"):
        search(model, total=3)
    before = list(model.modules())
    with pytest.raises(RegardError, match="numbered in order"):
        to_dha(model, {"key": [(1, 0, 0, 0)] * 2, "value": [(0, 0, 0, 0)] * 2})
    assert list(model.modules()) == before
    with pytest.raises(RegardError, match="not folded yet"):
        fusion_loss(model)
    with pytest.raises(RegardError, match="parts"):
        fusing(10, 10, parts=0)
    stages = fusing(9, 4, parts=3)
    assert [round(stage.loss.target, 9) for stage in stages] == [round(4 / 3, 9), round(2 / 3, 9), 0.0, 0.0] and stages[-1].learn == ("*",)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_padded_batches_and_generation(implementation):
    torch.manual_seed(0)
    model = llama(heads=8, kv_heads=4)
    to_dha(model, PLAN)
    fold_dha(model).float()
    model.set_attn_implementation(implementation)
    a, b = torch.randint(1, 50, (1, 9)), torch.randint(1, 50, (1, 5))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    alone = [model.generate(x, attention_mask=torch.ones_like(x), **options)[0, x.shape[1] :] for x in (a, b)]
    ids = torch.cat((a, torch.cat((torch.zeros(1, 4, dtype=torch.long), b), 1)))
    keep = (torch.arange(9) >= torch.tensor([[0], [4]])).long()
    assert torch.equal(model.generate(ids, attention_mask=keep, **options)[:, 9:], torch.stack(alone))
    assert not any("multipliers" in name for name, _ in model.named_parameters())


def test_biases_are_mixed_and_folded():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "vocab_size": 9,
    }
    model = LlamaForCausalLM(LlamaConfig(attention_bias=True, **sizes)).double().eval()
    for p in model.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    ids = torch.randint(9, (1, 6))
    with torch.no_grad():
        truth = model(ids).logits
        conversion = to_dha(model, {"key": [(0, 0, 1, 1)], "value": [(0, 1, 0, 1)]})
        assert torch.allclose(model(ids).logits, truth, atol=1e-12)
        layer = next(iter(conversion.students.values()))
        layer.k_proj.mix.copy_(torch.tensor([[0.3, 0.6, 0, 0]] * 2 + [[0, 0, 1.5, 0.2]] * 2))
        layer.v_proj.mix.copy_(torch.tensor([[0.3, 0, 0.6, 0], [0, 2.0, 0, 1.0]] * 2))
        mixed = model(ids).logits
        assert not torch.allclose(mixed, truth, atol=1e-3)
        assert torch.allclose(fold_dha(model)(ids).logits, mixed, atol=1e-12)


def test_stages_of_fusing():
    stages = fusing(10, 4, parts=3, climb=7.0, betas=(0.8, 0.9))
    assert [stage.steps for stage in stages] == [4, 4, 4, 4] and [stage.lr for stage in stages] == [3e-2] * 3 + [5e-3]
    assert all(stage.learn == ("*.mix", "*.multipliers") and stage.loss.climb == 7.0 for stage in stages[:3])
    assert [stage.schedule == "cosine" for stage in stages] == [stages[0].schedule == "cosine"] * 3 + [True]
    assert {stage.betas for stage in stages} == {(0.8, 0.9)}
    assert [stage.lr for stage in fusing(3, 1, parts=1, lr=1.0, lr_together=2.0)] == [1.0, 2.0]


def test_multipliers_climb_and_mixtures_fall():
    model = llama(heads=8, kv_heads=4)
    conversion = to_dha(model, PLAN)
    first = next(iter(conversion.students.values()))
    first.multipliers.data = torch.tensor([0.5, 2.0], dtype=torch.float64)
    ids = torch.randint(1, 50, (2, 7))
    gap = fusion_loss(model) - 0.7
    task = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    total = task + 3 * (0.5 * gap + 2.0 * gap**2)
    mix = first.k_proj.mix
    truth = torch.autograd.grad(total, mix)[0]
    loss = FusionLoss(0.7, climb=3.0)(model, ids)
    found = torch.autograd.grad(loss, (mix, first.multipliers))
    assert torch.allclose(loss, total) and torch.allclose(found[0], truth)
    assert torch.allclose(found[1], -torch.stack((gap, gap**2)).detach())  # a step against the gradient climbs


def test_attention_drops_in_training_alone():
    model = llama(heads=8, kv_heads=4)
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    to_dha(model, PLAN)
    ids = torch.randint(1, 50, (2, 7))
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


def test_layers_that_dha_has_no_part_for_are_refused():
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 8, "num_hidden_layers": 1}
    sliding = MistralForCausalLM(MistralConfig(vocab_size=9, sliding_window=4, **sizes)).model.layers[0].self_attn
    for layer in (torch.nn.Linear(2, 2), sliding):
        with pytest.raises(RegardError, match="expected"):
            DHAAttention(layer, (0, 1), (0, 1))
