"""What serving costs on one processor: python benchmarks/serving.py --out benchmarks/results/serving.json

Seconds of one processor, the least of several runs that take turns, as ratios in one run:
overhead   a decoding step under policies whose budget is never reached, over the plain model's
long       a step at 8k tokens of context: DuoAttention and Recycled Attention over the full cache (a filled cache of random keys: what is timed depends on sizes alone),
           and what they could reach at best: a step with 1,024 tokens in the cache, and with 16
tree       one pass over a tree of drafted nodes at 2k tokens, over a step of one token; and the model's linear products alone, of as many rows, over one row
ragged     LeanAttention's schedule over sequences of different lengths, beside scaled_dot_product_attention over the padded batch
recycling  greedy decoding of code: Token Recycling and prompt lookup over plain decoding, the whole loop
greedy     prompts on which each strategy says what plain decoding says, token for token
Parts that the JSON holds already are not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from regard import models
from regard.cache import H2O, TOVA, Full, KeyNorm, SnapKV, StreamingLLM
from regard.cache.policy import Policy
from regard.generate import Host, chain, generate
from regard.generate.tree import Draft, Shape
from regard.lab.files import write_text
from regard.lab.greedy import agreements, real_prompts
from regard.lab.sweep import model_and_reader
from regard.tasks.text import python_text
from regard.zoo.systems.duoattention import DuoAttention
from regard.zoo.systems.leanattention import lean_decode
from regard.zoo.systems.recycled_attention import RecycledAttention
from regard.zoo.systems.token_recycling import DEFAULT_80, TokenRecycling

BIG = 10**6


def seconds(run: Callable[[], Any]) -> float:
    begin = time.process_time()
    run()
    return time.process_time() - begin


def least(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Seconds of each, the least of several, in turns."""
    found = {name: float("inf") for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            found[name] = min(found[name], seconds(run))
    return found


def filled(model: Any, policy: Policy | None, length: int) -> tuple[Any, Any]:
    """A context to be open while the model runs, and a cache of `length` random tokens as the policy would have left it."""
    from transformers import DynamicCache

    config, draw = model.config, torch.Generator().manual_seed(0)
    shape = 1, config.num_key_value_heads, length, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if policy is None:
        cache, context = DynamicCache(), contextlib.nullcontext()
        for layer in range(config.num_hidden_layers):
            cache.update(torch.randn(shape, generator=draw), torch.randn(shape, generator=draw), layer)
        return context, cache
    session = policy(model)
    from regard.cache.session import fresh_cache

    session.cache = fresh_cache(config.num_hidden_layers)
    query = torch.randn(*shape[:2], config.num_attention_heads // shape[1], 1, shape[3], generator=draw)
    for at, layer in enumerate(session.cache.layers):
        layer.update(torch.randn(shape, generator=draw), torch.randn(shape, generator=draw))
        layer.take(None)
        session.forget(layer, session.views(layer, query, at, True, shape[3] ** -0.5, None))
    return session, session.cache


@torch.no_grad()
def decoding(
    model: Any, policies: dict[str, Policy | None], length: int, steps: int, repeats: int, lengths: dict[str, int] | None = None
) -> dict[str, float]:
    """Milliseconds of a step behind `length` tokens, or those of `lengths`."""
    places = dict.fromkeys(policies, length) | (lengths or {})
    made = {name: filled(model, policy, places[name]) for name, policy in policies.items()}
    token = torch.tensor([[5]])

    def run(name: str, count: int = steps) -> None:
        context, cache = made[name]
        with context:
            for _ in range(count):
                model(input_ids=token, position_ids=torch.tensor([[places[name]]]), past_key_values=cache, use_cache=True)
                places[name] += 1

    for name in made:
        run(name, 2)
    return {name: x / steps * 1e3 for name, x in least({name: lambda name=name: run(name) for name in made}, repeats).items()}


def overhead(model: Any, asked: argparse.Namespace) -> dict[str, Any]:
    policies: dict[str, Policy | None] = {"plain": None, "Full": Full(), "StreamingLLM": StreamingLLM(BIG), "H2O": H2O(BIG)}
    policies |= {"SnapKV": SnapKV(BIG), "TOVA": TOVA(BIG), "KeyNorm, at steps too": steps_too(KeyNorm(BIG))}
    found = decoding(model, policies, asked.context, asked.steps, asked.repeats)
    return {"context": asked.context, "ms": found, "over plain": {name: x / found["plain"] for name, x in found.items()}}


def steps_too(policy: Policy) -> Policy:
    policy.decode = True
    return policy


def long(model: Any, asked: argparse.Namespace) -> dict[str, Any]:
    gates = torch.rand(model.config.num_hidden_layers, model.config.num_key_value_heads, generator=torch.Generator().manual_seed(0))
    policies: dict[str, Policy | None] = {"plain": None, "Full": Full()}
    policies |= {f"DuoAttention, {s:.0%} of heads stream": DuoAttention(gates, s) for s in (0.5, 0.75)}
    policies |= {f"Recycled, stride {s}, k {k}": RecycledAttention(s, k) for s, k in ((10, 1024), (50, 1024))}
    short = {"at best: 1024 tokens in the cache": 1024, "at best: 16 tokens in the cache": 16}
    found = decoding(model, policies | dict.fromkeys(short), asked.long, 10, asked.repeats, short)
    return {"context": asked.long, "ms": found, "faster than plain": {name: found["plain"] / x for name, x in found.items()}}


@torch.no_grad()
def tree(model: Any, asked: argparse.Namespace) -> dict[str, Any]:
    host = Host(model)
    _, host.cache = filled(model, None, asked.tree)
    host.length, host.valid = torch.tensor([asked.tree]), torch.ones(1, asked.tree, dtype=torch.bool)
    host.places = torch.arange(asked.tree)[None]
    root, drafts = torch.tensor([[5]]), {"1": chain(torch.tensor([[5]]))}
    for n in (4, 8, 16, 64):
        shape = Shape.of(DEFAULT_80.paths[: n - 1])
        drafts[str(n)] = Draft(root.repeat(1, n), shape.parents[None])

    def run(draft: Draft) -> None:
        host.verify(draft)
        host.cache.crop(-draft.tokens.shape[1])

    for draft in drafts.values():
        run(draft)
    found = least({name: lambda draft=draft: run(draft) for name, draft in drafts.items()}, asked.repeats)
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    rows = {n: [torch.randn(int(n), layer.in_features) for layer in layers] for n in drafts}
    products = least({n: lambda xs=xs: [layer(x) for layer, x in zip(layers, xs, strict=True)] for n, xs in rows.items()}, asked.repeats)
    return {
        "context": asked.tree,
        "ms": {n: x * 1e3 for n, x in found.items()},
        "over one node": {n: x / found["1"] for n, x in found.items()},
        "products ms": {n: x * 1e3 for n, x in products.items()},
        "products over one row": {n: x / products["1"] for n, x in products.items()},
    }


@torch.no_grad()
def ragged(model: Any, asked: argparse.Namespace) -> dict[str, Any]:
    """A step's attention of one layer of two sizes, over sequences that fill a quarter of the padded batch."""
    found = {}
    for batch, heads, kv, dim, most in ((8, 9, 3, 64, 8192), (16, 32, 8, 128, 4096)):
        lengths = [max(64, most >> at % 8) for at in range(batch)]
        q, k, v = (torch.randn(batch, h, n, dim) for h, n in ((heads, 1), (kv, most), (kv, most)))
        mask = (torch.arange(most) < torch.tensor(lengths)[:, None])[:, None, None]
        runs: dict[str, Callable[[], Any]] = {
            "padded, enable_gqa": lambda q=q, k=k, v=v, mask=mask: F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True),
            "leanattention": lambda q=q, k=k, v=v, lengths=lengths: lean_decode(q, k, v, lengths),
        }
        grouped = q.unflatten(1, (kv, -1))[:, :, :, 0]  # a key head's queries as its rows
        runs["padded, keys read once"] = lambda q=grouped, k=k, v=v, mask=mask: F.scaled_dot_product_attention(q, k, v, mask)
        assert torch.allclose(runs["padded, enable_gqa"](), runs["leanattention"]()[0], atol=1e-4)
        times = least(runs, 3 * asked.repeats)
        own = times["leanattention"]
        found[f"{batch} sequences up to {most}, {heads}/{kv} heads of {dim}"] = {
            "ms": {name: x * 1e3 for name, x in times.items()},
            "faster than": {name: x / own for name, x in times.items() if name != "leanattention"},
        }
    return found


@torch.no_grad()
def recycling(model: Any, asked: argparse.Namespace) -> dict[str, Any]:
    _, reader = model_and_reader(asked.model) if asked.model != "tiny" else (None, None)
    code = (
        Path(json.__file__).read_text(encoding="utf-8"),
        Path(argparse.__file__).read_text(encoding="utf-8"),
        Path(contextlib.__file__).read_text(),
    )
    ids = [torch.tensor([reader.tokens(text[3000:9000].encode())[:192]]) if reader else models.encode(text[3000:3400]) for text in code]
    small = Shape.of([path for path in DEFAULT_80.paths if sum(path) <= 1 and len(path) <= 4][: asked.nodes])
    made = {"plain": "plain", "prompt-lookup": "prompt-lookup", "token-recycling, 80 nodes": TokenRecycling()}
    made |= {f"token-recycling, {len(small.paths)} nodes": TokenRecycling(tree=small)}
    times: dict[str, float] = dict.fromkeys(made, 0.0)
    passes: dict[str, list[float]] = {name: [] for name in made}
    for prompt in ids:
        for name, how in made.items():
            out: list[Any] = []
            times[name] += seconds(
                lambda how=how, prompt=prompt: out.append(generate(model, prompt, how, max_new_tokens=asked.tokens, ends=()))
            )
            passes[name].append(out[0].tokens_per_step)
    return {
        "tokens": asked.tokens,
        "seconds": times,
        "faster than plain": {name: times["plain"] / x for name, x in times.items()},
        "tokens a pass": {name: sum(x) / len(x) for name, x in passes.items()},
    }


def greedy(model: Any, asked: argparse.Namespace) -> dict[str, Any]:
    _, reader = model_and_reader(asked.model)
    found: dict[str, Any] = {}
    for name, one in agreements(model, real_prompts(reader, python_text(), asked.prompts, 96), asked.said):
        found[name] = {"equal": one.equal, "prompts": one.prompts, "gaps": one.gaps, "tokens a pass": one.per_pass}
        print(name, found[name], flush=True)
    return {"tokens": asked.said, "strategies": found}


PARTS: dict[str, Callable[[Any, argparse.Namespace], dict[str, Any]]] = {
    "overhead": overhead,
    "long": long,
    "tree": tree,
    "ragged": ragged,
    "recycling": recycling,
    "greedy": greedy,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=models.names("text"), default="smollm2-135m")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--context", type=int, default=512, help="tokens in the cache for the overhead")
    parser.add_argument("--long", type=int, default=8000)
    parser.add_argument("--tree", type=int, default=2048)
    parser.add_argument("--nodes", type=int, default=8, help="of Token Recycling's small tree")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=96, help="that code is continued by")
    parser.add_argument("--prompts", type=int, default=20, help="of the greedy part")
    parser.add_argument("--said", type=int, default=200, help="tokens behind each of them")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/serving.json"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    model = models.load(asked.model)
    found = json.loads(asked.out.read_text(encoding="utf-8")) if asked.out.exists() else {}
    own = found.setdefault(asked.model, {"torch": torch.__version__, "processor": torch.backends.cpu.get_cpu_capability(), "threads": 1})
    for part in asked.parts:
        if part not in own:
            own[part] = {**PARTS[part](model, asked), "load": os.getloadavg()[0]}
            print(part, json.dumps(own[part], indent=1), flush=True)
            write_text(asked.out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
