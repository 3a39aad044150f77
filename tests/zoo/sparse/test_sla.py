"""SLA in a diffusion transformer: what it computes there, what fine-tuning gains over sparse attention alone, and what is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F

from regard import RegardError
from regard.adapt.intercept import patch_layers
from regard.zoo.sparse.sla import block_classes, finetune_sla, swap_sla

diffusers = pytest.importorskip("diffusers")
SLA = {"block_size": 8, "top": 0.25, "bottom": 0.125}


@pytest.fixture
def dit():
    torch.manual_seed(0)
    made = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=1,
        num_embeds_ada_norm=10,
    )
    for name, p in made.named_parameters():
        p.data.mul_(4 if "to_v" in name else 1)
    return made.eval()


def batch(step, count=4):
    draw = torch.Generator().manual_seed(step)
    x = F.interpolate(torch.randn(count, 4, 4, 4, generator=draw), (8, 8), mode="bilinear")
    return x, torch.randint(10, (count,), generator=draw), torch.randint(10, (count,), generator=draw)


def run(model, given):
    x, t, label = given
    return model(x, t, class_labels=label).sample


def test_it_begins_as_sparse_attention_of_the_model(dit):
    given, seen = batch(0), []
    with torch.no_grad():
        own = run(dit, given)
        with patch_layers(dit, lambda heads, width: Seen(seen, heads, width)):
            assert torch.allclose(run(dit, given), own, atol=1e-5) and len(seen) == 2
        patch = swap_sla(dit, [1], **SLA)
        assert len(patch.layers) == 1 and patch.layers[0].top == 0.25
        found = run(dit, given)
        patch.restore()
        with patch_layers(dit, lambda heads, width: Sparse(), [1]):
            assert torch.allclose(found, run(dit, given), atol=1e-5) and not torch.allclose(found, own, atol=1e-3)
        assert torch.equal(run(dit, given), own)


class Seen(torch.nn.Module):
    def __init__(self, seen, heads, width):
        super().__init__()
        self.seen, self.shape = seen, (heads, width)

    def forward(self, q, k, v):
        assert (q.shape[1], q.shape[3]) == self.shape
        self.seen.append(q)
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


class Sparse(torch.nn.Module):
    def forward(self, q, k, v):
        keep = block_classes(q, k, 8, 0.25, 0.125)[0].repeat_interleave(8, -1).repeat_interleave(8, -2)
        return (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~keep, -torch.inf).softmax(-1) @ v


def test_fine_tuning_brings_it_back_to_the_model(dit):
    teacher = copy.deepcopy(dit)

    def loss(model, given):
        with torch.no_grad():
            truth = run(teacher, given)
        return F.mse_loss(run(model, given), truth)

    kept = copy.deepcopy(dit.state_dict())
    with swap_sla(dit, **SLA) as patch:
        held = batch(999, 16)
        before = float(loss(dit, held))
        losses = finetune_sla(dit, patch, batch, loss, steps=60, lr=1e-2, whole=False)
        assert all(torch.equal(x, kept[name]) for name, x in dit.state_dict().items()) and len(losses) == 60
        after = float(loss(dit, held))
        assert after < 0.8 * before and all(x.linear.weight.abs().max() > 0 for x in patch.layers)
        finetune_sla(dit, patch, batch, loss, steps=40, lr=1e-3)
        assert float(loss(dit, held)) < 0.9 * after and any(not torch.equal(x, kept[name]) for name, x in dit.state_dict().items())


def test_what_is_refused(dit):
    with pytest.raises(RegardError, match=r"layers=\[5\]"):
        swap_sla(dit, [5])
    with pytest.raises(RegardError, match="steps=0"), swap_sla(dit, **SLA) as patch:
        finetune_sla(dit, patch, batch, lambda model, given: None, steps=0)
    with pytest.raises(RegardError, match="attention layer"):
        swap_sla(torch.nn.Linear(2, 2))
    patch, x = swap_sla(dit, **SLA), torch.randn(1, 2, 8, 8)
    for options in ({"is_causal": True}, {"attn_mask": torch.ones(8, 8)}, {"dropout_p": 0.1}, {"scale": 0.5}, {"enable_gqa": True}):
        with pytest.raises(RegardError, match=next(iter(options))):
            patch.attend(0, x, x, x, **options)
