"""PosIR: does a retriever find evidence wherever in the document it stands? (id 217; 2026).

rho = (start + stop) / 2 / length in 20 bins, closed on the right;  y_b = mean nDCG@10 of the queries of bin b;  PSI = 1 - min_b y_b / max_b y_b
nDCG@10 = sum_{r <= 10} rel_r / log2(r + 1) / ideal;  buckets of token lengths (0, 512], (512, 1024], (1024, 1536], above; a bucket's score is mean_b y_b
saliency_t = |d cos(query, document) / d e_t|, clipped at its 99th percentile, which becomes 1, and read at 100 places
Bins without queries are left out. The released code's first bin has its centre at 0.0245, pandas' label of it; here it is 0.025.
Not built: the 310 datasets themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.catalog.registry import register
from regard.errors import MissingDependency, RegardError
from regard.interpret.embedding import resampled, token_saliency
from regard.nn.embedder import Embedder
from regard.plots import Plot, figure
from regard.results import Column, Result
from regard.tasks.evidence import Evidence, ndcg

Encode = Callable[[Tensor, Tensor], Tensor]
EDGES = (0, 512, 1024, 1536)


@dataclass(frozen=True)
class Curve(Result):
    """Bins that hold queries: centre of their places, mean score and number of queries, (b,) each."""

    centre: Tensor
    mean: Tensor
    count: Tensor

    @property
    def psi(self) -> float:
        """0: as good everywhere; 1: nothing is found somewhere. RegardError where nothing is found anywhere."""
        if float(self.mean.max()) <= 0:
            raise RegardError("no query finds its document in any bin, so the PSI has no value; expected some score above 0")
        return 1 - float(self.mean.min() / self.mean.max())

    @property
    def score(self) -> float:
        """The mean over bins."""
        return float(self.mean.mean())

    def trend(self) -> dict[str, float]:
        """slope, intercept, r_squared of a line through the bins; pearson, spearman, kendall (tau-b) of centre and mean. Negative: primacy; positive:
        recency. Correlations of a flat curve, which has none, are 0."""
        try:
            from scipy import stats
        except ImportError as missing:
            raise MissingDependency("trends need scipy: pip install 'regard[graphs]'") from missing
        if len(self.mean) < 2:
            raise RegardError(f"the curve has {len(self.mean)} bin; expected two or more for a trend")
        x, y = self.centre.tolist(), self.mean.tolist()
        if min(y) == max(y):
            return {"slope": 0.0, "intercept": y[0], **dict.fromkeys(("r_squared", "pearson", "spearman", "kendall"), 0.0)}
        line = stats.linregress(x, y)
        ranks = {"pearson": stats.pearsonr(x, y), "spearman": stats.spearmanr(x, y), "kendall": stats.kendalltau(x, y)}
        own = {"slope": line.slope, "intercept": line.intercept, "r_squared": line.rvalue**2}
        return {name: float(x) for name, x in {**own, **{name: found.statistic for name, found in ranks.items()}}.items()}


def curve(place: Tensor, score: Tensor, bins: int = 20) -> Curve:
    """place (Q,) in [0, 1], score (Q,) -> the means of the bins ((n - 1) / bins, n / bins], the first with 0."""
    if place.shape != score.shape or place.dim() != 1 or not len(place) or bins < 1 or not bool(((place >= 0) & (place <= 1)).all()):
        raise RegardError(f"place {tuple(place.shape)}, score {tuple(score.shape)}, bins={bins}; expected (Q,) both, places in [0, 1]")
    edges = torch.arange(bins + 1, dtype=torch.float64, device=place.device) * (1 / bins)
    at = (torch.searchsorted(edges, place.double()) - 1).clamp(0, bins - 1)
    count = torch.bincount(at, minlength=bins)
    mean = torch.zeros(bins, dtype=torch.float64, device=place.device).index_add(0, at, score.double()) / count
    held = count > 0
    return Curve(((edges[:-1] + edges[1:]) / 2)[held], mean[held], count[held])


@dataclass(frozen=True)
class PositionReport(Result):
    """score: mean nDCG over all queries; overall: their curve; buckets: a curve for each bucket of lengths that has queries, "Q1" the shortest."""

    score: float
    overall: Curve
    buckets: dict[str, Curve]

    @property
    def psi(self) -> float:
        return self.overall.psi

    def plot(self) -> Plot:
        """Score by place, for all queries and each bucket."""
        lines = {"all": self.overall, **self.buckets}
        points = {name: list(zip(c.centre.tolist(), c.mean.tolist(), strict=True)) for name, c in lines.items()}
        return figure("Score by place of the evidence", "place in the document", "nDCG", points)

    def columns(self) -> dict[str, Column]:
        """A row for all queries and for each bucket; psi is NaN where no query finds its document."""
        curves = [self.overall, *self.buckets.values()]
        return {
            "documents": ["all", *self.buckets],
            "queries": [int(c.count.sum()) for c in curves],
            "nDCG": [self.score, *(c.score for c in self.buckets.values())],
            "psi": [c.psi if float(c.mean.max()) > 0 else float("nan") for c in curves],
        }


def report_of(scores: Tensor, place: Tensor, lengths: Tensor, bins: int = 20, edges: Sequence[float] = EDGES) -> PositionReport:
    """Scores, places and token lengths of queries (Q,). edges: lower bounds of the buckets, rising; a length on a bound is in the bucket below."""
    bounds = torch.tensor([*edges], dtype=torch.float64)
    if list(edges) != sorted(set(edges)) or bool((lengths <= edges[0]).any()):
        raise RegardError(f"edges={list(edges)}, shortest length {int(lengths.min())}; expected rising edges, the first below every length")
    bucket = torch.bucketize(lengths.double().cpu(), bounds).to(place.device)
    own = {f"Q{n}": curve(place[bucket == n], scores[bucket == n], bins) for n in bucket.unique().tolist()}
    return PositionReport(float(scores.double().mean()), curve(place, scores, bins), own)


@register("posir", kind="function")
@torch.no_grad()
def position_report(
    encode: Encode, data: Evidence, k: int = 10, bins: int = 20, edges: Sequence[float] = EDGES, batch: int = 32
) -> PositionReport:
    """Rank all documents for every query by the cosine of their vectors. encode: (ids (B, T), keep (B, T) bool) -> (B, D), such as an `Embedder`."""

    def vectors(ids: Tensor, keep: Tensor) -> Tensor:
        parts = [encode(a, b) for a, b in zip(ids.split(batch), keep.split(batch), strict=True)]
        return F.normalize(torch.cat(parts).float(), dim=1)

    queries = vectors(data.queries, torch.ones(data.queries.shape, dtype=torch.bool))
    scores = queries @ vectors(data.documents, data.keep).T
    return report_of(ndcg(scores, torch.eye(len(queries), device=scores.device), k).cpu(), data.place, data.lengths, bins, edges)


def embedding_saliency(
    model: Embedder,
    data: Evidence,
    *,
    between: tuple[float, float] = (0.4, 0.6),
    least: int = 1024,
    points: int = 100,
    percentile: float = 99.0,
    drop: tuple[int, int] = (0, 1),
) -> Tensor:
    """The mean saliency curve (points,) of the documents of `least` tokens or more whose evidence stands `between` these shares of them."""
    chosen = (data.lengths >= least) & (data.place >= between[0]) & (data.place <= between[1])
    pairs: Iterable[int] = chosen.nonzero()[:, 0].tolist()
    curves = [
        resampled(token_saliency(model, data.queries[n], data.documents[n, : data.lengths[n]], drop), points, percentile) for n in pairs
    ]
    if not curves:
        raise RegardError(f"no document of least={least} tokens has its evidence between={between}; expected one or more")
    return torch.stack(curves).mean(0)
