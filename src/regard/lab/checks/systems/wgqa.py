"""Checks of wgqa."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.decoding import llama
from regard.lab.verification import check
from regard.nn.attention import Attention
from regard.zoo.systems.wgqa import convert_wgqa, fold_wgqa, to_wgqa


def layer_of(bias: bool = True) -> Attention:
    return Attention(16, 4, bias=bias).double()


def by_hand(layer: Attention, x: Tensor, groups: int, w: tuple[Tensor, Tensor], mode: str) -> Tensor:
    """Causal attention of 4 heads over groups of combined heads, in loops; w: combination weights of K and of V."""
    made = []
    for linear, own in zip((layer.k, layer.v), w, strict=True):
        heads = []
        for g in range(groups):
            total = torch.zeros(x.shape[0], x.shape[1], 4, dtype=x.dtype)
            for h in range(g * 4 // groups, (g + 1) * 4 // groups):
                matrix, bias = linear.weight[4 * h : 4 * h + 4], linear.bias[4 * h : 4 * h + 4]
                if mode == "row":
                    total = total + (x * own[h, 0]) @ matrix.T + bias * groups / 4
                else:
                    total = total + (x @ matrix.T + bias) * own[h, 0]
            heads.append(total)
        made.append(torch.stack(heads, 1))
    q = layer.q(x).view(*x.shape[:2], 4, 4).transpose(1, 2)
    o = naive.attention(q, *made, naive.softmax, naive.causal)
    return layer.out(o.transpose(1, 2).flatten(2))


@check(
    "wgqa",
    "scalar, column and row weights, drawn: output and gradients (of the weights too) equal loops over heads",
    below=1e-11,
    control="mean pooling",
)
def _() -> tuple[float, float]:
    own, other = 0.0, []
    for mode, size in (("scalar", 1), ("col", 4), ("row", 16)):
        plain, x = layer_of(), torch.randn(2, 5, 16, dtype=F64, requires_grad=True)
        layer: Any = to_wgqa(copy.deepcopy(plain), 2, mode, "random")
        w = layer.k.mix, layer.v.mix
        assert w[0].shape == (4, 1, size) and not torch.equal(w[0], w[1])
        shell = copy.copy(plain)
        shell._modules = {**plain._modules, "k": layer.k, "v": layer.v, "q": layer.q, "out": layer.out}
        truth = by_hand(shell, x, 2, w, mode)
        own = max(own, gap_with_gradients(layer(x), truth, (x, *layer.parameters())))
        other.append(naive.gap(layer(x), by_hand(plain, x, 2, (torch.full((4, 1, 1), 0.5),) * 2, "scalar")))
    return own, min(other)


@check(
    "wgqa",
    "first weights: mean-pooled GQA for groups of 4 and of 2, multi-head attention for 4 groups",
    below=1e-12,
    control="weights of 1/2",
)
def _() -> tuple[float, float]:
    plain, x = layer_of(), torch.randn(2, 5, 16, dtype=F64)
    own, other = 0.0, 0.0
    for groups in (1, 2, 4):
        for mode in ("scalar", "col", "row"):
            truth = by_hand(plain, x, groups, (torch.full((4, 1, 1), groups / 4),) * 2, "scalar")
            own = max(own, naive.gap(to_wgqa(copy.deepcopy(plain), groups, mode)(x), truth))
        other = max(other, naive.gap(to_wgqa(copy.deepcopy(plain), groups, init=0.5)(x), truth))
    return max(own, naive.gap(to_wgqa(copy.deepcopy(plain), 4)(x), plain(x))), other


@check(
    "wgqa",
    "a Llama and a T5, converted and folded: gap of logits to the model before folding, and parameters beyond a GQA model's",
    below=1e-12,
    control="not folded",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    from transformers import T5Config, T5ForConditionalGeneration

    ids = torch.randint(1, 50, (2, 6))
    model = convert_wgqa(llama(kv_heads=4), 2, init="random")
    fewer = llama(kv_heads=2)
    before, beyond = (
        model(ids, use_cache=False).logits,
        sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in fewer.parameters()),
    )
    fold_wgqa(model)
    own = naive.gap(model(ids, use_cache=False).logits, before)
    own += sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in fewer.parameters())
    cache = model(ids, use_cache=True).past_key_values
    config: Any = model.config
    assert cache.layers[0].keys.shape[1] == 2 and config.num_key_value_heads == 2
    sizes = {"d_model": 16, "d_kv": 4, "num_heads": 4, "d_ff": 16, "num_layers": 1, "num_decoder_layers": 1, "vocab_size": 20}
    t5 = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).double().eval()
    plain = copy.deepcopy(t5)
    for layer in plain.modules():
        if hasattr(layer, "key_value_proj_dim"):
            for linear in (layer.k, layer.v):
                linear.weight.copy_(linear.weight.view(2, 2, 4, 16).mean(1, keepdim=True).expand(-1, 2, -1, -1).reshape(16, 16))
    convert_wgqa(t5, 2)
    given = {"input_ids": ids % 20, "decoder_input_ids": ids[:, :4] % 20}
    own = max(own, naive.gap(t5(**given).logits, plain(**given).logits))
    own = max(own, naive.gap(fold_wgqa(t5)(**given).logits, plain(**given).logits))
    return own, float(beyond)


@check(
    "wgqa",
    "learned weights alone find that a target reads the first head of each group: MSE over that of mean pooling, 400 steps",
    below=1e-6,
    control="one weight for all heads of a group",
)
def _() -> tuple[float, float]:
    plain = layer_of(bias=False)
    first = torch.tensor([1.0, 0, 1, 0]).view(4, 1, 1)
    target: Any = to_wgqa(copy.deepcopy(plain), 2, init=first)
    x = torch.randn(8, 12, 16, dtype=F64)
    truth = target(x).detach()

    def left(tied: bool) -> float:
        layer: Any = to_wgqa(copy.deepcopy(plain), 2)
        weights = [layer.k.mix, layer.v.mix]
        start = float((layer(x) - truth).square().mean())
        optimizer = torch.optim.Adam(weights, 5e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
        for _ in range(400):
            loss = (layer(x) - truth).square().mean()
            optimizer.zero_grad()
            loss.backward(inputs=weights)
            optimizer.step()
            schedule.step()
            for w in weights if tied else ():
                w.data = w.data.view(2, 2).mean(1, keepdim=True).expand(-1, 2).reshape(4, 1, 1)
        assert tied or max(float((w.detach() - first).abs().max()) for w in weights) < 0.01
        return float((layer(x) - truth).square().mean()) / start

    return left(False), left(True)
