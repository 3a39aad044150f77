"""Checks of ifam."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.layers import drawn
from regard.lab.checks.shared.planes import gelu, layer_norm
from regard.lab.checks.shared.shipped_vit import accuracy, inked, shipped, unseen
from regard.lab.checks.shared.vits import out_of, projected, scores, small_vit, tokens_by_hand
from regard.lab.verification import check
from regard.nn.images.part_discovery import PartDiscovery
from regard.nn.images.part_maps import turned
from regard.nn.images.vit_host import embedded, masked_tokens
from regard.tasks.images import coloured_glyphs
from regard.zoo.vision.ifam import WEIGHTS, TwoStageFaithful, faithfulness_test, ifam_losses


def made(**options: Any) -> TwoStageFaithful:
    """Two small ViTs, 4 x 4 patches of 4 pixels; parts near the tokens, so that some are foreground."""
    model = drawn(TwoStageFaithful(small_vit(2), small_vit(3), 3, 2, **options), 0.1).eval()
    model.discovery.prototypes.data.mul_(3)
    return model


def given(count: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 3, 16, 16, dtype=F64), torch.randn(2, count, 3, 4, 4, dtype=F64)


def parts_by_hand(layer: PartDiscovery, x: Tensor, noise: Tensor, tau: float, noisy: bool) -> list[Tensor]:
    """maps, mask, soft, features, logits of tokens (B, 16, dim)."""
    p = layer.prototypes
    l = -(x[:, :, None] - p).square().sum(-1)  # noqa: E741
    flat = noise.flatten(3).mT
    maps, y = ((l + flat[0] * noisy) / tau).softmax(-1), ((l + flat[1]) / tau).softmax(-1)
    soft, total = y[..., :-1].max(-1).values, y[..., :-1].sum(-1)
    mask = (soft > y[..., -1]).to(F64) + total - total.detach()
    f = torch.stack([(maps[..., k, None] * x).sum(1) / x.shape[1] for k in range(p.shape[0])], -1)  # (B, C, K + 1)
    gap = f - f.mean((1, 2), keepdim=True)
    f = gap / (gap.square().mean((1, 2), keepdim=True) + 1e-5).sqrt() * layer.norm.weight + layer.norm.bias
    logits = torch.stack([f[..., k] @ layer.head.weight.T for k in range(p.shape[0] - 1)], 1)
    return [maps, mask, soft, f.mT, logits]


@check(
    "ifam",
    "maps, mask, its straight gradient, features and logits of the parts, with and without noise in the maps, two temperatures == by hand",
    below=1e-10,
    control="the mask's own gradient, none",
)
def _() -> tuple[float, float]:
    gaps, x = [], torch.randn(2, 16, 6, dtype=F64).requires_grad_()
    noise = torch.randn(2, 2, 4, 4, 4, dtype=F64)
    cases: tuple[dict[str, Any], ...] = ({}, {"gumbel": False, "temperature": 0.7})
    for options in cases:
        layer = drawn(PartDiscovery(6, 3, 5, **options)).eval()

        def told(layer: PartDiscovery = layer) -> list[Tensor]:
            found = layer(x, (4, 4), noise)
            assert 0.1 < float(found.mask.detach().mean()) < 0.9
            return [found.maps.flatten(2).mT, found.mask, found.soft, found.features, found.logits]

        def truth(layer: PartDiscovery = layer, options: dict[str, Any] = options) -> list[Tensor]:
            return parts_by_hand(layer, x, noise, options.get("temperature", 1.0), options.get("gumbel", True))

        gaps += [naive.gap(a, b) for a, b in zip(told(), truth(), strict=True)]
        for at, leaves in ((0, (x, layer.prototypes)), (1, (x, layer.prototypes)), (4, (x, *layer.parameters()))):
            gaps.append(gap_with_gradients(told()[at], truth()[at], leaves))
    return max(gaps), gap_with_gradients(told()[1], truth()[1].detach() + 0 * x.sum() + 0 * layer.prototypes.sum(), (x, layer.prototypes))


@check(
    "ifam",
    "parts dropped from the mask and the classifier in training, thresholds in evaluation, off what they are",
    below=1e-12,
    control="in evaluation",
)
def _() -> tuple[float, float]:
    x, noise = torch.randn(64, 16, 6, dtype=F64), torch.randn(2, 64, 4, 4, 4, dtype=F64)
    layer = drawn(PartDiscovery(6, 3, 5, dropout=0.5, mask_dropout=0.4))

    def off(training: bool) -> float:
        torch.manual_seed(0)
        found = layer.train(training)(x, (4, 4), noise)
        maps, _, _, features, _ = parts_by_hand(layer, x, noise, 1.0, True)
        y = ((found.scores + noise[1]).softmax(1)).flatten(2)
        sets = [torch.tensor([bool(n >> k & 1) for k in range(3)]) for n in range(8)]
        shown = torch.stack([(y[:, :3] * s[:, None]).amax(1) for s in sets])
        which = (shown - found.soft).abs().amax(-1)
        some = torch.stack([features[:, :3] * s[:, None] / 0.5 for s in sets]) @ layer.head.weight.T
        dropped = (some - found.logits).abs().amax((-1, -2))
        share = float((which.argmin(0) != 7).double().mean())
        assert not training or 0.6 < share < 0.95  # 1 - 0.6^3 = 0.78
        return max(float(which.min(0).values.max()), float(dropped.min(0).values.max()), naive.gap(found.maps.flatten(2).mT, maps))

    limits = torch.tensor([0.5, -100.0, 0.1], dtype=F64)
    strict = PartDiscovery(6, 3, 5, thresholds=limits).double().eval()
    found = strict(x, (4, 4), noise)
    alike = torch.einsum("bnc,kc->bkn", x, strict.prototypes)
    there = torch.where(alike[:, :3] < limits[:, None], -torch.inf, alike[:, :3])
    truth = (torch.cat((there, alike[:, 3:]), 1) + noise[0].flatten(2)).softmax(1)
    return max(off(True), naive.gap(found.maps.flatten(2), truth)), off(False)


def seen_by_hand(model: TwoStageFaithful, images: Tensor, mask: Tensor, soft: bool = False, last_only: bool = False) -> Tensor:
    vit: Any = model.second
    x = tokens_by_hand(vit, images)
    shown = torch.cat((torch.ones(len(x), 1, dtype=F64), mask), 1)[:, None, None]
    for at, block in enumerate(vit.blocks):
        q, k, v = projected(block.attn, layer_norm(x, block.norm1, 1e-6))
        s = scores(block.attn, q, k)
        if soft:
            p = (s + torch.log(shown + 1e-10)).softmax(-1)
        elif last_only and at < len(vit.blocks) - 1:
            p = s.softmax(-1)
        else:
            p = s.exp() * shown / (s.exp() * shown).sum(-1, keepdim=True)
        x = x + out_of(block.attn, p @ v)
        m = block.mlp
        x = x + gelu(layer_norm(x, block.norm2, 1e-6) @ m.fc1.weight.T + m.fc1.bias) @ m.fc2.weight.T + m.fc2.bias
    return layer_norm(layer_norm(x, vit.norm, 1e-6)[:, 0], model.norm) @ model.head.weight.T


@check(
    "ifam",
    "the second stage's logits and their gradients, of masks and of soft ones == by hand",
    below=1e-9,
    control="masked in the last layer alone",
)
def _() -> tuple[float, float]:
    (images, _), gaps = given(), []
    images.requires_grad_()
    for soft in (False, True):
        model = made(soft=soft)
        mask = torch.rand(2, 16, dtype=F64) if soft else (torch.rand(2, 16) < 0.5).to(F64)
        mask.requires_grad_()
        truth = seen_by_hand(model, images, mask, soft)
        gaps.append(gap_with_gradients(model.seen(images, mask), truth, (images, mask, model.head.weight)))
    hard = made()
    mask = (torch.rand(2, 16) < 0.5).to(F64)
    return max(gaps), naive.gap(hard.seen(images, mask), seen_by_hand(hard, images, mask, last_only=True))


@check(
    "ifam", "change of the second stage's logits when masked patches become noise", below=1e-12, control="masked in the last layer alone"
)
def _() -> tuple[float, float]:
    model, (images, _) = made(), given(3)
    mask = (torch.rand(3, 16) < 0.4).to(F64)
    mask[0] = 0
    changed = faithfulness_test(model, images, mask, torch.Generator().manual_seed(1))
    noise = torch.randn(images.shape, dtype=F64)
    hidden = (mask == 0).view(3, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    other = torch.where(hidden, noise, images)
    assert naive.gap(model.seen(images, mask), model.seen(torch.where(~hidden, noise, images), mask)) > 1e-3
    assert torch.equal(model.seen(images[1:2], mask[1:2], True), model.seen(other[1:2], mask[1:2], True))
    late = [seen_by_hand(model, x, mask, last_only=True) for x in (images, other)]
    return float(changed.max()), naive.gap(*late)


@check("ifam", "masked patches taken out == masked", below=1e-10, control="one kept patch taken out too")
def _() -> tuple[float, float]:
    model, (images, _) = made(), given(3)
    mask = (torch.rand(3, 16) < 0.4).to(F64)
    mask[1] = 0
    found, count = model.seen(images, mask, remove=True), embedded(model.second, images).shape[1]
    assert int(mask.sum(1).max()) < count - 1
    less = mask.clone()
    less[2, int(mask[2].argmax())] = 0
    return naive.gap(found, model.seen(images, mask)), naive.gap(model.seen(images, less, remove=True), model.seen(images, mask))


@check("ifam", "gradient of the second stage's loss at the prototypes", above=1e-6, control="the mask cast to booleans")
def _() -> tuple[float, float]:
    model, (images, noise) = made().train(), given()
    parts = model.found(images, noise)
    loss = F.cross_entropy(model(images, noise=noise).logits, torch.tensor([0, 2]))
    slope = torch.autograd.grad(loss, model.discovery.prototypes, retain_graph=True)[0]
    cast = F.cross_entropy(model.seen(images, (parts.mask > 0.5).to(F64)), torch.tensor([0, 2])) + 0 * model.discovery.prototypes.sum()
    return float(slope.abs().max()), float(torch.autograd.grad(cast, model.discovery.prototypes)[0].abs().max())


@check("ifam", "logits without a part == those of a mask less its places, by hand", below=1e-10, control="with it")
def _() -> tuple[float, float]:
    model, (images, noise) = made(), given(4)
    with torch.no_grad():
        whole, less = model(images, noise=noise), model(images, removed=[1], noise=noise)
        maps = whole.parts.maps.flatten(2)
        mask = torch.stack([((m[0] > m[2]) & (m.argmax(0) != 1)).to(F64) for m in maps])
        assert bool((maps.argmax(1) == 1).any())
        gaps = [naive.gap(less.parts.mask, mask), naive.gap(less.logits, seen_by_hand(model, images, mask))]
        return max(gaps), naive.gap(whole.logits, seen_by_hand(model, images, mask))


@check("ifam", "the eight terms of the loss == by hand", below=1e-9, control="maps that follow no turn")
def _() -> tuple[float, float]:
    model, (images, noise) = made(dropout=0.0, mask_dropout=0.0).train(), given()
    labels = torch.tensor([1, 2])
    with torch.no_grad():
        found = ifam_losses(model, images, labels, 90.0, (4, 0), 1.0, noise)
        out = model(images, noise=noise)
        maps, parts = out.parts.maps, out.parts.features
        b, k, h, w = maps.shape
        truth = dict.fromkeys(WEIGHTS, 0.0)
        truth["first"] = -float(out.parts.logits.mean(1).log_softmax(-1)[[0, 1], labels].mean())
        truth["second"] = -float(out.logits.log_softmax(-1)[[0, 1], labels].mean())
        for n in range(b):
            for i in range(h):
                for j in range(w):
                    m = maps[n, :, i, j]
                    down = float((maps[n, :, i + 1, j] - m).abs().sum()) if i + 1 < h else 0.0
                    right = float((maps[n, :, i, j + 1] - m).abs().sum()) if j + 1 < w else 0.0
                    truth["variation"] += (down + right) / (b * h * w)
                    truth["entropy"] -= float((m * m.log()).sum()) / (b * h * w)
        mean = torch.stack(
            [torch.stack([maps[:, :, i : i + 3, j : j + 3].mean((2, 3)) for j in range(w - 2)], -1) for i in range(h - 2)], -2
        )
        truth["presence"] = 1 - float(sum(mean[:, part].max() for part in range(k - 1))) / (k - 1)
        corner = torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=F64)  # of 2 x 2 smoothed places all stand in corners
        truth["border"] = -float((mean[:, -1] * corner).flatten(1).max(1).values.log().mean())
        unit = parts / parts.norm(dim=-1, keepdim=True)
        for n in range(b):
            for one in range(k):
                for two in range(k):
                    truth["orthogonal"] += (float(unit[n, one] @ unit[n, two]) - float(one == two)) ** 2 / (b * k * k)
        spun = torch.rot90(images, 1, (2, 3))  # 90 degrees, against the clock as torchvision turns by a negative angle
        clockwise = torch.rot90(images, -1, (2, 3))
        assert naive.gap(turned(images, 90.0, (0, 0), 1.0), clockwise) < naive.gap(turned(images, 90.0, (0, 0), 1.0), spun)
        moved = F.pad(clockwise, (4, 0))[..., :16]
        theirs = model.found(moved, noise).maps
        back = torch.rot90(F.pad(theirs, (0, 1))[..., 1:], 1, (2, 3))
        cosines = [F.cosine_similarity(maps[n, p].flatten(), back[n, p].flatten(), 0) for n in range(b) for p in range(k - 1)]
        truth["equivariant"] = 1 - float(sum(cosines)) / len(cosines)
        gaps = [abs(float(found[name]) - truth[name]) for name in WEIGHTS]
        same = [F.cosine_similarity(maps[n, p].flatten(), theirs[n, p].flatten(), 0) for n in range(b) for p in range(k - 1)]
        return max(gaps), abs(float(found["equivariant"]) - (1 - float(sum(same)) / len(same)))


@check(
    "ifam",
    "accuracy that the ViT on digits gains, without training, when its attention sees the digit's patches alone",
    above=0.02,
    control="as many patches by chance",
)
def _() -> tuple[float, float]:
    vit, drawn = shipped(), unseen(500)
    ink, whole = inked(drawn), accuracy(vit, drawn)
    order = torch.rand(ink.shape, generator=torch.Generator().manual_seed(0)).argsort(1)

    def gain(mask: Tensor) -> float:
        with torch.no_grad():
            told = vit.forward_head(masked_tokens(vit, drawn.images, mask.float()))
        return float((told.argmax(1) == drawn.labels).double().mean()) - whole

    return gain(ink), gain(ink.gather(1, order))


@check(
    "ifam",
    "accuracy lost when colours behind glyphs, which told their kind, are exchanged: the second stage that sees the glyph's patches alone, 120 steps",
    below=0.1,
    control="a ViT that sees the whole image",
)
def _() -> tuple[float, float]:
    def lost(masked: bool) -> float:
        torch.manual_seed(0)
        model = TwoStageFaithful(*(small_vit(2, 32, patch=2, spread=0.0).float() for _ in range(2)), 4, 2)
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        schedule, generator = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=120), torch.Generator().manual_seed(0)

        def told(count: int, generator: torch.Generator, share: float) -> tuple[Tensor, Tensor]:
            x, labels, ink = coloured_glyphs(count, generator, share)
            mask = F.max_pool2d(ink[:, None].float(), 2).flatten(1)
            return model.seen(x, mask if masked else torch.ones_like(mask), remove=not model.training), labels

        for _ in range(120):
            optimizer.zero_grad()
            F.cross_entropy(*told(32, generator, 0.95)).backward()
            optimizer.step()
            schedule.step()
        model.eval()
        with torch.no_grad():
            right = []
            for share in (0.95, 0.0):
                logits, labels = told(500, torch.Generator().manual_seed(10_000), share)
                right.append(float((logits.argmax(1) == labels).double().mean()))
        assert right[0] > 0.85, right
        return right[0] - right[1]

    return lost(True), lost(False)


@check("ifam", "gradients that all terms of the loss leave in a frozen first stage", below=0.0, control="in the second")
def _() -> tuple[float, float]:
    model, (images, noise) = made(frozen=True).train(), given()
    assert not model.first.training and not model.discovery.training and model.second.training
    terms = ifam_losses(model, images, torch.tensor([0, 2]), 30.0, (1, 0), 1.1, noise)
    assert set(terms) == set(WEIGHTS) and {name for name, term in terms.items() if term.requires_grad} == {"second"}
    sum(WEIGHTS[name] * term for name, term in terms.items()).backward()  # type: ignore[union-attr]
    left = [0.0 if p.grad is None else 1.0 for part in (model.first, model.discovery) for p in part.parameters()]
    return max(left), max(float(p.grad.abs().max()) for p in model.second.parameters() if p.grad is not None)
