"""SeerAttention's gate for decoding: logits, choice, output and truth by loops, step and whole, learning, and training with the model."""

import pytest
import torch
import torch.nn.functional as F

from regard import RegardError
from regard.algebra import Rope
from regard.nn.token_gate import TokenGate, token_maxima
from regard.zoo.sparse.seerattention import SeerAttention, SeerDecoding


def tensors(length=23, heads=4, kv=2, dim=8, dtype=torch.float64):
    return tuple(torch.randn(2, h, length, dim, dtype=dtype) for h in (heads, kv, kv))


def logits_by_hand(gate, q, k, n, rope, pools=("max", "min", "avg"), eps=None):
    size, (batch, kv, length, _) = gate.block_size, k.shape
    blocks, group = -(-length // size), q.shape[1] // kv
    out = torch.full((batch, kv, n, blocks), -torch.inf, dtype=q.dtype)

    def normed(x, norm):
        return x if eps is None else x / (x.square().mean() + eps).sqrt() * norm.weight

    for b in range(batch):
        for h in range(kv):
            for row in range(n):
                i = length - n + row
                g_q = normed(sum(q[b, h * group + g, q.shape[2] - n + row] @ gate.q[h, g] for g in range(group)), gate.q_norm)
                for u in range(i // size + 1):
                    own = k[b, h, u * size : (u + 1) * size]
                    kinds = {"max": own.amax(0), "min": own.amin(0), "avg": own.mean(0)}
                    g_k = normed(torch.cat([kinds[name] for name in pools]) @ gate.k[h], gate.k_norm)
                    a, c = (Rope().rotate(x[None], torch.tensor([at]))[0] if rope else x for x, at in ((g_q, i), (g_k, u * size)))
                    out[b, h, row, u] = a @ c / len(c) ** 0.5 if i >= (u + 1) * size - 1 else 0.0
    return out


@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("n", [23, 1, 6])
def test_logits_by_loops(rope, n):
    q, k, _ = tensors()
    for pools, eps in ((("max", "min", "avg"), None), (("avg", "min"), 1e-6), (("max",), 0.3)):
        gate = TokenGate(4, 2, 8, width=6, block_size=5, rope=Rope() if rope else None, k_pools=pools, norm=eps).double()
        for p in gate.parameters():
            p.data += 0.2 * torch.randn_like(p)
        ordered = tuple(name for name in ("max", "min", "avg") if name in pools)
        assert torch.allclose(gate(q[:, :, -n:], k), logits_by_hand(gate, q, k, n, rope, ordered, eps), atol=1e-12)


@pytest.mark.parametrize("options", [{"threshold": 0.25}, {"budget": 10}, {"budget": 14}, {"threshold": 0.0}])
@pytest.mark.parametrize("n", [23, 1])
def test_output_by_loops(options, n):
    q, k, v = tensors()
    layer = SeerDecoding(4, 2, 8, width=6, block_size=5, **options).double()
    logits = logits_by_hand(layer.gate, q, k, n, True)
    at = torch.arange(23)
    turned_q, turned_k = Rope().rotate(q, at), Rope().rotate(k, at)
    truth = torch.zeros(2, 4, n, 8, dtype=q.dtype)
    for b in range(2):
        for h in range(4):
            for row in range(n):
                i, score = 23 - n + row, logits[b, h // 2, row]
                if "budget" in options:
                    best = score.topk(min(options["budget"] // 5, i // 5 + 1)).indices.tolist()
                else:
                    best = (score.softmax(-1) > options["threshold"]).nonzero()[:, 0].tolist()
                seen = [j for j in range(i + 1) if j // 5 in {*best, i // 5}]
                p = (turned_k[b, h // 2, seen] @ turned_q[b, h, i] / 8**0.5).softmax(-1)
                truth[b, h, row] = p @ v[b, h // 2, seen]
    assert torch.allclose(layer(q[:, :, -n:], k, v), truth, atol=1e-10)


def test_truth_by_loops():
    q, k, _ = tensors()
    for n, rows in ((23, 4), (5, 256)):
        found = token_maxima(q[:, :, -n:], k, 5, rows)
        for h in range(2):
            for row in range(n):
                i = 23 - n + row
                most = torch.zeros(5, dtype=q.dtype)
                for g in (2 * h, 2 * h + 1):
                    p = (k[0, h, : i + 1] @ q[0, g, i] / 8**0.5).softmax(-1)
                    for j, x in enumerate(p):
                        most[j // 5] = max(most[j // 5], x)
                assert torch.allclose(found[0, h, row], most / most.sum(), atol=1e-12)


def test_a_trained_gate_reads_where_the_weight_is():
    """Every query looks for a key of its topic, which one block in four has; means of blocks say nothing."""
    torch.manual_seed(0)
    directions = torch.linalg.qr(torch.randn(16, 8)).Q.T

    def batch(count):
        topic = torch.randint(8, (count, 1, 16))
        needle = 4 * directions[topic]  # (count, 1, blocks, D)
        k = 0.1 * torch.randn(count, 1, 16, 4, 16) - needle[..., None, :] / 3
        k[..., 2, :] = needle
        q = 4 * directions[torch.randint(8, (count, 2, 64))]
        return q, k.flatten(2, 3)

    layer = SeerDecoding(2, 1, 16, width=16, block_size=4, rope=False, budget=16)
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)

    def caught():
        q, k = batch(16)
        truth = token_maxima(q, k, 4)
        return float((truth * layer.blocks(q, k))[:, :, 32:].sum(-1).mean())

    before = caught()
    for _ in range(150):
        loss = layer.distil(*batch(8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert caught() > 0.8 > 0.6 > before


def test_joint_training_reaches_model_and_gate():
    """The model learns through the sparse attention, the gate through its own loss alone."""
    q, k, v = (x.requires_grad_() for x in tensors(20))
    for layer in (
        SeerDecoding(4, 2, 8, width=6, block_size=5, threshold=0.2).double(),
        SeerAttention(4, 2, 8, width=6, block_size=5, threshold=0.2).double(),
    ):
        target, scale = torch.randn(2, 4, 20, 8, dtype=torch.float64), 0.7
        model_loss, gate_loss = F.mse_loss(layer(q, k, v), target), layer.distil(q, k)
        found = torch.autograd.grad(model_loss + scale * gate_loss, (q, k, v, *layer.parameters()), retain_graph=True)
        alone = torch.autograd.grad(model_loss, (q, k, v), retain_graph=True)
        gates = torch.autograd.grad(gate_loss, tuple(layer.parameters()))
        assert all(torch.equal(a, b) and a.abs().max() > 0 for a, b in zip(found[:3], alone, strict=True))
        assert all(torch.allclose(a, scale * b) and b.abs().max() > 0 for a, b in zip(found[3:], gates, strict=True))


def test_what_is_refused():
    for name, options in (("budget=3", {"budget": 3}), ("k_pools=", {"k_pools": ("sum",)}), ("k_pools=", {"k_pools": ("max", "max")})):
        with pytest.raises(RegardError, match=name):
            SeerDecoding(4, 2, 8, block_size=5, **options)
    q, k, v = tensors(6)
    layer = SeerDecoding(4, 2, 8).double()
    for call in (lambda: layer(q, k[:, :, :4], v[:, :, :4]), lambda: layer.distil(q, k[:, :, :4])):
        with pytest.raises(RegardError, match="6 queries and 4 keys"):
            call()
    with pytest.raises(RegardError, match="heads=3"):
        SeerDecoding(3, 2, 8)
