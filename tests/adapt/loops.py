"""Attention of a transformers model written as loops in float64, from the papers' formulas, for prompts of one row without padding."""

import math

import torch
import transformers

import regard
from regard.algebra import Causal, FeatureMap, Input, Recurrent, RowWise, Sinks, Weighted, Window, elu_plus_one

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
FORMULA = {}  # name -> (description, loop over one head: q (D,), k (i + 1, D), i, scale -> weights (i + 1,))


def formula(name, description):
    def keep(function):
        FORMULA[name] = description, function
        return function

    return keep


def softmaxed(s):
    e = [math.exp(x - max(s)) for x in s]
    return [x / sum(e) for x in e]


@formula("softmax", Weighted())
def softmax(q, k, i, scale):
    return softmaxed([scale * float(q @ x) for x in k])


@formula("relu by count", regard.get("relu"))
def relu(q, k, i, scale):
    return [max(0.0, scale * float(q @ x)) / (i + 1) for x in k]


@formula("ssmax", regard.get("ssmax"))
def ssmax(q, k, i, scale):
    return softmaxed([0.43 * math.log(i + 1) * scale * float(q @ x) for x in k])


@formula("window and sinks", Weighted(mask=Causal() & (Window(3) | Sinks(2))))
def window_and_sinks(q, k, i, scale):
    seen = [j for j in range(i + 1) if i - j < 3 or j < 2]
    p = softmaxed([scale * float(q @ k[j]) for j in seen])
    return [p[seen.index(j)] if j in seen else 0.0 for j in range(i + 1)]


@formula("window", Weighted(mask=Causal() & Window(3)))
def window(q, k, i, scale):
    p = softmaxed([scale * float(q @ k[j]) for j in range(max(0, i - 2), i + 1)])
    return [0.0] * (i + 1 - len(p)) + p


@formula("alibi", Weighted(position=regard.Alibi((Input("slopes", "h", default=0.25),))))
def alibi(q, k, i, scale):
    return softmaxed([scale * float(q @ k[j]) - 0.25 * (i - j) for j in range(i + 1)])


@formula("phase", regard.get("tapa"))
def phase(q, k, i, scale):
    half = q.numel() // 2
    turn = [2 * math.pi * abs(i - j) ** 0.1 * float(q[half:] @ k[j, half:]) / half**0.5 for j in range(i + 1)]
    return softmaxed([float(q[:half] @ k[j, :half]) / half**0.5 * math.cos(turn[j]) for j in range(i + 1)])


def late(s, seen, i, j):
    return torch.where(seen, torch.sigmoid(s) * (1 + j) / (1 + i), 0.0)


@formula("function of places", Weighted(normalizer=RowWise(late)))
def of_places(q, k, i, scale):
    return [(1 + j) / (1 + i) / (1 + math.exp(-scale * float(q @ k[j]))) for j in range(i + 1)]


@formula("blocks", regard.get("moba", block_size=3, top_k=2))
def blocks(q, k, i, scale):
    own = i // 3
    fit = [scale * float(q @ k[3 * c : 3 * c + 3].mean(0)) for c in range(own)]
    best = sorted(range(own), key=lambda c: -fit[c])[:1]
    seen = [j for j in range(i + 1) if j // 3 in (own, *best)]
    p = softmaxed([scale * float(q @ k[j]) for j in seen])
    return [p[seen.index(j)] if j in seen else 0.0 for j in range(i + 1)]


def phi(x):
    return torch.where(x > 0, x + 1, torch.exp(x))


@formula("running state", Recurrent(feature=FeatureMap(elu_plus_one), readout="sum", scaled=False, causal=True))
def running_state(q, k, i, scale):
    a = [float(phi(q) @ phi(x)) for x in k]
    return [x / sum(a) for x in a]


def decay(sizes):
    return -0.3 * torch.ones(sizes.heads)


@formula("fading state", Recurrent(decay="head", inputs=(Input("log_decay", "h", default=decay),), scaled=False))
def fading_state(q, k, i, scale):
    return [math.exp(-0.3 * (i - j)) * float(q @ k[j]) for j in range(i + 1)]


def attention(name):
    """What transformers calls: one row, a causal prompt, in loops."""
    weights_of = FORMULA[name][1]

    def forward(module, query, key, value, attention_mask, scaling=None, **rest):
        assert query.shape[0] == 1 and query.shape[2] == key.shape[2]
        q, k, v = query[0].double(), key[0].double(), value[0].double()
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        out = torch.zeros(q.shape[1], q.shape[0], v.shape[-1], dtype=torch.float64)
        for h in range(q.shape[0]):
            g = h // (q.shape[0] // k.shape[0])
            for i in range(q.shape[1]):
                p = torch.tensor(weights_of(q[h, i], k[g, : i + 1], i, scale), dtype=torch.float64)
                out[i, h] = p @ v[g, : i + 1]
        return out[None].to(query.dtype), None

    return forward


def register():
    for name in FORMULA:
        transformers.AttentionInterface.register(f"loops {name}", attention(name))
        transformers.AttentionMaskInterface.register(f"loops {name}", transformers.masking_utils.sdpa_mask)


def llama(how="sdpa", kind="llama", **more):
    """A small model of random weights, steep enough for its attention to matter."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SMALL, "vocab_size": 97, "head_dim": 8, "max_position_embeddings": 64, **more})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=how).eval()
    for name, p in model.named_parameters():
        if p.dim() > 1 and "embed" not in name:
            p.data.mul_(3)
    return model


_logits = {}  # of models made by `llama`, which are the same at every call


@torch.no_grad()
def alone(model, name, ids):
    """Logits (L, V) of one row without padding, attention in loops."""
    key = name, model.config.model_type, tuple(ids.tolist())
    if key not in _logits:
        own = model.config._attn_implementation
        model.set_attn_implementation(f"loops {name}")
        _logits[key] = model(ids[None], use_cache=False).logits[0]
        model.set_attn_implementation(own)
    return _logits[key].clone()
