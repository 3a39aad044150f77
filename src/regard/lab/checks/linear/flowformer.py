"""Checks of flowformer."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.catalog import get
from regard.engine import step
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.weighted import qkv
from regard.lab.verification import check


def flow(q: Tensor, k: Tensor, v: Tensor, competing: bool = True, limit: float = 1.0) -> Tensor:
    """Flow attention over an explicit Lq x Lk matrix of flows."""
    q, k, eps = torch.sigmoid(q), torch.sigmoid(k), 1e-6
    n, m = q.shape[-2], k.shape[-2]

    def met(x: Tensor, total: Tensor) -> Tensor:
        return torch.stack([((x[..., i, :] + eps) * (total + eps)).sum(-1) for i in range(x.shape[-2])], -1)

    inflow, outflow = met(q, k.sum(-2)), met(k, q.sum(-2))
    sink = met(q, (k / outflow[..., None]).sum(-2))
    source = met(k, (q / inflow[..., None]).sum(-2)).clamp(-limit, limit)
    weights = (q @ k.mT) / inflow[..., None]
    weights = weights * (torch.softmax(source, -1) * m)[..., None, :] if competing else weights
    return torch.sigmoid(sink * n / m)[..., None] * (weights @ v)


@check(
    "flowformer",
    "cross-attention, 23 sinks and 31 sources, with gradients == the matrix of flows",
    below=1e-9,
    control="without competition",
)
def _() -> tuple[float, float]:
    leaves = q, k, v = tuple(x.requires_grad_() for x in qkv(23, m=31))
    out = attend(q, k, v, "flowformer")
    return gap_with_gradients(out, flow(q, k, v), leaves), naive.gap(out, flow(q, k, v, False))


@check(
    "flowformer",
    "conservation: weights over a sink's allocation are its flows times the sources' competition, which sums to the number of sources",
    below=1e-4,
    control="flows of plain sigmoid attention",
)
def _() -> tuple[float, float]:
    q, k, _ = qkv(23, m=31)
    found = attend(q, k, torch.eye(31, dtype=F64).expand(1, 2, 31, 31), "flowformer")
    fq, fk = torch.sigmoid(q), torch.sigmoid(k)
    flow = fq @ fk.mT

    def broken(w: Tensor) -> float:
        ratio = w / flow  # allocation_i / inflow_i times competition_j: of rank one
        competition = 31 * ratio[..., :1, :] / ratio[..., :1, :].sum(-1, keepdim=True)
        got = (w / competition).sum(-1)  # what each sink receives over its inflow, which conservation makes its allocation
        allocation = torch.sigmoid((flow / flow.sum(-2, keepdim=True)).sum(-1) * 23 / 31)
        return naive.gap(got, allocation)

    return broken(found), broken(flow / flow.sum(-1, keepdim=True))


@check("flowformer", "limit: bounds on sources before their softmax, in both forms", below=1e-10, control="the default")
def _() -> tuple[float, float]:
    q, k, v = qkv(24)
    own = [naive.gap(attend(q, k, v, get("flowformer", limit=0.8)), flow(q, k, v, limit=0.8))]
    own.append(naive.gap(attend(q, k, v, get("flowformer", limit=0.8, causal=True)), causal_flow(q, k, v, limit=0.8)))
    return max(own), naive.gap(attend(q, k, v, "flowformer"), flow(q, k, v, limit=0.8))


def causal_flow(q: Tensor, k: Tensor, v: Tensor, ahead: int = 0, limit: float = 1.0) -> Tensor:
    """The causal form, a token at a time; source statistics read `ahead` more queries than they may."""
    q, k, eps, length = torch.sigmoid(q), torch.sigmoid(k), 1e-6, q.shape[-2]
    outs, n = [], torch.arange(1, length + 1, dtype=F64)
    inflow = torch.stack([((q[..., t, :] + eps) * (k[..., : t + 1, :].sum(-2) + eps)).sum(-1) for t in range(length)], -1) / n
    outflow = torch.stack([((k[..., t, :] + eps) * (q[..., : t + 1 + ahead, :].sum(-2) + eps)).sum(-1) for t in range(length)], -1) / n
    share = q / inflow[..., None]
    source = torch.stack([((k[..., t, :] + eps) * (share[..., : t + 1, :].sum(-2) + eps)).sum(-1) for t in range(length)], -1) / n
    force = torch.exp(source.clamp(-limit, limit))
    for t in range(length):
        sink = ((q[..., t, :] + eps) * ((k / outflow[..., None])[..., : t + 1, :].sum(-2) + eps)).sum(-1) / n[t]
        total = torch.zeros_like(v[..., 0, :])
        for j in range(t + 1):
            competition = force[..., j] / force[..., : j + 1].sum(-1) * n[j]
            total = total + ((q[..., t, :] * k[..., j, :]).sum(-1) / (inflow[..., t] * n[t]) * competition)[..., None] * v[..., j, :]
        outs.append(torch.sigmoid(sink)[..., None] * total)
    return torch.stack(outs, -2)


@check("flowformer", "causal: chunks and steps == loops over tokens", below=1e-10, control="sources that read one query ahead")
def _() -> tuple[float, float]:
    q, k, v = qkv(24)
    mechanism = get("flowformer", causal=True)
    truth, state, outs = causal_flow(q, k, v), None, []
    for t in range(24):
        o, state = step(*[x[:, :, t : t + 1] for x in (q, k, v)], mechanism, state)
        outs.append(o)
    found = attend(q, k, v, mechanism)
    return max(naive.gap(found, truth), naive.gap(torch.cat(outs, 2), truth)), naive.gap(found, causal_flow(q, k, v, 1))


@check("flowformer", "causal: outputs up to t after a change of the tokens behind it", below=0, control="the form of both directions")
def _() -> tuple[float, float]:
    q, k, v = qkv(24)
    other = [torch.cat((x[:, :, :15], torch.randn_like(x[:, :, 15:])), 2) for x in (q, k, v)]
    found = [
        naive.gap(attend(q, k, v, m)[:, :, :15], attend(*other, m)[:, :, :15]) for m in (get("flowformer", causal=True), get("flowformer"))
    ]  # type: ignore[arg-type]
    return found[0], found[1]
