"""Which learning rates learn most in a short run of the comparison's small models: python benchmarks/recipe.py --out benchmarks/results/recipe.json

Muon's rate for matrices and AdamW's for the rest, at a fixed number of steps: held-out bits per byte, and accuracy of recall and copying.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import torch

from regard.lab.compare import train
from regard.lab.compare.config import Config
from regard.lab.compare.jobs import corpus_of
from regard.lab.files import write_text

MATRIX, OTHER = (0.01, 0.02, 0.03, 0.05), (0.005, 0.01, 0.02)
STEPS = {"language": 150, "recall": 100, "copying": 100}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mechanisms", nargs="*", default=["softmax", "gla", "deltanet"])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/recipe.json"))
    asked = parser.parse_args()
    config, corpus, found = Config(tuple(asked.mechanisms)), corpus_of(None, 0), []
    for matrix, other, spec in itertools.product(MATRIX, OTHER, asked.mechanisms):
        train.MATRIX_RATE, train.OTHER_RATE = matrix, other
        runs = {
            task: [train.train(config, task, spec, seed, steps, corpus) for seed in range(asked.seeds)] for task, steps in STEPS.items()
        }
        bits = sum(run["bits"]["1"] for run in runs["language"]) / asked.seeds
        accuracy = {
            task: {n: sum(run["accuracy"][n] for run in runs[task]) / asked.seeds for n in runs[task][0]["accuracy"]}
            for task in ("recall", "copying")
        }
        found.append({"mechanism": spec, "matrix": matrix, "other": other, "bits": bits, **accuracy})
        print(spec, matrix, other, f"{bits:.3f}", accuracy, flush=True)
        write_text(asked.out, json.dumps({"torch": torch.__version__, "steps": STEPS, "seeds": asked.seeds, "results": found}, indent=1))


if __name__ == "__main__":
    main()
