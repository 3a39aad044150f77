"""Linear attention for images on real ones: scikit-learn's 8 x 8 digits, a small pyramid a mechanism, the same budget for all.

pip install scikit-learn;  python benchmarks/digits.py --steps 150 --out benchmarks/results/digits.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.lab.files import write_text
from regard.nn import GridNet, ViG

NETS = {
    "softmax": lambda: GridNet(1, 8, 10, (("softmax",), ("softmax",)), (24, 48)),
    "mala": lambda: GridNet(1, 8, 10, (("mala",), ("mala",)), (24, 48), (2, 4)),
    "nalaformer": lambda: GridNet(1, 8, 10, (("nalaformer",), ("nalaformer",)), (24, 48), (2, 4)),
    "rala": lambda: GridNet(1, 8, 10, (("rala",), ("rala",)), (24, 48), (2, 4)),
    "inline-attention": lambda: GridNet(1, 8, 10, (("inline-attention",), ("inline-attention",)), (24, 48)),
    "flatten": lambda: GridNet(1, 8, 10, (("flatten",), ("flatten",)), (24, 48)),
    "slab": lambda: GridNet(1, 8, 10, (("slab",), ("slab",)), (24, 48)),
    "l2vit": lambda: GridNet(1, 8, 10, (("window", "l2vit"), ("window", "l2vit")), (24, 48), concentration=True),
    "vig": lambda: ViG(1, 10, dim=48, heads=2, layers=2, patch=1),
    "no blocks": lambda: GridNet(1, 8, 10, ((), ()), (24, 48)),
}


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(images, labels) to train on and (images, labels) to test on."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.as_tensor(found.images, dtype=torch.float32)[:, None] / 16
    labels = torch.as_tensor(found.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1400], order[1400:]
    return images[train], labels[train], images[test], labels[test]


def one(net: nn.Module, steps: int, data: tuple[Tensor, Tensor, Tensor, Tensor]) -> dict[str, Any]:
    images, labels, test, truth = data
    optimiser = torch.optim.AdamW(net.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, steps)
    generator, start = torch.Generator().manual_seed(1), time.perf_counter()
    for _ in range(steps):
        pick = torch.randint(len(images), (64,), generator=generator)
        loss = F.cross_entropy(net(images[pick]), labels[pick])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    seconds = time.perf_counter() - start
    net.eval()
    with torch.no_grad():
        accuracy = float((net(test).argmax(-1) == truth).float().mean())
    return {"accuracy": accuracy, "parameters": sum(p.numel() for p in net.parameters()), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/digits.json"))
    asked, data, results = parser.parse_args(), digits(), {}
    for name, make in NETS.items():
        torch.manual_seed(0)
        results[name] = one(make(), asked.steps, data)
        print(name, results[name], flush=True)
        write_text(asked.out, json.dumps({"steps": asked.steps, "torch": torch.__version__, "results": results}, indent=1))


if __name__ == "__main__":
    main()
