"""Querybank normalisation: retrieval without hubs, by what a bank of other queries says of each item (id 105; Bogolin et al., 2022).

IS_qg = exp(beta S_qg) / sum_b exp(beta B_bg);  A = items among the k best of any bank query
DIS: row q is IS_q where q's best item is in A, else S_q.  CSLS: 2 S_qg - mean of the 10 largest B_bg.  GC: S_qg - #{b: B_bg > S_qg}
Only a row's ranking means anything: rows stand on different scales.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.algebra import Bias, Weighted
from regard.catalog.registry import register
from regard.errors import RegardError

METHODS = ("dis", "is", "csls", "gc")


def matrices(sims: Tensor, bank: Tensor) -> None:
    for name, x in (("sims", sims), ("bank", bank)):
        if x.dim() != 2 or not x.is_floating_point() or 0 in x.shape:
            raise RegardError(
                f"{name} is {tuple(x.shape)} of {x.dtype}; expected similarities (queries, items) in floating point, none empty"
            )
        if not x.isfinite().all():
            raise RegardError(f"{name} holds values that are not finite; expected similarities")
    if sims.shape[1] != bank.shape[1]:
        raise RegardError(f"sims has {sims.shape[1]} items and bank {bank.shape[1]}; expected the same gallery")


def activated(bank: Tensor, k: int) -> Tensor:
    """Items (G,) bool that some bank query has among its k best."""
    if not 1 <= k <= bank.shape[1]:
        raise RegardError(f"k={k}; expected between 1 and the {bank.shape[1]} items")
    return torch.zeros(bank.shape[1], dtype=torch.bool, device=bank.device).index_fill_(0, bank.topk(k, 1).indices.flatten(), True)


@register("inverted-softmax", kind="function")
def qb_norm(
    sims: Tensor, bank: Tensor, method: str = "dis", *, beta: float | None = None, k: int | None = None, logs: bool = False
) -> Tensor:
    """Similarities sims (Q, G) of queries to items, rescored by those of a bank, bank (M, G), such as training queries -> (Q, G).

    method: "dis" (dynamic inverted softmax), "is", "csls" or "gc". beta: inverse temperature of "dis" and "is" (None: 20). k: how many best
    items of a bank query are activated in "dis" (None: 1), or how many bank queries "csls" averages (None: 10). logs: inverted softmaxes as
    logarithms, which rank alike and never leave the range of floating point; without, rows that would are refused.
    """
    matrices(sims, bank)
    if method not in METHODS:
        raise RegardError(f"method={method!r}; expected one of {', '.join(map(repr, METHODS))}")
    soft = method in ("dis", "is")
    for name, given, used in (("beta", beta, soft), ("k", k, method in ("dis", "csls")), ("logs", logs or None, soft)):
        if given is not None and not used:
            raise RegardError(f"{name}={given}: {method!r} does not read it; expected it left out")
    if method == "gc":
        ahead = bank.mT.sort(1).values.contiguous()
        return sims - (len(bank) - torch.searchsorted(ahead, sims.mT.contiguous(), right=True)).mT.to(sims.dtype)
    if method == "csls":
        count = min(10, len(bank)) if k is None else k
        if not 1 <= count <= len(bank):
            raise RegardError(f"k={k}; expected between 1 and the {len(bank)} queries of the bank")
        return 2 * sims - bank.topk(count, 0).values.mean(0)
    beta = 20.0 if beta is None else beta
    scores = beta * sims - torch.logsumexp(beta * bank, 0)
    if not logs:
        room = 0.9 * math.log(torch.finfo(scores.dtype).max)
        if float(scores.amax(1).abs().max()) > room:
            raise RegardError(
                f"exp of {float(scores.abs().max()):.3g} leaves {scores.dtype}; expected beta * sims near beta * bank, or logs=True"
            )
        scores = scores.exp()
    if method == "is":
        return scores
    return torch.where(activated(bank, 1 if k is None else k)[sims.argmax(1), None], scores, sims)


def ranks(sims: Tensor, truth: Tensor | None = None) -> Tensor:
    """Places (Q,) from 0 of each query's item; among equals the mean place. truth (Q,): its number (None: queries in order, the same number
    of them for each item)."""
    if truth is None:
        if len(sims) % sims.shape[1]:
            raise RegardError(f"{len(sims)} queries of {sims.shape[1]} items; expected as many queries for each item, or truth")
        truth = torch.arange(len(sims), device=sims.device) // (len(sims) // sims.shape[1])
    own = sims.gather(1, truth[:, None])
    return (sims > own).sum(1) + ((sims == own).sum(1) - 1) / 2


def retrieval_metrics(sims: Tensor, truth: Tensor | None = None, keep: Tensor | None = None) -> dict[str, float]:
    """R1, R5, R10, R50 in percent, MedR and MeanR from 1, and the geometric mean of the first three. keep (Q,) bool: queries that count."""
    places = ranks(sims, truth).double()
    places = places if keep is None else places[keep]
    if not len(places):
        raise RegardError("keep leaves no query; expected at least one")
    found = {f"R{n}": 100 * float((places < n).double().mean()) for n in (5, 10, 50)}
    found = {"R1": 100 * float((places == 0).double().mean()), **found}
    found["geometric_mean"] = (found["R1"] * found["R5"] * found["R10"]) ** (1 / 3)
    return {**found, "MedR": float(places.quantile(0.5)) + 1, "MeanR": float(places.mean()) + 1}


def hubness(sims: Tensor, k: int = 1) -> float:
    """Skewness of how many queries have an item among their k best, over the items; 0 where all have equally many."""
    counts = torch.bincount(sims.topk(k, 1).indices.flatten(), minlength=sims.shape[1]).double()
    gaps = counts - counts.mean()
    spread = gaps.square().mean().sqrt()
    return float(gaps.pow(3).mean() / spread**3) if spread > 0 else 0.0


def without_hubs() -> Weighted:
    """Attention whose scores s_ij - log sum_b exp(s_bj) are the inverted softmax's, for `attend(..., position_bias=bank_bias(bank, k))`."""
    return Weighted(position=Bias())


def bank_bias(bank: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """-log sum_b exp(scale b . k_j): bank queries (B, H, M, D) and keys (B, H, Lk, D) -> (B, H, 1, Lk), to add to scores of that scale."""
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    return -torch.logsumexp(scale * bank @ k.mT, -2, keepdim=True)
