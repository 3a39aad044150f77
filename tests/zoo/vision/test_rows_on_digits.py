"""Rows that live in a ViT, on the trained ViT on digits that comes with regard."""

import torch
from torch import nn
from torch.nn import functional as F

from regard import models
from regard.adapt import replace
from regard.lab.checks.shared.shipped_vit import inked, unseen
from regard.nn.images.vit_host import masked_tokens
from regard.zoo.vision.gated_prompt_tuning import GatedPromptTuner
from regard.zoo.vision.lambda_vit import dilute
from regard.zoo.vision.spa import SelectPackAttention
from regard.zoo.vision.tcpa import TCPA


def vit():
    return models.load("digits-vit")


def some(count=16):
    drawn = unseen(count)
    return drawn.images, drawn.labels, inked(drawn)


class Packed(nn.Module):
    """A block's attention, packed: the class token and the patches of `keep` alone."""

    def __init__(self, attn, keep, length=None):
        super().__init__()
        self.pack, self.keep = SelectPackAttention(attn.qkv.in_features, attn.num_heads, length), keep
        self.pack.qkv, self.pack.out = attn.qkv, attn.proj

    def forward(self, x, *args, **options):
        return self.pack(x, self.keep)[0]


@torch.no_grad()
def test_spa_of_all_patches_is_the_vit_and_of_some_hides_the_others():
    images, _, ink = some()
    model = vit()
    plain = model(images)
    for shown in (torch.ones_like(ink), ink):
        keep = F.pad(shown, (1, 0), value=True)
        with replace(model, "blocks.*.attn", lambda attn, keep=keep: Packed(attn, keep)) as done:
            packed = model(images)
            assert len(done.names) == 6
        truth = model.forward_head(masked_tokens(model, images, shown.float(), remove=True))
        assert torch.allclose(packed, truth, atol=1e-4)
        assert torch.allclose(packed, plain, atol=1e-4) == bool(shown.all())
    with replace(model, "blocks.*.attn", lambda attn: Packed(attn, F.pad(ink, (1, 0), value=True), 16)):
        assert not torch.allclose(model(images), truth, atol=1e-3)  # packages of 16 cut images that keep more
    assert torch.equal(model(images), plain)


@torch.no_grad()
def test_lambda_vit_ends_without_its_attention():
    images, labels, _ = some(64)
    model = vit()
    plain, size, dim = model(images), sum(p.numel() for p in model.parameters()), model.embed_dim
    diluted = dilute(model, [4])
    assert torch.allclose(model(images), plain, atol=1e-5)
    diluted.lam = 0.0
    closed = model(images)
    diluted.strip()
    assert torch.allclose(model(images), closed, atol=1e-5)
    assert size - sum(p.numel() for p in model.parameters()) == 4 * dim**2 + 6 * dim
    assert float((closed.argmax(1) == labels).double().mean()) > 0.3  # of ten digits, without training


def learned(net, loss_of, steps=12):
    images, labels, _ = some(32)
    before = {name: p.clone() for name, p in net.vit.named_parameters()}
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(steps):
        loss = loss_of(net.train(), images, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(p, before[name]) for name, p in net.vit.named_parameters())
    return net


def test_gated_prompt_tuning_learns_in_front_of_the_frozen_vit():
    torch.manual_seed(0)
    net = GatedPromptTuner(vit(), 4, 10, pool="class", gate_init=1.0)
    dim = net.vit.embed_dim
    own = [p.numel() for name, p in net.named_parameters() if not name.startswith("vit.")]
    assert sum(own) == 4 * dim + 5 + 6 + 10 * dim + 10  # prompts, a gate for all blocks but the last, a temperature a block, the head
    with torch.no_grad():
        net.head.load_state_dict(vit().head.state_dict())
        images = some()[0]
        far = GatedPromptTuner(vit(), 1, 10, pool="class")
        far.head.load_state_dict(net.head.state_dict())
        far.prompts.zero_()
        assert float((far.eval()(images).argmax(1) == vit()(images).argmax(1)).double().mean()) > 0.8  # an empty prompt changes little
    learned(net, lambda net, x, y: F.cross_entropy(net(x), y))
    assert float((net.gates.detach() + 1).abs().max()) > 0 and float((net.temperatures.detach() - 1).abs().max()) > 0


def test_tcpa_learns_in_front_of_the_frozen_vit_and_patches_choose_for_themselves():
    torch.manual_seed(0)
    pools = {"size": 6, "length": 2, "top": 2}
    net = TCPA(vit(), 10, pools, pools)
    images, _, _ = some()
    keys = net.shared.keys.detach().clone()

    def loss(net, x, y):
        logits, matching = net(x)
        return F.cross_entropy(logits, y) + 0.1 * matching

    learned(net, loss)
    assert not torch.equal(net.shared.keys, keys)
    with torch.no_grad():
        seen, _ = net.visible(net.vit._pos_embed(net.vit.patch_embed(images)), 0)
    prompts = seen[:, :, 1:25]  # of the class token's pool, then of the patches'
    assert (prompts[:, 0, :12].sum(-1) == 4).all() and not prompts[:, 0, 12:].any()
    assert (prompts[:, 1:, 12:].sum(-1) == 4).all() and not prompts[:, 1:, :12].any()
    assert len({tuple(row.tolist()) for row in prompts[:, 1:, 12:].flatten(0, 1)}) > 1
