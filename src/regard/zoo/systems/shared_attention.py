"""Shared attention: later layers read with an earlier layer's weights (id 62; Liao & Vargas, 2024).

source s: P = softmax(q k^T / sqrt(d)), O = P V_s W_O;   sharer l: O_l = concat_h(P_h V_l) W_O^l, without queries, keys and softmax
cache of a sharer: values alone.   Which layers: the longest late run whose averaged maps are alike, cos(A_l, A_l') above a threshold
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regard import taps
from regard.catalog.registry import register
from regard.errors import RegardError


class Sharer(nn.Module):
    """An attention layer of a transformers decoder without its queries and keys."""

    def __init__(self, layer: Any, weights: list[Tensor]):
        super().__init__()
        self.v_proj, self.o_proj, self.head_dim, self.layer_idx = layer.v_proj, layer.o_proj, layer.head_dim, layer.layer_idx
        self.weights = weights

    def forward(self, hidden_states: Tensor, *args: Any, past_key_values: Any = None, **options: Any) -> tuple[Tensor, None]:
        cache = past_key_values if past_key_values is not None else options.get("cache")
        v = self.v_proj(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if cache is not None:
            held = cache.layers[self.layer_idx] if self.layer_idx < len(cache.layers) else None
            if held is not None and held.is_initialized and held.keys.shape[-1]:
                raise RegardError(
                    f"the cache holds keys of layer {self.layer_idx}, which shares now; expected a new cache, filled with sharing on"
                )
            v = cache.update(v[..., :0], v, self.layer_idx)[1]
        if not self.weights:
            raise RegardError("a sharer ran before its source; expected the whole model to run, layer after layer")
        p = self.weights[0]
        if p.shape[0] != v.shape[0] or p.shape[-1] != v.shape[2]:
            raise RegardError(f"the source saw {p.shape[-1]} keys and a sharer {v.shape[2]}; expected a new cache, filled with sharing on")
        o = p.to(v.dtype) @ v.repeat_interleave(p.shape[1] // v.shape[1], 1)
        return self.o_proj(o.transpose(1, 2).flatten(2)), None


@register("shared-attention", kind="policy")
class SharedAttention:
    """Sharing in a transformers decoder (Llama and its like, with q_proj, v_proj, o_proj), until `remove()` or the end of a `with`.

    source: the layer whose weights are read; sharers: the layers that read them, all later (None: every layer after it, which is the
    paper's choice for its last four). Training-free; the model may be fine-tuned so. Caches must be filled with sharing on. `drop()` gives up
    the sharers' queries and keys for good.
    """

    def __init__(self, model: nn.Module, source: int, sharers: Iterable[int] | None = None):
        layers: Any = getattr(model, "get_decoder", lambda: model)().layers
        numbers = list(range(source + 1, len(layers))) if sharers is None else sorted(set(sharers))
        if not numbers or not 0 <= source < numbers[0] or numbers[-1] >= len(layers):
            raise RegardError(f"source={source}, sharers={numbers}: expected 0 <= source < every sharer < {len(layers)} layers")
        own = [layers[number].self_attn for number in (source, *numbers)]
        for layer in own:
            if not all(hasattr(layer, name) for name in ("q_proj", "v_proj", "o_proj", "head_dim", "layer_idx")):
                raise RegardError(f"{type(layer).__name__}: expected attention with q_proj, k_proj, v_proj and o_proj")
            if (layer.head_dim, layer.q_proj.weight.shape) != (own[0].head_dim, own[0].q_proj.weight.shape):
                raise RegardError(f"layers {[source, *numbers]} have heads of different number or size; expected alike ones")
        self.layers, self.numbers = layers, numbers
        self.weights: list[Tensor] = []
        self.kept = dict(zip(numbers, own[1:], strict=True))
        self.session: Any = taps.edit(model, {"weights": self.hand_on}, layers=[source])
        self.session.__enter__()
        for number in numbers:
            layers[number].self_attn = Sharer(layers[number].self_attn, self.weights)

    def hand_on(self, p: Tensor) -> Tensor:
        self.weights[:] = [p]
        return p

    def drop(self) -> None:
        """Forget the sharers' own queries and keys: `remove` then leaves them as sharers."""
        self.kept = {}

    def remove(self) -> None:
        """The model as it was."""
        for number, layer in self.kept.items():
            self.layers[number].self_attn = layer
        if self.kept and self.session is not None:
            self.session.close()
            self.session = None
        self.weights.clear()

    def __enter__(self) -> SharedAttention:
        return self

    def __exit__(self, *why: object) -> None:
        self.remove()


@torch.no_grad()
def map_similarity(model: nn.Module, probes: Sequence[Tensor]) -> Tensor:
    """(layers, layers): cosine of the layers' maps, each averaged over heads and over the probes, token ids (B, L) of one L."""
    if len({ids.shape[1] for ids in probes}) != 1:
        raise RegardError("probes: expected at least one tensor of token ids (B, L), all of one length")
    count, total = len(taps.sites(model)), 0
    mean: list[Any] = [0.0] * count
    for ids in probes:
        with taps.read(model, "weights") as seen:
            model(input_ids=ids, use_cache=False)
        for layer in range(count):
            mean[layer] = mean[layer] + seen["weights", layer].double().mean(1).sum(0)
        total += len(ids)
    maps = torch.stack([one.flatten() / total for one in mean])
    maps = maps / maps.norm(dim=1, keepdim=True)
    return maps @ maps.T


def late_run(similarity: Tensor, threshold: float) -> tuple[int, list[int]]:
    """(source, sharers): the longest run of layers that are pairwise alike above the threshold; of equally long ones the latest."""
    count, best = len(similarity), (0, 0)
    for start in range(count):
        stop = start + 1
        while stop < count and bool((similarity[start : stop + 1, start : stop + 1] >= threshold).all()):
            stop += 1
        if stop - start >= best[1] - best[0]:
            best = (start, stop)
    if best[1] - best[0] < 2:
        raise RegardError(
            f"threshold={threshold}: no two neighbouring layers are that alike; the most alike are {float(similarity.diagonal(1).max()):.3f}"
        )
    return best[0], list(range(best[0] + 1, best[1]))
