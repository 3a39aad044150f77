"""regard's policies beside kvpress's presses: python benchmarks/cache.py --kvpress FOLDER --model smollm2-135m --out benchmarks/results/cache.json

One run, one model, the same budgets and prompts, sides in turns; entries are dropped after the prompt alone, as kvpress does. Bits per byte of the text behind a prompt,
read a token a call; facts whose question ends the prompt; seconds of one processor for a prompt and for a step. FOLDER: where kvpress 0.5 is installed with a transformers
that it takes (pip install --target FOLDER kvpress "transformers<5.3"), for both sides. An interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kvpress", type=Path, required=True)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--length", type=int, default=512, help="tokens a prompt")
    parser.add_argument("--steps", type=int, default=48, help="tokens read behind each text")
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--facts", type=int, default=2, help="at each of five depths")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cache.json"))
    return parser.parse_args()


WINDOW = 32
PYRAMID = 8, 10  # window and beta: with larger ones kvpress's pyramid is SnapKV on prompts as short as these


def sides(budget: float) -> dict[str, tuple[Callable[[], Any], Callable[[], Any], str]]:
    """By name: regard's policy, kvpress's press, and the attention that the press asks for."""
    import kvpress as kv

    from regard.cache import H2O, TOVA, Ada, KeyNorm, Pyramid, Random, SnapKV, StreamingLLM

    ratio = 1 - budget

    def snap() -> Any:
        return SnapKV(budget, WINDOW)

    def snap_press() -> Any:
        return kv.SnapKVPress(ratio, window_size=WINDOW)

    return {
        "StreamingLLM": (lambda: StreamingLLM(budget, decode=False), lambda: kv.StreamingLLMPress(ratio), "sdpa"),
        "SnapKV": (snap, snap_press, "sdpa"),
        "TOVA": (lambda: TOVA(budget, decode=False), lambda: kv.TOVAPress(ratio), "sdpa"),
        "KeyNorm": (lambda: KeyNorm(budget), lambda: kv.KnormPress(ratio), "sdpa"),
        "PyramidKV": (
            lambda: Pyramid(SnapKV(budget, PYRAMID[0]), PYRAMID[1]),
            lambda: kv.PyramidKVPress(ratio, window_size=PYRAMID[0], beta=PYRAMID[1]),
            "sdpa",
        ),
        "AdaKV": (lambda: Ada(snap()), lambda: kv.AdaKVPress(snap_press()), "sdpa"),
        "H2O": (lambda: H2O(budget, decode=False), lambda: kv.ObservedAttentionPress(ratio), "eager"),
        "random": (lambda: Random(budget, generator=torch.Generator().manual_seed(0)), lambda: kv.RandomPress(ratio, seed=0), "sdpa"),
    }


def seconds(run: Callable[[], Any]) -> tuple[Any, float]:
    begin = time.process_time()
    found = run()
    return found, time.process_time() - begin


@torch.no_grad()
def read(
    model: Any, context: AbstractContextManager[Any], held: bool, ids: torch.Tensor, behind: torch.Tensor
) -> tuple[torch.Tensor, float, float, int]:
    """Logits (n, V) before each token behind the prompt, seconds of the prompt and of a step, and bytes after the prompt. held: the context
    stays open while the tokens are read."""
    from transformers import DynamicCache

    cache, n = DynamicCache(), ids.shape[1]
    logits = []

    def steps() -> None:
        for at in range(behind.shape[1]):
            places = torch.tensor([[n + at]])
            out = model(input_ids=behind[:, at : at + 1], past_key_values=cache, position_ids=places, use_cache=True)
            logits.append(out.logits[0, -1].float())

    with context:
        first, prompt = seconds(lambda: model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1].float())
        size = sum(layer.bytes if hasattr(layer, "parts") else layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        if held:
            _, step = seconds(steps)
    if not held:
        _, step = seconds(steps)
    return torch.stack([first, *logits[:-1]]), prompt, step / behind.shape[1], size


def main() -> None:
    asked = arguments()
    sys.path.insert(0, str(asked.kvpress))
    from regard.nn.images.timm_host import operators

    operators()
    import transformers

    from regard.lab.files import write_text
    from regard.lab.sweep import CacheConfig, model_and_reader
    from regard.lab.sweep.cache import texts
    from regard.tasks.text import python_text

    torch.set_num_threads(1)
    model, reader = model_and_reader(asked.model)
    found: dict[str, Any] = json.loads(asked.out.read_text(encoding="utf-8")) if asked.out.exists() else {}
    own = found.setdefault(asked.model, {"results": {}})
    own["settings"] = {key: str(x) if isinstance(x, Path) else x for key, x in vars(asked).items() if key not in ("kvpress", "out")}
    own["settings"] |= {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": torch.backends.cpu.get_cpu_capability(),
    }
    config = CacheConfig(asked.length, asked.texts, asked.steps, max(1, asked.facts))
    ready = texts(model, reader, python_text(), config)
    prompts = [(ready.long.ids[at : at + 1], ready.long.tokens[at : at + 1]) for at in range(asked.texts)]
    sizes = ready.size
    asking = []
    for row, (_, later, where) in enumerate(ready.answers):
        if not later and asked.facts:
            asking.append((ready.short.ids[row : row + 1, ready.short.mask[row] > 0], ready.short.tokens[row : row + 1, where]))

    def measure(make: Callable[[], Any] | None, held: bool, which: tuple[torch.Tensor, torch.Tensor]) -> dict[str, float]:
        logits, prompt, step, size = read(model, nullcontext() if make is None else make()(model), held, *which)
        log_p, token = logits.log_softmax(-1), which[1][0]
        nats = -float(log_p[torch.arange(len(token)), token].sum())
        return {"nats": nats, "right": float((log_p.argmax(-1) == token).all()), "prompt": prompt, "step": step, "bytes": size}

    def summary(texts_: list[dict[str, float]], facts: list[dict[str, float]]) -> dict[str, float]:
        every = texts_ + facts
        return {
            "bits": sum(one["nats"] for one in texts_) / math.log(2) / sizes,
            "facts": sum(one["right"] for one in facts) / max(1, len(facts)),
            "prompt": statistics.median(one["prompt"] for one in every),
            "step": statistics.median(one["step"] for one in texts_),
            "bytes": statistics.mean(one["bytes"] for one in texts_),
        }

    for budget in asked.budgets:
        for name, (policy, press, attention) in sides(budget).items():
            key = f"{name} {budget:g}"
            if key in own["results"]:
                continue
            tables: dict[str, tuple[list[dict[str, float]], list[dict[str, float]]]] = {
                side: ([], []) for side in ("plain", "regard", "kvpress")
            }
            for kind, group in enumerate((prompts, asking)):
                for which in group:
                    tables["plain"][kind].append(measure(None, False, which))
                    tables["regard"][kind].append(measure(policy, True, which))
                    model.set_attn_implementation(attention)
                    tables["kvpress"][kind].append(measure(press, False, which))
                    model.set_attn_implementation("sdpa")
            own["results"][key] = {side: summary(*rows) for side, rows in tables.items()}
            a, b = own["results"][key]["regard"], own["results"][key]["kvpress"]
            print(
                f"{key:18} bits {a['bits']:.3f} / {b['bits']:.3f}  facts {a['facts']:.2f} / {b['facts']:.2f}  time regard / kvpress: prompt "
                f"{a['prompt'] / b['prompt']:.2f}, step {a['step'] / b['step']:.2f}; bytes {a['bytes'] / b['bytes']:.2f}",
                flush=True,
            )
            write_text(asked.out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
