"""What a layer costs in networks people use: ResNet-18 and ViT-tiny at 224 x 224, plain and with the layer put in by `regard.adapt.replace`; and
mixers of tokens against dense attention on maps of 56 x 56 tokens.

pip install 'regard[vision]';  python benchmarks/vision.py --out benchmarks/results/vision.json

Every time is a median of runs taken in turns with the plain network's, and is told as its ratio to that; random weights, evaluation, no gradients.
Gates stand behind the second BatchNorm of every block of the ResNet (as CBAM's authors have them), mixers in place of every attention of the ViT.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regard.adapt.replace import after, replace
from regard.lab.compare.slots import Fitted, fitted, made
from regard.lab.files import write_text
from regard.nn import timm_host

GATES = ("cbam", "ela", "ulsam", "polarized-attention", "little-attention-block", "van-lka")
MIXERS = ("ninformer:tokens=197", "activator", "litv2-hilo", "mossformer:group=64,qk_dim=64")
GRID_MIXERS = ("litv2-hilo", "contmix", "mambaout")
ALLOWED = 1.08


def gate(name: str) -> Callable[[int], nn.Module]:
    return lambda width: fitted(name, width, 7).eval()


class Mixed(nn.Module):
    """A mixer of tokens (B, N, C) in place of a ViT's attention; what a map needs is a square, so the class token stands aside."""

    def __init__(self, layer: nn.Module, tokens: bool):
        super().__init__()
        self.layer, self.tokens = layer, tokens

    def forward(self, x: Tensor, *given: Any, **options: Any) -> Tensor:
        return self.layer(x) if self.tokens else torch.cat((x[:, :1], self.layer(x[:, 1:])), 1)


def mixer(spec: str) -> Callable[[nn.Module], nn.Module]:
    tokens = spec.partition(":")[0] in ("ninformer", "activator", "mossformer")
    return lambda part: Mixed(made(spec, part.qkv.in_features, 14), tokens).eval()  # type: ignore[union-attr, arg-type]


def in_turns(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for at in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if at:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def network(host: str) -> nn.Module:
    torch.manual_seed(0)
    models = timm_host.load("timm").models
    if host == "resnet18":
        return models.resnet.ResNet(models.resnet.BasicBlock, (2, 2, 2, 2), num_classes=10).eval()  # type: ignore[no-any-return]
    return models.vision_transformer.VisionTransformer(embed_dim=192, depth=12, num_heads=3, num_classes=10).eval()  # type: ignore[no-any-return]


@torch.no_grad()
def hosts(batches: tuple[int, ...], rounds: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for host, names in (("resnet18", GATES), ("vit-tiny", MIXERS)):
        nets = {"plain": network(host)}
        for name in names:
            nets[name] = network(host)
            if host == "resnet18":
                replace(nets[name], "layer*.*.bn2", after(gate(name)))
            else:
                replace(nets[name], "blocks.*.attn", mixer(name))
        for batch in batches:
            x = torch.randn(batch, 3, 224, 224)
            times = in_turns({name: lambda net=net: net(x) for name, net in nets.items()}, rounds)  # type: ignore[misc]
            one = found.setdefault(host, {}).setdefault(str(batch), {})
            for name, seconds in times.items():
                one[name] = {
                    "seconds": seconds,
                    "ratio": seconds / times["plain"],
                    "parameters": sum(p.numel() for p in nets[name].parameters()),
                }
                print(f"{host:9} batch {batch} {name:32} {1e3 * seconds:8.1f} ms {one[name]['ratio']:.2f}x", flush=True)
    return found


@torch.no_grad()
def maps(rounds: int, side: int = 56, dim: int = 64) -> dict[str, Any]:
    """Layers on a map of side x side tokens against dense attention of the same width, one image."""
    from regard.zoo.vision.twins import LocallyGroupedAttention

    torch.manual_seed(0)
    layers: dict[str, nn.Module] = {name: fitted(name, dim, 8) for name in ("softmax", *GRID_MIXERS)}
    layers["twins-lsa"] = Fitted(LocallyGroupedAttention(dim, 4, 7), "tokens")
    for layer in layers.values():
        layer.eval()
    x = torch.randn(1, dim, side, side)
    runs: dict[str, Callable[[], Any]] = {name: lambda layer=layer: layer(x) for name, layer in layers.items()}  # type: ignore[misc]
    times = in_turns(runs, rounds)
    return {name: {"seconds": seconds, "ratio": seconds / times["softmax"]} for name, seconds in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/vision.json"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    found = {
        "torch": torch.__version__,
        "threads": given.threads,
        "rounds": given.rounds,
        "hosts": hosts((1, 8), given.rounds),
        "maps": maps(given.rounds),
    }
    for name, one in found["maps"].items():  # type: ignore[attr-defined]
        print(f"56 x 56 tokens {name:20} {1e3 * one['seconds']:8.1f} ms {one['ratio']:.2f}x softmax")
    write_text(given.out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
