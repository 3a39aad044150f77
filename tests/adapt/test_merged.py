"""Attention over merged tokens in a UNet: matching by loops, what merging loses and puts back, AgentSD by hand, and the model as it was behind it."""

import pytest
import torch

pytest.importorskip("diffusers")
from test_intercept import unet as make

from regard import RegardError, attend
from regard.adapt.merged import MergedAttention
from regard.nn.images.merging import match
from regard.zoo.linear.agent_attention import agent_attention, agent_sd


def plain(q, agents, k, v):
    return attend(q, k, v)


@pytest.mark.parametrize("shape, stride", [((4, 6), (2, 2)), ((5, 4), (2, 2)), ((3, 5), (3, 2)), ((4, 4), (1, 2))])
@pytest.mark.parametrize("drawn", [False, True])
def test_matching_by_loops(shape, stride, drawn):
    (h, w), (sy, sx), (b, c) = shape, stride, (2, 3)
    x = torch.randn(b, h * w, c, dtype=torch.float64)
    draw = torch.randint(sy * sx, (h // sy, w // sx)) if drawn else None
    found = match(x, shape, stride, draw)
    stays = []
    for i in range(h // sy):
        for j in range(w // sx):
            at = int(draw[i, j]) if drawn else 0
            stays.append((i * sy + at // sx) * w + j * sx + at % sx)
    stays.sort()
    moves = [n for n in range(h * w) if n not in stays]
    for count in (0, 3, len(moves), len(moves) + 9):
        merged, back = found.merge(x, count), found.unmerge(found.merge(x, count), count)
        for one in range(b):
            like = {n: max((float(torch.cosine_similarity(x[one, n], x[one, m], 0)), -at) for at, m in enumerate(stays)) for n in moves}
            order = sorted(moves, key=lambda n: -like[n][0])
            groups = {m: [m] for m in stays}
            for n in order[:count]:
                groups[stays[-like[n][1]]].append(n)
            means = torch.stack([x[one, groups[m]].mean(0) for m in stays])
            assert torch.allclose(merged[one], torch.cat((x[one, order[count:]], means)))
            truth = x[one].clone()
            for at, m in enumerate(stays):
                truth[groups[m]] = means[at]
            assert torch.allclose(back[one], truth)


def by_hand(unet, given, read, **options):
    """The blocks' first attention written out: tokens merged, read, and put back."""
    ratio, more, seed = options["ratio"], options["agent_ratio"], torch.Generator().manual_seed(options.get("seed", 0))
    handles, inputs = [], {}
    for block in (m for m in unet.modules() if type(m).__name__ == "BasicTransformerBlock"):

        def before(block, args, kwargs):
            inputs[block.attn1] = args[0] if args else kwargs["hidden_states"]

        def instead(attn, args, kwargs, out):
            x, normed = inputs[attn], args[0]
            side = int(x.shape[1] ** 0.5)
            if side < 8:
                return out
            draw = torch.randint(4, (side // 2, side // 2), generator=seed) if len(x) % 2 == 0 else None
            found = match(x, (side, side), (2, 2), draw)
            feature, agents = found.merge(normed, int(side**2 * ratio)), found.merge(normed, int(side**2 * more))
            q, a, k, v = (
                f(y).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
                for f, y in ((attn.to_q, feature), (attn.to_q, agents), (attn.to_k, feature), (attn.to_v, feature))
            )
            if a.shape[2] * 2 < q.shape[2] and read is not plain:
                s = q.shape[-1] ** -0.5
                o = (q @ a.mT * s**0.3).softmax(-1) @ ((a @ k.mT * s).softmax(-1) @ v) + 0.075 * v
            else:
                o = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
            return found.unmerge(attn.to_out[0](o.transpose(1, 2).flatten(2)), int(side**2 * ratio))

        handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(block.attn1.register_forward_hook(instead, with_kwargs=True))
    out = unet(*given).sample
    for handle in handles:
        handle.remove()
    return out


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("ratio", [0.5, 0.3])
def test_agent_attention_of_merged_tokens_in_a_unet(batch, ratio):
    unet, (x, t, text) = make()
    given = x[:batch], t, text[:batch]
    own = unet(*given).sample
    with agent_sd(unet, ratio, seed=3):
        found = unet(*given).sample
    truth = by_hand(unet, given, agent_attention, ratio=ratio, agent_ratio=0.8, seed=3)
    merged = by_hand(unet, given, plain, ratio=ratio, agent_ratio=0.8, seed=3)
    assert torch.allclose(found, truth, atol=1e-5) and not torch.allclose(found, own, atol=1e-4)
    assert torch.allclose(truth, merged) == (ratio == 0.5)  # half the tokens have agents half as many, which is not fewer
    assert torch.equal(unet(*given).sample, own)


@torch.no_grad()
def test_agent_attention_settings_and_the_model_behind_them():
    unet, given = make()
    own = unet(*given).sample
    with MergedAttention(unet, plain, 0.5, 0.8, draws=False):
        first = unet(*given).sample
        assert torch.equal(first, unet(*given).sample)
    with MergedAttention(unet, plain, 0.5, 0.8, max_downsample=1, stride=(4, 4), draws=False):
        assert not torch.allclose(unet(*given).sample, first)
    patch = MergedAttention(unet, plain, 0.01, 0.0)  # less than a token
    assert torch.allclose(unet(*given).sample, own, atol=1e-5)
    patch.restore()
    with agent_sd(unet, 0.3, shortcut=0.0, spread_power=1.0, draws=False):
        other = unet(*given).sample
    with agent_sd(unet, 0.3, shortcut=0.2, spread_power=1.0, draws=False):
        assert not torch.allclose(unet(*given).sample, other)
    assert torch.equal(unet(*given).sample, own) and not any(m._forward_pre_hooks for m in unet.modules())


def test_agent_attention_refused():
    unet, _ = make()
    for name, options in (
        ("ratio=0", {"ratio": 0.0}),
        ("agent_ratio=1.5", {"agent_ratio": 1.5}),
        ("max_downsample=0", {"max_downsample": 0}),
    ):
        with pytest.raises(RegardError, match=name):
            agent_sd(unet, **options)
    with pytest.raises(RegardError, match="BasicTransformerBlock"):
        agent_sd(torch.nn.Linear(2, 2))
    for shape, stride in (((3, 3), (2, 2)), ((2, 2), (3, 1)), ((2, 2), (1, 1))):
        with pytest.raises(RegardError, match="shape"):
            match(torch.randn(1, 4, 2), shape, stride)
    with pytest.raises(RegardError, match="draw"):
        match(torch.randn(1, 4, 2), (2, 2), draw=torch.full((1, 1), 4))
