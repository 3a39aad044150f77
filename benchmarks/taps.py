"""What taps cost on a real model: python benchmarks/taps.py --out benchmarks/results/taps.json

Seconds of one processor, the least of several runs that take turns with the untapped forward, so that what else runs on the machine falls on both; and
the growth of the process's peak memory while the tapped forward runs. "kept by hooks" keeps the same tensors by four plain hooks a layer: what keeping
them costs anyone, for the memory they stand in has to be found. --peer FOLDER: against TransformerLens (pip install --no-deps --target FOLDER
transformer_lens and what it needs), whose bridge runs the same weights, for the same tensors. With THP_MEM_ALLOC_ENABLE=1 PyTorch asks for large pages:
what is kept is then found in fewer faults.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from regard import models, taps
from regard.lab.files import write_text
from regard.nn.images.timm_host import operators
from regard.taps import ColumnMass


def peak() -> int:
    """Bytes of the process's peak since the last call (Linux)."""
    status = Path("/proc/self/status").read_text()
    found = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024
    Path("/proc/self/clear_refs").write_text("5")
    return found


def seconds(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


@torch.no_grad()
def ratio(model: torch.nn.Module, ids: torch.Tensor, points: Any, layers: list[int] | None, repeats: int) -> dict[str, float]:
    def plain() -> None:
        model(ids, use_cache=False, logits_to_keep=1)

    def tapped() -> None:
        with taps.read(model, points, layers=layers):
            plain()

    plain()
    peak()
    plain()
    without = peak()
    tapped()
    more = peak() - without
    pairs = [(seconds(plain), seconds(tapped)) for _ in range(repeats)]
    own, other = (min(x) for x in zip(*pairs, strict=True))
    return {"plain_s": own, "tapped_s": other, "ratio": other / own, "more_mb": more / 2**20}


@torch.no_grad()
def by_hooks(model: torch.nn.Module, ids: torch.Tensor, repeats: int) -> dict[str, float]:
    """q, k, v and heads of a Llama's layers, kept by hooks on its projections."""

    def plain() -> None:
        model(ids, use_cache=False, logits_to_keep=1)

    def kept() -> None:
        found: list[torch.Tensor] = []
        hooks = []
        for layer in model.model.layers:  # type: ignore[union-attr]
            attention = layer.self_attn
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
                hooks.append(projection.register_forward_hook(lambda module, given, out: found.append(out)))
            hooks.append(attention.o_proj.register_forward_pre_hook(lambda module, given: found.append(given[0])))
        plain()
        for hook in hooks:
            hook.remove()

    plain()
    kept()
    pairs = [(seconds(plain), seconds(kept)) for _ in range(repeats)]
    own, other = (min(x) for x in zip(*pairs, strict=True))
    return {"plain_s": own, "kept_s": other, "ratio": other / own}


@torch.no_grad()
def against_peer(model: Any, folder: str, tokens: int, repeats: int) -> dict[str, Any]:
    """Seconds and growth of peak memory, TransformerLens's over these."""
    operators()
    sys.path.append(folder)
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(model.config._name_or_path, hf_model=copy.deepcopy(model))
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    last = model.config.num_hidden_layers - 1
    some, every = [last // 3, 2 * last // 3], list(range(last + 1))
    out: dict[str, Any] = {"transformer_lens": version("transformer_lens"), "tokens": tokens}
    cases = {
        "weights of 2 layers": (["weights"], ["attn.hook_pattern"], some),
        "weights of all layers": (["weights"], ["attn.hook_pattern"], every),
        "q, k, v, heads of all layers": (
            ["q", "k", "v", "heads"],
            ["attn.hook_rot_q", "attn.hook_rot_k", "attn.hook_v", "attn.hook_z"],
            every,
        ),
    }
    for name, (points, hooks, layers) in cases.items():
        names = {f"blocks.{layer}.{hook}" for layer in layers for hook in hooks}

        def ours() -> Any:
            with taps.read(model, points, layers=layers) as seen:
                model(ids, use_cache=False)
            return seen

        def theirs() -> Any:
            return bridge.run_with_cache(ids, return_type="logits", names_filter=lambda key: key in names)[1]

        mine, other = ours()[points[0], layers[0]], theirs()[f"blocks.{layers[0]}.{hooks[0]}"]
        gap = float((mine - (other if other.shape == mine.shape else other.transpose(1, 2))).abs().max())
        del mine, other
        grown = []
        for run in (ours, theirs):
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # what the other has freed is no room for this one
            now = current()
            peak()
            kept = run()
            grown.append(peak() - now)
            del kept
        pairs = [(seconds(ours), seconds(theirs)) for _ in range(repeats)]
        own, other = (min(x) for x in zip(*pairs, strict=True))
        out[name] = {"s": own, "peer_s": other, "times": other / own, "mb": grown[0] / 2**20, "peer_mb": grown[1] / 2**20, "gap": gap}
        out[name]["times_memory"] = grown[1] / grown[0]
        print(name, {key: round(x, 6) for key, x in out[name].items()}, flush=True)
    return out


def current() -> int:
    """Bytes of the process now."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) * 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--long", type=int, default=8192, help="tokens of the column masses; 0 leaves them out")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--peer", help="a folder with transformer_lens: measured too")
    parser.add_argument("--peer-tokens", type=int, default=512)
    parser.add_argument("--only", choices=("own", "peer"), help="one half alone; the other is the file's at --out")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/taps.json"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    model = models.load(asked.model)
    draw = torch.Generator().manual_seed(0)
    short, long = (torch.randint(model.config.vocab_size, (1, n), generator=draw) for n in (asked.tokens, asked.long))
    pages = ", large pages" if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1" else ""
    last = model.config.num_hidden_layers - 1
    cases: dict[str, tuple[torch.Tensor, Any, list[int] | None, int]] = {
        f"weights of 2 layers, {asked.tokens} tokens": (short, "weights", [last // 3, 2 * last // 3], asked.repeats),
        f"q, k, v, heads of all layers, {asked.tokens} tokens": (short, ["q", "k", "v", "heads"], None, asked.repeats),
        f"column masses of all heads, {asked.long} tokens": (long, ColumnMass(), None, max(2, asked.repeats // 3)),
    }
    if not asked.long:
        cases.popitem()
    found = json.loads(asked.out.read_text())["results"] if asked.only and asked.out.is_file() else {}

    def put(name: str, one: dict[str, Any]) -> None:
        found[name] = {**one, "instructions": torch.backends.cpu.get_cpu_capability()}
        write_text(asked.out, json.dumps({"torch": torch.__version__, "model": asked.model, "threads": 1, "results": found}, indent=1))

    for name, (ids, points, layers, repeats) in cases.items() if asked.only != "peer" else ():
        put(name + pages, ratio(model, ids, points, layers, repeats))
        print(name + pages, found[name + pages], flush=True)
    if asked.only != "peer":
        name = f"q, k, v, heads kept by hooks, {asked.tokens} tokens{pages}"
        put(name, by_hooks(model, short, asked.repeats))
        print(name, found[name], flush=True)
    if asked.peer and asked.only != "own":
        put("against TransformerLens", against_peer(model, asked.peer, asked.peer_tokens, asked.repeats))


if __name__ == "__main__":
    main()
