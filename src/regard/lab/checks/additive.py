"""Checks of weights that rows do not normalise to one, and of temperatures: ReLA, ReLUFormer, SWAT, selective self-attention."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...algebra import Causal, Rope
from ...catalog import get
from ...engine import attend, step, weights
from ...engine.stream import KeyValueState
from ...mechanisms.weighted.reluformer import entropy_margin_loss, row_mass_loss
from ...nn import Attention
from ...nn.memory import KeyValueMemory
from .. import naive
from ..verification import check
from .weighted import qkv

F64 = torch.float64


@check(
    "rela", "the layer == relu(q.k) v, merged, scale * o / rms(o) * sigmoid(gate * o), in loops", below=1e-12, control="without the gate"
)
def _() -> tuple[float, float]:
    def gap(gated: bool) -> float:
        layer = Attention(16, 2, get("rela", gated=gated)).double()
        if gated:
            torch.nn.init.normal_(layer.merge_norm.gate)  # type: ignore[arg-type]
            torch.nn.init.normal_(layer.merge_norm.scale)  # type: ignore[arg-type]
        x = torch.randn(1, 13, 16, dtype=F64)
        q, k, v, _ = layer.heads_of(x, x, 0, None)
        o = naive.attention(q, k, v, lambda s: s.clamp_min(0), naive.causal).transpose(1, 2).flatten(-2)
        y = o / torch.sqrt(o.square().mean(-1, keepdim=True) + 1e-8)
        norm: Any = layer.merge_norm
        y = norm.scale * y / (1 + torch.exp(-norm.gate * o)) if gated else y / 2
        return naive.gap(layer(x), y @ layer.out.weight.T)

    return gap(True), gap(False)


@check("rela", "a query whose logits are all <= 0 gives exactly 0", below=0.0, control="sparsemax")
def _() -> tuple[float, float]:
    q, k, v = torch.rand(1, 1, 5, 8, dtype=F64), -torch.rand(1, 1, 9, 8, dtype=F64), torch.randn(1, 1, 9, 8, dtype=F64)
    return float(attend(q, k, v, "rela").abs().max()), float(attend(q, k, v, "sparsemax").abs().max())


@check("rela", "random weights: distance of the share of zeros from one half", below=0.05, control="softmax")
def _() -> tuple[float, float]:
    q, k, _ = qkv(128)
    found = [weights(q, k, name) for name in ("rela", "softmax")]
    return tuple(abs(float((w == 0).double().mean()) - 0.5) for w in found if w is not None)  # type: ignore[return-value]


@check("rela", "spread of the layer's output at n = 1024 over n = 16", below=1.3, control="without the RMSNorm")
def _() -> tuple[float, float]:
    def ratio(norm: bool) -> float:
        layer = Attention(64, 4, "rela", causal=False)
        layer.merge_norm = layer.merge_norm if norm else torch.nn.Identity()
        return float((layer(torch.randn(1, 1024, 64)).std() / layer(torch.randn(1, 16, 64)).std()).detach())

    return ratio(True), ratio(False)


@check("rela", "keys in two shards: partial sums add up to the whole", below=1e-12, control="softmax")
def _() -> tuple[float, float]:
    return shards("rela"), shards("softmax")


def shards(name: str) -> float:
    q, k, v = qkv()
    parts = attend(q, k[:, :, :15], v[:, :, :15], name) + attend(q, k[:, :, 15:], v[:, :, 15:], name)
    return naive.gap(parts, attend(q, k, v, name))


@check("reluformer", "Linear-ReLU-Linear == the memory with copied weights", below=1e-12, control="the softmax memory")
def _() -> tuple[float, float]:
    up, down = torch.nn.Linear(16, 64).double(), torch.nn.Linear(64, 16).double()
    x = torch.randn(2, 9, 16, dtype=F64)
    truth = down(torch.relu(up(x)))

    def gap(activation: str) -> float:
        memory = KeyValueMemory(16, 64, activation).double()
        memory.load_state_dict({"keys": up.weight, "key_bias": up.bias, "values": down.weight.T, "value_bias": down.bias}, strict=False)
        return naive.gap(memory(x), truth)

    return gap("relu"), gap("softmax")


@check("reluformer", "N(0, 1) logits and values: largest |output variance - 1| over n = 32, 256, 2048", below=0.06, control="division by n")
def _() -> tuple[float, float]:
    def off(name: str) -> float:
        gaps = []
        for n in (32, 256, 2048):
            s, v = torch.randn(1, 1, 2048, n, dtype=F64), torch.randn(1, 1, n, 256, dtype=F64)
            gaps.append(abs(float(attend(s, torch.eye(n, dtype=F64)[None, None], v, name, scale=1.0).var()) - 1))
        return max(gaps)

    return off("reluformer"), off("relu")


@check("reluformer", "causal == relu(s) / (gamma_h sqrt(i / 2)) in loops", below=1e-12, control="the whole length in place of i")
def _() -> tuple[float, float]:
    q, k, v = qkv(29)
    gamma = torch.tensor([0.7, 1.6], dtype=F64)
    out = attend(q, k, v, "reluformer", mask=Causal(), gamma=gamma)
    truth = naive.attention(q, k, v, lambda s: s.clamp_min(0) / math.sqrt(len(s) / 2), naive.causal)
    other = naive.attention(q, k, v, lambda s: s.clamp_min(0) / math.sqrt(29 / 2), naive.causal)
    return tuple(naive.gap(out, x / gamma[:, None, None]) for x in (truth, other))  # type: ignore[return-value]


@check(
    "reluformer", "regularisers are 0 for rows that sum to one with entropy below the margin", below=1e-12, control="flat rows of mass 2"
)
def _() -> tuple[float, float]:
    good = F.one_hot(torch.randint(16, (4, 16)), 16).double()
    flat = torch.full((4, 16, 16), 2 / 16, dtype=F64)
    return tuple(float(row_mass_loss(w) + entropy_margin_loss(w)) for w in (good, flat))  # type: ignore[return-value]


@check("swat", "windowed sigmoid with RoPE and balanced slopes == the formula in loops", below=1e-12, control="all slopes negative")
def _() -> tuple[float, float]:
    q, k, v = qkv(29, heads=4)
    turned = [Rope().rotate(x, torch.arange(29)) for x in (q, k)]
    truth = torch.zeros_like(v)
    for h, slope in enumerate((-0.5, -0.25, 0.5, 0.25)):
        for i in range(29):
            for j in range(max(0, i - 6), i + 1):
                s = float(turned[0][0, h, i] @ turned[1][0, h, j]) / math.sqrt(8) + slope * (i - j)
                truth[0, h, i] += v[0, h, j] / (1 + math.exp(-s))
    balanced, negative = (get("swat", window=7, balance=x) for x in ("balanced", "negative"))
    return naive.gap(attend(q, k, v, balanced), truth), naive.gap(attend(q, k, v, negative), truth)


@check("swat", "decoding with a cache of at most `window` tokens == prefill", below=1e-10, control="window one shorter")
def _() -> tuple[float, float]:
    q, k, v = qkv(40, heads=4)
    whole = attend(q, k, v, get("swat", window=7))

    def gap(window: int) -> float:
        state, outs = None, []
        for t in range(40):
            out, state = step(*[x[:, :, t : t + 1] for x in (q, k, v)], get("swat", window=window), state)
            outs.append(out)
            assert isinstance(state, KeyValueState)
            if state.k.shape[-2] != min(t + 1, window):
                return math.inf
        return naive.gap(torch.cat(outs, 2), whole)

    return gap(7), gap(6)


@check("swat", "changing token m - w leaves output m as it is", below=0.0, control="changing token m - w + 1")
def _() -> tuple[float, float]:
    q, k, v = qkv(40, heads=4)
    swat = get("swat", window=7)

    def change(at: int) -> float:
        other = [x.clone() for x in (k, v)]
        for x in other:
            x[:, :, at] += 1
        return naive.gap(attend(q, *other, swat)[:, :, 30], attend(q, k, v, swat)[:, :, 30])  # type: ignore[call-arg, arg-type]

    return change(30 - 7), change(30 - 7 + 1)


@check(
    "selective-self-attention",
    "row i's logits are (1 + sigmoid(a) log i) times the plain ones, and tau_value scales values",
    below=1e-10,
    control="plain softmax",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(23)
    rate, tau = torch.sigmoid(torch.tensor([0.3, -1.0], dtype=F64)), 1 + torch.tanh(torch.randn(1, 2, 23, dtype=F64))
    truth = torch.zeros_like(v)
    for h in range(2):
        for i in range(23):
            s = (1 + rate[h] * math.log(i + 1)) * (k[0, h, : i + 1] @ q[0, h, i]) / math.sqrt(8)
            truth[0, h, i] = naive.softmax(s) @ (tau[0, h, : i + 1, None] * v[0, h, : i + 1])
    out = attend(q, k, v, "selective-self-attention", mask=Causal(), tau_rate=rate, tau_value=tau)
    return naive.gap(out, truth), naive.gap(attend(q, k, v, mask=Causal()), truth)


@check("selective-self-attention", "with w = 0 and a = -40 the layer is plain attention", below=1e-10, control="a = 0")
def _() -> tuple[float, float]:
    x = torch.randn(2, 19, 32, dtype=F64)

    def gap(a: float) -> float:
        layer, plain = Attention(32, 4, get("selective-self-attention", init=a)).double(), Attention(32, 4).double()
        plain.load_state_dict(layer.state_dict(), strict=False)
        return naive.gap(layer(x), plain(x))

    return gap(-40.0), gap(0.0)


@check(
    "selective-self-attention",
    "parameters added to a 12-layer, 768-wide, 12-head model, share",
    below=0.005,
    control="an MLP of width 768 for each temperature",
)
def _() -> tuple[float, float]:
    layer = Attention(768, 12, "selective-self-attention")
    added = sum(p.numel() for p in layer.inputs.parameters())
    return 12 * added / 124e6, 12 * 2 * 768 * 768 / 124e6


@check(
    "selective-self-attention",
    "two queries of one direction, targets softmax(0.2 z) and softmax(8 z): largest KL after training tau alone",
    below=1e-2,
    control="the best single temperature",
)
def _() -> tuple[float, float]:
    z = torch.randn(64, dtype=F64)
    targets = torch.stack([(0.2 * z).softmax(-1), (8 * z).softmax(-1)])
    k, v = torch.eye(64, dtype=F64)[None, None], torch.eye(64, dtype=F64)[None, None]
    q = z.expand(1, 1, 2, 64)

    def kl(tau: Tensor) -> Tensor:
        w = attend(q, k, v, "selective-self-attention", scale=1.0, tau_query=tau - 1)[0, 0]
        return torch.special.xlogy(targets, targets / w.clamp_min(1e-300)).sum(-1)

    tau = torch.ones(1, 1, 2, dtype=F64, requires_grad=True)
    optimizer = torch.optim.Adam([tau], 0.1)
    for _ in range(300):
        optimizer.zero_grad()
        kl(tau).sum().backward()
        optimizer.step()
    shared = min(float(kl(torch.full((1, 1, 2), t, dtype=F64)).max()) for t in torch.linspace(0.1, 10, 100).tolist())
    return float(kl(tau).max().detach()), shared
