"""InfLLM-V2 and MiniCPM-SALA: a quarter of the layers sparse without positions, the others lightning with them (id 219; MiniCPM team, 2026).

block score = max over the key windows touching it of their softmax mass, summed over a group; read: first block, local blocks, best blocks
linear layer: o = W_o(sigmoid(W_z x) RMS(S q)), S = lam S + k v^T
Not built: pages for the sparse layers' cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.algebra import Causal, Chosen, Recipe, Recurrent, Selection, View, Weighted, bind
from regard.algebra.blocks import top_k as best
from regard.algebra.compressed import group_sum, kernel_probabilities, kernels, largest_touching
from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.attention import Attention
from regard.nn.decoder import Decoder
from regard.zoo.linear.lightning_attention_2 import lightning

KERNEL, STRIDE = 32, 16


def infllm_scores(q: Tensor, k: Tensor, first: int, block_size: int, kernel: int = KERNEL, stride: int = STRIDE) -> Tensor:
    """(B, Hkv, Lq, blocks) of q times scale."""
    count = -(-k.shape[-2] // block_size)
    p = group_sum(kernel_probabilities(q, kernels(k, kernel, stride), first, kernel, stride), k.shape[1])
    return largest_touching(p, kernel, stride, block_size, count)


def infllm_plan(
    q: Tensor, k: Tensor, view: View, *, block_size: int, top_k: int, window: int, dense_len: int, kernel: int, stride: int
) -> Selection | None:
    """Blocks each query reads, the same for the heads of a group; None: the sequence is short enough to read whole."""
    count = -(-k.shape[-2] // block_size)
    if k.shape[-2] <= dense_len or top_k + -(-window // block_size) >= count:
        return None
    scores = infllm_scores(q, k, view.first, block_size, kernel, stride)
    own = torch.arange(view.first, view.first + q.shape[-2], device=q.device)[:, None] // block_size
    block = torch.arange(count, device=q.device)
    local = (block <= own) & (block > own - max(1, window // block_size))
    past = (block <= own) & ~local
    scores = scores.masked_fill(block == 0, float("inf"))
    keep = local | best(scores, past, top_k)
    return Selection(keep.repeat_interleave(q.shape[1] // k.shape[1], 1), 1, block_size)


def infllm(
    block_size: int = 64, top_k: int = 64, window: int = 2048, dense_len: int = 8192, kernel: int = KERNEL, stride: int = STRIDE
) -> Weighted:
    """The sparse layer's mechanism: no parameters of its own, queries and keys normalised, no positions, a gated output.

    top_k: blocks beside the local ones, the first always among them. window: local tokens. dense_len: up to here everything is read.
    """
    if kernel % stride or block_size % stride:
        raise RegardError(f"kernel={kernel}, block_size={block_size}: expected multiples of stride={stride}")
    sizes = {"block_size": block_size, "top_k": top_k, "window": window, "dense_len": dense_len, "kernel": kernel, "stride": stride}
    recipe = Recipe(qk_norm="rms", out_gate="sigmoid", rope=False)
    return Weighted(mask=Causal(), select=Chosen(bind(infllm_plan, **sizes)), recipe=recipe)


def sala_lightning(layer: int = 0, layers: int = 1) -> Recurrent:
    """The linear layer's mechanism: rotary positions, normalised queries and keys, slopes that slow down with depth."""
    recipe = Recipe(qk_norm="rms", out_norm="rms", out_gate="sigmoid", rope=True)
    return replace(lightning(layer / max(1, layers)), recipe=recipe)


@dataclass(frozen=True)
class SALAConfig:
    """vocab, dim, layers, heads, kv_heads of the stack; share of softmax layers; the sparse layers' sizes (see `infllm`)."""

    vocab: int = 256
    dim: int = 64
    layers: int = 8
    heads: int = 4
    kv_heads: int = 2
    share: float = 0.25
    block_size: int = 64
    top_k: int = 64
    window: int = 2048
    dense_len: int = 8192
    kernel: int = KERNEL
    stride: int = STRIDE

    def sparse(self) -> Weighted:
        return infllm(self.block_size, self.top_k, self.window, self.dense_len, self.kernel, self.stride)


def softmax_layers(layers: int, share: float = 0.25, scores: Sequence[float] | None = None) -> tuple[int, ...]:
    """Which layers stay softmax: the first, the last, and those of the highest score (evenly spread where there is none)."""
    count = max(2, round(share * layers))
    if scores is None:
        return tuple(sorted({round(x) for x in torch.linspace(0, layers - 1, count).tolist()}))
    inner = sorted(range(1, layers - 1), key=lambda n: (-scores[n], n))[: count - 2]
    return tuple(sorted({0, layers - 1, *inner}))


@register("minicpm-sala", kind="module")
def build_sala(config: SALAConfig | None = None, scores: Sequence[float] | None = None) -> Decoder:
    """A `Decoder` of sparse and lightning layers. Its cache holds a state for each linear layer, keys and values for each sparse one."""
    c = config or SALAConfig()
    kept = softmax_layers(c.layers, c.share, scores)
    mechanisms = [c.sparse() if n in kept else sala_lightning(n, c.layers) for n in range(c.layers)]
    mixers = [Attention(c.dim, c.heads, one, kv_heads=c.kv_heads, rope=True) for one in mechanisms]
    return Decoder(mixers, vocab=c.vocab, dim=c.dim, layers=c.layers)


def importance(losses: Callable[[Decoder], tuple[float, float]], dense: Decoder, config: SALAConfig) -> list[float]:
    """A score a layer: how much a recall loss rises over how much the text loss rises when that layer alone is made linear.

    losses(model) -> (recall loss, text loss).
    """
    recall, text = losses(dense)
    found = []
    for n in range(config.layers):
        kept = [at for at in range(config.layers) if at != n]
        changed = losses(convert(dense, config, kept, plain=True))
        found.append((changed[0] - recall) / max(changed[1] - text, 1e-6))
    return found


def convert(dense: Decoder, config: SALAConfig, kept: Sequence[int] | None = None, plain: bool = False) -> Decoder:
    """A SALA model with a dense decoder's projections, MLPs, norms and embedding. kept: the softmax layers. plain: these stay as they are in
    the dense model."""
    if len(dense.blocks) != config.layers:
        raise RegardError(f"the dense model has {len(dense.blocks)} layers; expected config.layers={config.layers}")
    kept = softmax_layers(config.layers, config.share) if kept is None else tuple(kept)
    mixers: list[nn.Module] = []
    for n, block in enumerate(dense.blocks):
        old = block.mixer
        if not isinstance(old, Attention):
            raise RegardError(f"layer {n} is {type(old).__name__}; expected Attention")
        mechanism = config.sparse() if n in kept else sala_lightning(n, config.layers)
        if n in kept and plain:
            mixers.append(old)
            continue
        new = Attention(old.dim, old.heads, mechanism, kv_heads=old.kv_heads, head_dim=old.value_dim, rope=True)
        for name in ("q", "k", "v", "out"):
            getattr(new, name).load_state_dict(getattr(old, name).state_dict())
        if new.gate is not None:
            for part in new.gate.parameters():  # half open everywhere, made up for by the output weights
                nn.init.zeros_(part)
        mixers.append(new.to(next(dense.parameters()).dtype))
    model = Decoder(mixers, vocab=dense.embed.num_embeddings, dim=config.dim, layers=config.layers)
    others = {name: x for name, x in dense.state_dict().items() if ".mixer." not in name}
    model.load_state_dict({**model.state_dict(), **others})
    return model.to(next(dense.parameters()).dtype)


def align_loss(model: Decoder, dense: Decoder, tokens: Tensor) -> Tensor:
    """Stage 1: mean squared gap of each linear layer's output to the dense layer's on the same input, relative to its size."""
    x, losses = dense.embed(tokens), []
    for new, old in zip(model.blocks, dense.blocks, strict=True):
        with torch.no_grad():
            y = old.norm1(x)  # type: ignore[operator]
            truth = old.mixer(y)  # type: ignore[operator]
        if isinstance(new.mixer, Attention) and isinstance(new.mixer.mechanism, Recurrent):
            losses.append((new.mixer(y) - truth).square().mean() / truth.square().mean())
        with torch.no_grad():
            x = old(x)
    return torch.stack(losses).mean()


def distil_loss(model: Decoder, dense: Decoder, tokens: Tensor) -> Tensor:
    """Stage 2 on: KL of the dense model's next-token distribution to the hybrid's."""
    with torch.no_grad():
        truth = dense(tokens).log_softmax(-1)
    return F.kl_div(model(tokens).log_softmax(-1).flatten(0, 1), truth.flatten(0, 1), log_target=True, reduction="batchmean")


@contextmanager
def reading_all(model: Decoder) -> Iterator[None]:
    """Inside the block the sparse layers read everything, as while training on short sequences."""
    layers = [b.mixer for b in model.blocks if isinstance(b.mixer, Attention) and isinstance(b.mixer.mechanism, Weighted)]
    held = [layer.mechanism for layer in layers]
    for layer in layers:
        assert isinstance(layer.mechanism, Weighted)
        layer.mechanism = replace(layer.mechanism, select=None)
    try:
        yield
    finally:
        for layer, mechanism in zip(layers, held, strict=True):
            layer.mechanism = mechanism


def next_token_loss(model: Decoder, dense: Decoder, tokens: Tensor) -> Tensor:
    """Stage 3: cross-entropy of each next token."""
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def train_stages(
    model: Decoder, dense: Decoder, batches: Callable[[int], Tensor], steps: Sequence[int] = (60, 60), lr: float = 1e-3,
    long: Callable[[int], Tensor] | None = None,
) -> dict[str, list[float]]:  # fmt: skip
    """Linear layers towards the dense ones with the rest held, then everything by distillation, the sparse layers reading all; and, where
    steps has a third number, on `long` batches, next tokens with the sparse layers choosing. batches(step), long(step) -> tokens (B, L)."""
    if len(steps) not in (2, 3) or (len(steps) == 3) != (long is not None):
        raise RegardError(
            f"steps={tuple(steps)}, long={'None' if long is None else 'given'}; expected two numbers, or three and long batches"
        )
    log: dict[str, list[float]] = {}
    linear = [p for b in model.blocks if isinstance(b.mixer.mechanism, Recurrent) for p in b.mixer.parameters()]  # type: ignore[union-attr]
    every = list(model.parameters())
    stages = [("align", linear, align_loss, batches), ("distil", every, distil_loss, batches)]
    stages += [("long", every, next_token_loss, long)] if long is not None else []
    for (name, parameters, loss_of, tokens), count in zip(stages, steps, strict=True):
        optimizer = torch.optim.AdamW(parameters, lr)
        log[name] = []
        for step in range(count):
            optimizer.zero_grad()
            with nullcontext() if name == "long" else reading_all(model):
                loss = loss_of(model, dense, tokens(step))
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            log[name].append(loss.item())
    return log
