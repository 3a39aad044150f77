"""The last token's logits as a sum over the components of a model: embedding, heads, MLPs and biases, through the last norm with its scale held."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import taps
from ..errors import RegardError
from ..nn.decoder import Decoder
from ..plots import Plot
from ..results import Column, Result
from ..taps.stream import first_child
from .stream import share
from .tables import HeadTable
from .weights import head_weights, written

LAST_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "final_norm")


@dataclass(frozen=True)
class Direct(Result):
    """What each component adds along a direction of the logits, a number a row: embedding, bias (B,); heads (B, layers, H); mlps (B, layers)."""

    embedding: Tensor
    heads: Tensor
    mlps: Tensor
    bias: Tensor

    @property
    def total(self) -> Tensor:
        return self.embedding + self.heads.nansum((1, 2)) + self.mlps.sum(1) + self.bias

    @property
    def table(self) -> HeadTable:
        """Means over rows."""
        return HeadTable(self.heads.double().mean(0).cpu(), "direct effect")

    def columns(self) -> dict[str, Column]:
        return self.table.columns()

    def plot(self) -> Plot:
        return self.table.plot()


def reading(model: nn.Module) -> tuple[nn.Module, Tensor, Tensor | None]:
    """(last norm, unembedding (vocab, dim), its bias) of regard's decoder or a transformers causal language model."""
    if isinstance(model, Decoder):
        return model.norm, model.embed.weight, None
    base: Any = getattr(model, "base_model", None)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    norm = None if base is None else first_child(base, LAST_NORMS)
    if not isinstance(head, nn.Linear) or norm is None:
        raise RegardError(
            f"{type(model).__name__}: expected regard's Decoder, or a transformers decoder with a last norm and linear output embeddings"
        )
    return norm, head.weight, head.bias


@torch.no_grad()
def direct_effects(model: nn.Module, ids: Tensor, towards: Tensor, position: int = -1) -> Direct:
    """ids (B, T), towards (B, vocab): weights of the logits, such as one-hot of the answer less the mean over its rivals. The sum of all parts is
    <logits at `position`, towards>. RegardError for models whose stream is not the sum of its branches (norms behind them), or has unknown MLPs."""
    norm, unembed, more = reading(model)
    found = taps.sites(model)
    with taps.read(model, ["residual_in", "mlp", "residual_out"]) as stream, taps.read(model, "heads") as seen:
        model(ids)
    whole = stream["residual_out", found[-1].layer][:, position]
    direction = towards.to(unembed) @ unembed  # (B, dim)

    def along(x: Tensor) -> Tensor:
        """A summand (B, ..., dim) of the stream -> (B, ...)."""
        view = [len(x)] + [1] * (x.dim() - 2) + [-1]
        return (share(norm, x, whole.view(view)) * direction.view(view)).sum(-1)

    start, biases = stream["residual_in", found[0].layer][:, position], torch.zeros_like(whole)
    heads, mlps, total = [], [], start.clone()
    for site in found:
        own = written(site, seen["heads", site.layer][:, :, [position]])[:, :, 0]
        mlp, bias = stream["mlp", site.layer][:, position], head_weights(site).bo
        heads.append(along(own))
        mlps.append(along(mlp))
        biases = biases + bias
        total = total + own.sum(1) + mlp + bias
    if not torch.allclose(total, whole, rtol=1e-3, atol=1e-3 * float(whole.abs().max())):
        raise RegardError(
            f"the stream of {type(model).__name__} is not the sum of its branches; expected a model with norms in front of them alone"
        )
    shift = getattr(norm, "bias", None)
    rest = along(biases)
    rest = rest if not isinstance(shift, Tensor) else rest + direction @ shift
    rest = rest if more is None else rest + towards.to(more) @ more
    width = max(x.shape[1] for x in heads)
    padded = torch.stack([nn.functional.pad(x, (0, width - x.shape[1]), value=float("nan")) for x in heads], 1)
    return Direct(along(start), padded, torch.stack(mlps, 1), rest)
