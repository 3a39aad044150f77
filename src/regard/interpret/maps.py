"""Whole maps of attention to walk through: one HTML page, which needs no network."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import RegardError
from ..plots import Plot, heatmap
from ..taps import read
from .heads import head_counts

MOST = 48 * 2**20  # weights of a page: more would take a browser too long


@dataclass(frozen=True)
class AttentionView:
    """tokens: as text. weights: by layer, (h, L, L). heads: of them."""

    tokens: tuple[str, ...]
    weights: Mapping[int, Tensor]
    heads: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        length, total = len(self.tokens), 0
        for layer, x in self.weights.items():
            if x.dim() != 3 or x.shape[1:] != (length, length):
                raise RegardError(
                    f"weights of layer {layer} have shape {tuple(x.shape)}; expected (heads, {length}, {length}), as there are tokens"
                )
            if self.heads is not None and len(self.heads) != len(x):
                raise RegardError(f"heads={self.heads} and layer {layer} has maps of {len(x)}; expected a number for each map")
            if not bool(((x >= 0) & (x <= 1 + 1e-3)).all()):
                raise RegardError(
                    f"weights of layer {layer} are not between 0 and 1; the page shows shares alone. Expected a softmax's, or .plot()"
                )
            total += x.numel()
        if not total:
            raise RegardError("there are no weights to show; expected a token, a layer and a head at least")
        if total > MOST:
            raise RegardError(
                f"{total} weights make a page too large for a browser; expected at most {MOST}: fewer layers, heads or tokens"
            )

    def head_numbers(self, layer: int) -> Sequence[int]:
        return range(len(self.weights[layer])) if self.heads is None else self.heads

    def page(self) -> str:
        """The page. Weights are kept in a byte each, (byte / 255)^2: to 0.004."""
        maps = []
        for layer, x in self.weights.items():
            codes = (x.detach().double().clamp(0, 1).sqrt() * 255).round().to(torch.uint8).cpu()
            coded = [base64.b64encode(bytes(code.flatten().tolist())).decode() for code in codes]
            maps.append([{"head": head, "map": code} for head, code in zip(self.head_numbers(layer), coded, strict=True)])
        data = json.dumps({"tokens": self.tokens, "layers": list(self.weights), "maps": maps})
        return files(__package__).joinpath("maps.html").read_text("utf-8").replace("DATA", data.replace("<", "\\u003c"), 1)

    def save(self, file: str | Path) -> Path:
        file = Path(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(self.page(), encoding="utf-8")
        return file

    def _repr_html_(self) -> str:
        return f'<iframe srcdoc="{html.escape(self.page())}" style="width:100%;height:900px;border:0"></iframe>'

    def plot(self, layer: int, head: int) -> Plot:
        """One map, a row a query."""
        if layer not in self.weights or head not in self.head_numbers(layer):
            raise RegardError(f"layer={layer}, head={head}; expected a layer of {list(self.weights)} and a head that was read")
        own = self.weights[layer][list(self.head_numbers(layer)).index(head)]
        return heatmap(f"layer {layer} head {head}", "key", "query", own.double().tolist())


@torch.no_grad()
def attention_view(
    model: nn.Module, ids: Tensor, tokens: Sequence[str], *, layers: Iterable[int] | None = None, heads: Iterable[int] | None = None
) -> AttentionView:
    """The weights of a model's self-attention on one text, ids (1, L), whose tokens read `tokens` (L,). layers, heads: None means all.

        attention_view(model, ids, [tokenizer.decode(t) for t in ids[0]]).save("attention.html")

    RegardError as `taps.read` raises it, for layers whose maps are not L x L (cross-attention), and for more weights than a page can hold.
    """
    if ids.dim() != 2 or len(ids) != 1 or ids.shape[1] != len(tokens):
        raise RegardError(f"ids has shape {tuple(ids.shape)} and there are {len(tokens)} tokens; expected (1, L) and L")
    layers, heads = (None if x is None else list(x) for x in (layers, heads))
    counts = head_counts(model)
    wanted = sum(
        (counts[at] if heads is None else len(heads)) for at in (range(len(counts)) if layers is None else layers) if at < len(counts)
    )
    if wanted * ids.shape[1] ** 2 > MOST:
        raise RegardError(
            f"{wanted} heads on {ids.shape[1]} tokens make a page too large for a browser; expected fewer layers=[...], heads=[...] or tokens: "
            f"at most {MOST // ids.shape[1] ** 2} heads"
        )
    with read(model, "weights", layers=layers, heads=heads) as seen:
        model(ids)
    return AttentionView(tuple(tokens), {layer: x[0] for layer, x in seen.items("weights")}, None if heads is None else tuple(heads))
