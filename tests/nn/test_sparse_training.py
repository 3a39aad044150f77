"""Sparse layers in the decoder language model: they train, their gates learn, and sparse and dense attention can be exchanged after training."""

import pytest
import torch
import torch.nn.functional as F

import regard
from regard.nn import Decoder
from regard.nn.compressed_sparse import NSAAttention
from regard.zoo.sparse.alternating_sparse_attention import asa_layers
from regard.zoo.sparse.dma import DynamicMaskAttention
from regard.zoo.sparse.landmark_attention import LandmarkAttention
from regard.zoo.sparse.mosa import MoSA
from regard.zoo.sparse.nats import NAtSAttention
from regard.zoo.sparse.seerattention import AttnGate, SeerAttention
from regard.zoo.sparse.ssa import SSAAttention, training_loss, use
from regard.zoo.sparse.superlinear_attention import SuperlinearAttention

SMALL = {"size": 4, "stride": 2, "block_size": 8, "top_k": 2}


class First(torch.nn.Module):
    """The output of a layer that returns more."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


LAYERS = {
    "moba": lambda: regard.nn.Attention(32, 4, regard.get("moba", block_size=8, top_k=2), rope=True),
    "nsa": lambda: NSAAttention(32, 4, 2, window=8, **SMALL),
    "ssa": lambda: SSAAttention(32, 4, 2, block_size=8, top_k=2),
    "dma": lambda: DynamicMaskAttention(32, 4, 2),
    "mosa": lambda: MoSA(32, 2, 2),
    "nats": lambda: First(NAtSAttention(32, 4, 2, window=8)),
    "landmark-attention": lambda: LandmarkAttention(32, 4, block=7),
    "superlinear-attention": lambda: SuperlinearAttention(32, 4, 2),
    "alternating-sparse-attention": lambda: asa_layers(2, 32, 4, window=8, **SMALL)[1],
    "minicpm-sala": lambda: regard.nn.Attention(32, 4, regard.zoo.sparse.minicpm_sala.infllm(8, 2, 8, 0, 4, 2), kv_heads=2),
}


def batch(step):
    """Texts of 49 tokens: each follows from the one two places before it, one in ten is noise."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randint(24, (4, 49), generator=generator)
    noise = torch.rand(4, 49, generator=generator) < 0.1
    for t in range(2, 49):
        x[:, t] = torch.where(noise[:, t], x[:, t], (x[:, t - 2] * 5 + 3) % 24)
    return x


@pytest.mark.parametrize("name", LAYERS)
def test_trains_in_the_decoder(name):
    model = Decoder([LAYERS[name](), LAYERS[name]()], vocab=24, dim=32, layers=2, heads=4)
    model.train()
    optimizer, losses = torch.optim.AdamW(model.parameters(), 5e-3), []
    for step in range(40):
        x = batch(step)
        loss = F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    without = [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not without and sum(losses[-5:]) < 0.95 * sum(losses[:5]), (without, losses[::6])


def test_sparse_weights_run_dense_and_the_reverse():
    sparse = Decoder(regard.get("moba", block_size=8, top_k=2), vocab=24, dim=32, heads=4)
    dense = Decoder("softmax", vocab=24, dim=32, heads=4)
    dense.load_state_dict(sparse.state_dict())
    x = batch(0)[:, :-1]
    assert not torch.allclose(dense(x), sparse(x))
    torch.testing.assert_close(dense(x[:, :16]), sparse(x[:, :16]))  # two blocks: all of it is read


def test_ssa_loss_falls_and_streams_meet():
    model = Decoder([SSAAttention(32, 4, 2, block_size=8, top_k=2) for _ in range(2)], vocab=24, dim=32, layers=2, heads=4).train()
    generator, optimizer, apart = torch.Generator().manual_seed(0), torch.optim.AdamW(model.parameters(), 5e-3), []
    for step in range(30):
        loss, distance = training_loss(model, batch(step), generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        apart.append(distance.item())
    model.eval()
    use(model, "full")
    full = model(batch(99)[:, :-1])
    use(model, "sparse", top_k=6)
    torch.testing.assert_close(model(batch(99)[:, :-1]), full, atol=1e-5, rtol=1e-4)
    use(model, "sparse", top_k=2)
    assert not torch.allclose(model(batch(99)[:, :-1]), full) and all(x >= 0 for x in apart)


def test_seerattention_gate_learns_from_dense_attention():
    seer = SeerAttention(4, 2, 8, width=8, block_size=8, ratio=0.5, rope=False)
    q, k = torch.randn(2, 4, 64, 8) * 2, torch.randn(2, 2, 64, 8) * 2
    optimizer = torch.optim.Adam(seer.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        loss = seer.distil(q, k)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and isinstance(seer.gate, AttnGate)
