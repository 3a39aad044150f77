"""A table's rows classified in context, and 20,000 rows of context in bounded memory: python examples/classify_tables.py [STEPS]"""

import sys

import torch
import torch.nn.functional as F

from regard.tasks.tables import tables
from regard.tasks.training import fit
from regard.zoo.systems.chunked_tabpfn import TabPFNLite, chunked_attention

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 220
torch.manual_seed(0)
model = TabPFNLite(layers=2)


def draw(generator):
    """Drawn tables of 32 rows, of which 6 to 26 are given with their classes."""
    return *tables(12, 32, 2, generator), int(torch.randint(6, 27, (1,), generator=generator))


def loss(batch):
    x, y, known = batch
    return F.cross_entropy(model(x, y[:, :known]).flatten(0, 1), y[:, known:].flatten())


fit(model, draw, loss, steps, lr=4e-3)
model.chunked(q_chunk=256, k_chunk=256, batch_chunk=256)  # longer tables than any it was trained on, read in pieces
x, y = tables(6, 640, 2, torch.Generator().manual_seed(7))
for rows in (8, 512):
    right = [float((model.fit(t[:rows], c[:rows]).predict(t[512:]) == c[512:]).float().mean()) for t, c in zip(x, y, strict=True)]
    print(f"{rows} rows of context: {sum(right) / len(right):.0%} of new rows classified right")

q, k, v = torch.randn(1, 1, 64, 8), torch.randn(1, 1, 20_000, 8), torch.randn(1, 1, 20_000, 8)
gap = (chunked_attention(q, k, v, q_chunk=32, k_chunk=2000) - F.scaled_dot_product_attention(q, k, v)).abs().max()
print(f"20,000 rows, 32 queries and 2,000 keys at a time: largest difference from attention at once {float(gap):.1e}")
