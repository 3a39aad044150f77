"""Checks of dcal."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.planes import image, layer_norm
from regard.lab.checks.shared.vits import block_by_hand, mlp_of, out_of, projected, scores, small_vit, tokens_by_hand
from regard.lab.verification import check
from regard.nn.images import timm_host
from regard.nn.images.vit_host import attention
from regard.nn.retrieval import retrieval_scores
from regard.tasks.identities import patterns, tracks
from regard.zoo.vision.dcal import DCAL, DCALOutput, chosen, glca, pairwise_cross_attention, rollout


def rolled_by_hand(vit: torch.nn.Module, x: Tensor, residual: bool = True) -> Tensor:
    total = torch.eye(x.shape[1], dtype=F64).expand(len(x), -1, -1)
    for block in vit.blocks:  # type: ignore[union-attr]
        q, k, _ = projected(block.attn, layer_norm(x, block.norm1, 1e-6))  # type: ignore[arg-type]
        s = scores(block.attn, q, k).softmax(-1).mean(1)
        s = 0.5 * s + 0.5 * torch.eye(x.shape[1], dtype=F64) if residual else s
        total = torch.einsum("bij,bjk->bik", s, total)
        x = block_by_hand(block, x)
    return total


@check(
    "dcal",
    "logits of all three ways and the loss, values and gradients, partners given == by hand: rollout, chosen queries, one softmax over two images",
    below=1e-10,
    control="two softmaxes, one an image",
)
def _() -> tuple[float, float]:
    net, images, partner, labels = (
        DCAL(small_vit(3), 3, 0.3).to(F64),
        torch.randn(3, 3, 16, 16, dtype=F64),
        torch.tensor([2, 0, 1]),
        torch.tensor([0, 2, 1]),
    )
    net.balance.data.copy_(torch.tensor([0.3, -0.2, 0.1]))
    vit = net.vit

    def by_hand(one: bool) -> tuple[list[Tensor], list[Tensor]]:
        x = pair = tokens_by_hand(vit, images)
        rolled = rolled_by_hand(vit, x)
        for block in vit.blocks:
            y, z = layer_norm(x, block.norm1, 1e-6), layer_norm(pair, block.norm1, 1e-6)
            (q, k, v), (_, k2, v2) = projected(block.attn, z), projected(block.attn, y[partner])
            s = torch.cat((scores(block.attn, q, k), scores(block.attn, q, k2)), -1)
            p = s.softmax(-1) if one else torch.cat([half.softmax(-1) / 2 for half in s.chunk(2, -1)], -1)
            pair = pair + out_of(block.attn, p @ torch.cat((v, v2), 2))
            pair = pair + mlp_of(block, pair)
            x = block_by_hand(block, x)
        rows = []
        for b in range(3):
            at = [0, *[1 + i for i in sorted(range(16), key=lambda i: -float(rolled[b, 0, 1 + i]))[:4]]]
            y = layer_norm(x[b : b + 1], net.local.norm1, 1e-6)
            q, k, v = projected(net.local.attn, y)
            h = x[b : b + 1, at] + out_of(net.local.attn, scores(net.local.attn, q[:, :, at], k).softmax(-1) @ v)
            rows.append(h + mlp_of(net.local, h))
        local = layer_norm(torch.cat(rows), net.local_norm, 1e-6)[:, 0]
        whole, both = (layer_norm(z, vit.norm, 1e-6)[:, 0] for z in (x, pair))
        logits = [
            whole @ net.head.weight.T + net.head.bias,
            local @ net.local_head.weight.T + net.local_head.bias,
            both @ net.head.weight.T + net.head.bias,
        ]
        return logits, [whole, local, both]

    out, (truth, tokens) = net(images, partner), by_hand(True)
    parts = [-z.log_softmax(1)[torch.arange(3), labels].mean() for z in truth]
    loss = sum((torch.exp(-net.balance[i]) * parts[i] + net.balance[i] for i in range(3)), torch.zeros((), dtype=F64)) / 2
    leaves = [p for name, p in net.named_parameters() if not name.startswith("vit.head")]
    assert all(z is not None for z in out)
    gaps = [naive.gap(a, b) for a, b in zip((*out[:3], *out.tokens), (*truth, *tokens), strict=True)]  # type: ignore[arg-type]
    gaps.append(naive.gap(out.features, torch.cat(tokens[:2], 1)))
    gaps.append(gap_with_gradients(net.loss(out, labels), loss, tuple(leaves)))
    return max(gaps), naive.gap(out[2], by_hand(False)[0][2])  # type: ignore[arg-type]


@check("dcal", "attention with the image itself as its partner, off self-attention", below=1e-12, control="with another image")
def _() -> tuple[float, float]:
    attn, y, other = small_vit(1).blocks[0].attn, image(2, 9, 16), image(2, 9, 16)
    plain = attention(attn, y)
    return naive.gap(pairwise_cross_attention(y, y, attn), plain), naive.gap(pairwise_cross_attention(y, other, attn), plain)


@check("dcal", "GLCA of all queries, off the rows of self-attention it keeps", below=1e-12, control="rows in their old order")
def _() -> tuple[float, float]:
    vit, images = small_vit(2), torch.randn(2, 3, 16, 16, dtype=F64)
    x = tokens_by_hand(vit, images)
    at, attn = chosen(rolled_by_hand(vit, x), 1.0), vit.blocks[0].attn
    y = vit.blocks[0].norm1(x)
    whole = attention(attn, y)
    return naive.gap(glca(attn, y, at), whole.gather(1, at[..., None].expand_as(whole))), naive.gap(glca(attn, y, at), whole)


@check("dcal", "rollout, off products of (S + I) / 2, rows of which sum to one", below=1e-12, control="products of S")
def _() -> tuple[float, float]:
    maps = [torch.rand(2, 3, 5, 5, dtype=F64).softmax(-1) for _ in range(3)]
    found = rollout(maps)
    truth = torch.eye(5, dtype=F64)
    plain = torch.eye(5, dtype=F64)
    for m in maps:
        truth, plain = (m.mean(1) + torch.eye(5)) / 2 @ truth, m.mean(1) @ plain
    return max(naive.gap(found, truth), naive.gap(found.sum(-1), torch.ones(2, 5))), naive.gap(found, plain)


@check(
    "dcal",
    "the loss with triplets of each way's class tokens, and its gradients, of three ways and of two == anchor by anchor",
    below=1e-10,
    control="triplets of self-attention's tokens alone",
)
def _() -> tuple[float, float]:
    net, labels = DCAL(small_vit(1), 3, 0.3).to(F64), torch.tensor([0, 2, 0, 1, 1, 2])
    net.balance.data.copy_(torch.tensor([0.3, -0.2, 0.1]))
    gaps, other = [], 0.0
    for ways in (3, 2):
        leaves = [torch.randn(6, size, dtype=F64, requires_grad=True) for size in (3, 5) for _ in range(ways)]
        first, tokens = (*leaves[:ways], None)[:3], (*leaves[ways:], None)[:3]
        out = DCALOutput(*first, tokens)  # type: ignore[arg-type]
        parts, plain = [], []
        for logits, token in zip(out[:3], out.tokens, strict=True):
            if logits is None or token is None:
                continue
            hardest = []
            for i in range(6):
                far = [((token[i] - token[j]).square().sum() + 1e-300).sqrt() for j in range(6) if j != i and labels[j] == labels[i]]
                near = [(token[i] - token[j]).square().sum().sqrt() for j in range(6) if labels[j] != labels[i]]
                hardest.append((0.7 + torch.stack(far).max() - torch.stack(near).min()).clamp_min(0))
            plain.append(-logits.log_softmax(1)[torch.arange(6), labels].mean())
            parts.append(plain[-1] + torch.stack(hardest).mean())
        assert len(parts) == ways
        w = net.balance
        truth = sum((torch.exp(-w[i]) * p + w[i] for i, p in enumerate(parts)), torch.zeros((), dtype=F64)) / 2
        wrong = sum((torch.exp(-w[i]) * p + w[i] for i, p in enumerate([parts[0], *plain[1:]])), torch.zeros((), dtype=F64)) / 2
        gaps.append(gap_with_gradients(net.loss(out, labels, 0.7), truth, (*leaves, net.balance)))
        other = naive.gap(truth, wrong)
    return max(gaps), other


def recognised(margin: float | None, steps: int) -> float:
    """mAP among new identities, of features after training on others, four images each in a batch."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    host = timm_host.load("timm").models.vision_transformer.VisionTransformer(
        img_size=8, patch_size=2, embed_dim=24, depth=2, num_heads=2, mlp_ratio=2.0, num_classes=0
    )
    net, looks = DCAL(host, 24, 0.3), patterns(24, generator)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(steps):
        at = torch.randperm(24, generator=generator)[:6]
        x, own, _ = tracks(looks[at], 4, generator, frames=1, empty=0, noise=1.0)
        optimizer.zero_grad()
        net.loss(net(x[:, 0]), at[own], margin).backward()
        optimizer.step()
    x, own, _ = tracks(patterns(20, generator), 4, generator, frames=1, empty=0, noise=1.0)
    with torch.no_grad():
        found = net.eval()(x[:, 0]).features
    query = torch.arange(80) % 4 == 0
    return retrieval_scores(found[query], own[query], found[~query], own[~query])["map"]


@check("dcal", "mAP among new identities of tokens side by side, after 60 steps with triplets", above=0.33, control="untrained")
def _() -> tuple[float, float]:
    return recognised(0.3, 60), recognised(0.3, 0)
