"""How much recall a state of a given size buys: multi-query associative recall for causal mechanisms at several widths (Zoology; Based).

python benchmarks/recall.py --minutes 8 --out benchmarks/results/recall.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from regard.lab.compare.train import accuracy, optimise
from regard.lab.files import write_text
from regard.nn import Decoder, GatedConv, mixer
from regard.tasks import recall

MECHANISMS = (
    "softmax",
    "based:feature_dim=8",
    "deltanet",
    "efla",
    "gla",
    "lightning-attention-2",
    "lightnet",
    "gsa:slots=16",
    "nha:window=8,slots=16",
    "log-linear-attention",
    "hedgehog",
    "local-linear-attention:iterations=4",
)
WIDTHS, LENGTH, PAIRS, VOCAB = (16, 32, 64), 64, (4, 8, 16), 64


def model_of(spec: str, dim: int) -> Decoder:
    from regard.lab.compare.config import parsed

    torch.manual_seed(0)
    name, options = parsed(spec)
    # A short convolution brings each value to its key; what is compared is the layer that must remember the pairs.
    layers = [GatedConv(dim), mixer(name, dim, 1, context_len=LENGTH, **options)]
    return Decoder(layers, vocab=VOCAB, dim=dim, layers=2, heads=1, context_len=LENGTH)


def one(spec: str, dim: int, steps: int) -> dict[str, Any]:
    """Train on recall alone; accuracy by number of pairs, and bytes of state of one layer after the sequence."""
    model = model_of(spec, dim)
    generator = torch.Generator().manual_seed(1)

    def loss_of(step: int) -> torch.Tensor:
        tokens, labels = recall(64, LENGTH, PAIRS[step % len(PAIRS)], VOCAB, generator)
        return F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())

    optimise(model, loss_of, steps)
    model.eval()
    fresh = torch.Generator().manual_seed(2)
    with torch.no_grad():
        found = {str(n): accuracy(model, *recall(128, LENGTH, n, VOCAB, fresh)) for n in PAIRS}
        state = model.step(recall(1, LENGTH, 4, VOCAB, fresh)[0])[1][1].bytes
    return {"accuracy": found, "state": state, "steps": steps, "parameters": sum(p.numel() for p in model.parameters())}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/recall.json"))
    asked = parser.parse_args()
    cost = 0.0
    for spec in MECHANISMS:
        for dim in WIDTHS:
            start = time.perf_counter()
            one(spec, dim, 3)
            cost += (time.perf_counter() - start) / 4
    steps = max(50, int(60 * asked.minutes / cost))
    results: dict[str, dict[str, Any]] = {}
    for spec in MECHANISMS:
        for dim in WIDTHS:
            results.setdefault(spec, {})[str(dim)] = one(spec, dim, steps)
        print(spec, {d: round(sum(r["accuracy"].values()) / 3, 2) for d, r in results[spec].items()}, flush=True)
        write_text(asked.out, json.dumps({"length": LENGTH, "vocab": VOCAB, "torch": torch.__version__, "results": results}, indent=1))


if __name__ == "__main__":
    main()
