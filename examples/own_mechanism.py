"""Describe a mechanism of your own; every executor, the layer and decoding know it: python examples/own_mechanism.py"""

import torch

import regard
from regard import Causal, Weighted, Window


def distance(s, i, j):
    """Scores fade with the logarithm of the distance."""
    return s - 0.5 * torch.log1p(i - j)


# A plain function of scores gives the weights as they are; RowLocal(weight, mass) would divide them by their sum.
mine = Weighted(position=distance, normalizer=torch.nn.functional.softplus, mask=Window(64))
q, k, v = (torch.randn(1, 4, 256, 32, requires_grad=True) for _ in range(3))
y = regard.attend(q, k, v, mine, mask=Causal())
y.sum().backward()
print(regard.plan(q, k, v, mine, mask=Causal()))

# The truth, by loops over pairs.
s = (q @ k.mT * 32**-0.5).detach()
truth = torch.zeros_like(y)
for i in range(256):
    seen = torch.arange(max(0, i - 63), i + 1)
    w = torch.nn.functional.softplus(s[:, :, i, seen] - 0.5 * torch.log1p(i - seen))
    truth[:, :, i] = (w[..., None] * v.detach()[:, :, seen]).sum(-2)
print("largest difference from loops:", float((y.detach() - truth).abs().max()))
assert torch.allclose(y, truth, atol=1e-4)

layer = regard.nn.Attention(64, heads=4, mechanism=mine)
x = torch.randn(2, 10, 64)
steps, state = [], None
for t in range(10):
    out, state = layer.step(x[:, t : t + 1], state)
    steps.append(out)
assert torch.allclose(torch.cat(steps, 1), layer(x), atol=1e-5)
print("token by token equals the whole pass")
