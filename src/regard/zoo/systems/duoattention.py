"""DuoAttention: heads that retrieve keep everything, the others the first and the newest tokens (id 213; Xiao et al., 2024).

identify: head output a Full + (1 - a) Stream, a in [0, 1] a key head, the model frozen; loss = sum over asked tokens of mean_d (h - h')^2 / their
number + 0.05 mean |a|, h the final hidden state with all heads full;   deploy: a >= quantile(a, sparsity) retrieves, others stream
Not built: weights in another order of heads (parts of the cache know their heads).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from regard.adapt.attending import attending
from regard.algebra import Causal, Sinks, Weighted, Window
from regard.cache.layer import KeptLayer, Part
from regard.cache.packed import Form, Packed, unpacked
from regard.cache.policy import Policy, oldest
from regard.cache.view import View, read
from regard.catalog.registry import register
from regard.engine.door import attend
from regard.errors import RegardError
from regard.generate.tuning import states

NAME = "regard_duo"
_training: weakref.WeakKeyDictionary[nn.Module, tuple[Tensor, Weighted]] = weakref.WeakKeyDictionary()


def streaming(sink: int, recent: int) -> Weighted:
    """Softmax over the first `sink` tokens and the last `recent` tokens, a query's own among them."""
    return Weighted(mask=Causal() & (Window(recent) | Sinks(sink) if sink else Window(recent)))


def both(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None = None, **options: Any) -> Any:
    """Attention of the training pass: the batch's first half in full, the second half mixed from that and streaming."""
    gates, stream = _training[module]
    half = len(q) // 2
    full = attend(q[:half], k[:half], v[:half], Weighted(mask=Causal()), scale=scaling)
    part = attend(q[half:], k[half:], v[half:], stream, scale=scaling)
    a = gates.to(part.dtype).repeat_interleave(q.shape[1] // len(gates))[:, None, None]
    return torch.cat((full, a * full.detach() + (1 - a) * part)).transpose(1, 2), None


def identify_heads(
    model: nn.Module,
    batches: Callable[[int], tuple[Tensor, Tensor]],
    steps: int = 2000,
    lr: float = 0.02,
    penalty: float = 0.05,
    sink: int = 128,
    recent: int = 256,
    first: Tensor | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> Tensor:
    """Gates (layers, key heads) of a transformers decoder, trained alone, from `first` (None: ones): 1 retrieves, 0 streams.

    batches(step) -> (ids (B, L), asked (B, L) bool: tokens whose hidden states count), such as `regard.tasks.passkeys.passkeys`. AdamW without decay of weights; lr rises
    over the first fifth of the steps and falls over the last; gates are clamped after every step. recent: tokens that streaming heads see beside
    the first ones, a query's own among them (at work, `DuoAttention` shows as many before it). The model comes back as it was.
    """
    host: Any = model
    modules = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "o_proj") and hasattr(m, "k_proj")]
    if not modules or steps < 1 or sink < 0 or recent < 1:
        raise RegardError(f"{type(model).__name__}, steps={steps}, sink={sink}, recent={recent}: expected a decoder, and positive numbers")
    device: torch.device = modules[0].o_proj.weight.device  # type: ignore[union-attr, assignment]
    start = torch.ones(len(modules), host.config.get_text_config().num_key_value_heads) if first is None else first.detach().float()
    gates = nn.Parameter(start.clone().to(device))
    optimizer = torch.optim.AdamW([gates], lr, weight_decay=0.0)
    warm = max(1, steps // 5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: min(1.0, (at + 1) / warm, max(0.0, (steps - at) / warm)))
    learns = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(False)
    try:
        with attending(model, NAME, both):
            for step in range(steps):
                ids, asked = batches(step)
                if asked.shape != ids.shape or not bool(asked.any()):
                    raise RegardError(
                        f"asked {tuple(asked.shape)} of ids {tuple(ids.shape)}: expected the same shape, and a token that is asked for"
                    )
                for module, row in zip(modules, gates, strict=True):
                    _training[module] = row, streaming(sink, recent)
                hidden = states(host, torch.cat((ids, ids)))[0].float()
                apart = (hidden[: len(ids)].detach() - hidden[len(ids) :]).square().mean(-1)
                loss = apart[asked].sum() / asked.sum() + penalty * gates.abs().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                gates.data.clamp_(0, 1)
                if progress is not None:
                    progress(step, float(loss.detach()))
    finally:
        for p, learned in zip(model.parameters(), learns, strict=True):
            p.requires_grad_(learned)
        for module in modules:
            _training.pop(module, None)
    return gates.detach()


@register("duoattention", kind="policy")
class DuoAttention(Policy):
    """Gates of `identify_heads` (layers, key heads) at work: `with DuoAttention(gates)(model): model.generate(...)`.

    sparsity: the share of heads that stream (0.5 for grouped heads in the paper, 0.75 for others); or threshold: gates below it stream. sink,
    recent: tokens that streaming heads keep. Prompts are read by streaming heads in chunks of `chunk` queries, whose keys are the first tokens, the
    newest ones before the chunk and the chunk. Positions are those of the text. bits: what retrieving heads keep is stored in 2, 4 or 8 bits a number
    as `regard.cache.KIVI` does (or a `regard.cache.packed.Form`), streaming heads' few entries are not; None: as the model gives them.
    """

    def __init__(
        self,
        gates: Tensor,
        sparsity: float = 0.5,
        threshold: float | None = None,
        sink: int = 64,
        recent: int = 256,
        chunk: int = 512,
        bits: int | Form | None = None,
    ):
        super().__init__(1.0, decode=True)
        if gates.dim() != 2 or not bool(gates.isfinite().all()) or not 0 <= sparsity <= 1 or sink < 0 or recent < 1 or chunk < 1:
            raise RegardError(
                f"gates {tuple(gates.shape)}, sparsity={sparsity}, sink={sink}, recent={recent}, chunk={chunk}: expected finite (layers, "
                "key heads), a share, and positive numbers"
            )
        if threshold is None:
            threshold = -1.0 if sparsity == 0 else 2.0 if sparsity == 1 else float(gates.double().flatten().quantile(sparsity))
        self.retrieves = gates.double() >= threshold
        self.sink, self.recent, self.chunk = sink, recent, chunk
        self.form = Form(bits, bits) if isinstance(bits, int) else bits

    def begin(self, layers: int, heads: int) -> None:
        if self.retrieves.shape != (layers, heads):
            raise RegardError(f"gates {tuple(self.retrieves.shape)}: expected one for each of {layers} layers and {heads} key heads")

    def all_retrieve(self, view: View) -> bool:
        """Whether nothing of the part is ever dropped."""
        kinds = self.retrieves[view.layer].tolist()
        return all(kinds[head] for head in view.part.heads.tolist())

    def reading(self, view: View) -> Part:
        return unpacked(view.part)

    def compute(self, view: View, places: Tensor) -> Tensor:
        if len(places) == 1 or self.all_retrieve(view):
            return super().compute(view, places)
        part, all_heads = view.part, self.retrieves[view.layer].to(view.query.device)[view.part.heads]
        out = view.query.new_zeros(*view.query.shape[:4], part.values.shape[-1])
        full, near = all_heads.nonzero()[:, 0], (~all_heads).nonzero()[:, 0]
        if len(full):
            out[:, full] = read(view.query[:, full], part.of(full), places, view.scale, view.window)
        own, n, m = part.of(near), len(places), view.length
        first = oldest(view, self.sink)[:, near]
        edge = int(first.any(1).any(0).nonzero().max()) + 1 if bool(first.any()) else 0
        for start in range(0, n, self.chunk):
            stop = min(start + self.chunk, n)
            old = min(max(edge, m - n + start - self.recent), m - n + stop)
            at = torch.cat((torch.arange(min(edge, m - n + stop)), torch.arange(old, m - n + stop))).to(part.keys.device)
            piece = own.entries(lambda x, at=at: x.index_select(2, at))  # type: ignore[misc]
            shown = first.index_select(2, at)[:, :, None] | (places[start:stop, None] - piece.places[:, :, None] <= self.recent)
            out[:, near, :, start:stop] = read(
                view.query[:, near, :, start:stop], piece, places[start:stop], view.scale, view.window, shown
            )
        return out

    def scores(self, view: View) -> Tensor:
        return view.part.places.float().masked_fill(oldest(view, self.sink), torch.inf)

    def counts(self, view: View, scores: Tensor) -> Tensor:
        whole = self.retrieves[view.layer].to(scores.device)[view.part.heads]
        return torch.where(whole, view.length, self.sink + self.recent).expand(len(scores), -1)

    def run(self, layer: KeptLayer, number: int, view: View) -> None:
        before = len(layer.parts)
        if not self.all_retrieve(view):
            oldest(view, self.sink)  # which are the first is known while they are there
            super().run(layer, number, view)
        if self.form is None:
            return
        for at in range(number, number + 1 + len(layer.parts) - before):
            if bool(self.retrieves[view.layer][layer.parts[at].heads.cpu()].all()):
                layer.parts[at] = Packed.stored(layer.parts[at], self.form)
