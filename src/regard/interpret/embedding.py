"""Which tokens a text's vector hangs on: gradients of its cosine with a query's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import RegardError
from ..nn.embedder import Embedder


def token_saliency(model: Embedder, query: Tensor, document: Tensor, drop: tuple[int, int] = (0, 1)) -> Tensor:
    """query (n,), document (T,) ids -> the norm of the cosine's gradient by each token's embedding, (T - sum(drop),). drop: special tokens at the
    beginning and at the end, which are left out."""
    if document.dim() != 1 or query.dim() != 1 or min(drop) < 0 or len(document) <= sum(drop):
        raise RegardError(
            f"query {tuple(query.shape)}, document {tuple(document.shape)}, drop={drop}; expected (n,) and (T,), with more tokens than are left out"
        )
    with torch.no_grad():
        wanted = F.normalize(model(query[None]), dim=1)
    with torch.enable_grad():
        embedded = model.embed(document[None]).detach().requires_grad_()
        cosine = (wanted * F.normalize(model(document[None], embedded=embedded), dim=1)).sum()
        slope = torch.autograd.grad(cosine, embedded)[0][0]
    return slope[drop[0] : len(slope) - drop[1]].norm(dim=1)


def resampled(saliency: Tensor, points: int = 100, percentile: float = 99.0) -> Tensor:
    """saliency (T,) clipped at its percentile and divided by it, read by straight lines at `points` even places from the first to the last."""
    top = torch.quantile(saliency, percentile / 100)
    scaled = saliency.clamp(0, float(top)) / top if float(top) > 0 else saliency
    return F.interpolate(scaled[None, None], points, mode="linear", align_corners=True)[0, 0]
