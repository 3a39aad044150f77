"""What a layer costs in networks people use: ResNet-18 and ViT-tiny at 224 x 224, plain and with the layer put in by `regard.adapt.replace`; and
mixers of tokens against dense attention on maps of 56 x 56 tokens.

pip install 'regard[vision]';  python benchmarks/vision.py --out benchmarks/results/vision.json     (six minutes of a processor)
python benchmarks/vision.py --layers cbam ela --rounds 7 --batches 1     (some layers, into the other lines of the file that is there)

Each run stands between two of the plain network; a ratio is the median, over rounds, of a run over the mean of these two, with its quartiles. Times are the process's own
(processor time of all its threads), so that other work on the machine counts little; random weights, evaluation, no gradients.
Gates stand behind the second BatchNorm of every block of the ResNet (as CBAM's authors have them), mixers in place of every attention of the ViT. Beside the
ratio stands that of the products alone, as PyTorch's counter of operations has them: what no implementation can go below. `two-passes` is no layer but what
every gate over channels at least does: a mean over the plane, and a product with it.
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
from torch.utils.flop_counter import FlopCounterMode

from regard.adapt.replace import after, replace
from regard.lab.compare.slots import Fitted, fitted, made
from regard.lab.files import write_text
from regard.nn.images import timm_host

LEAST = "two-passes"
GATES = (LEAST, "cbam", "ela", "ulsam", "polarized-attention", "little-attention-block", "van-lka")
MIXERS = ("ninformer:tokens=197", "activator", "litv2-hilo", "mossformer:group=64,qk_dim=64")
GRID_MIXERS = ("litv2-hilo", "contmix", "mambaout")


class TwoPasses(nn.Module):
    """x times its means over the plane."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.mean((2, 3), keepdim=True)


def gate(name: str) -> Callable[[int], nn.Module]:
    return lambda width: TwoPasses() if name == LEAST else fitted(name, width, 7).eval()


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


def seconds(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def in_pairs(plain: Callable[[], Any], runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Of each run: its median seconds, and its ratio to the plain runs before and behind it, median and quartiles over rounds; the first round warms up."""
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for at in range(rounds + 1):
        before = seconds(plain)
        for name, run in runs.items():
            own, after_it = seconds(run), seconds(plain)
            if at:
                pairs[name].append(((before + after_it) / 2, own))
            before = after_it
    found = {}
    for name, all_of in pairs.items():
        ratios = [other / base for base, other in all_of]
        low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
        found[name] = {
            "seconds": statistics.median(other for _, other in all_of),
            "plain_seconds": statistics.median(base for base, _ in all_of),
            "ratio": statistics.median(ratios),
            "low": low,
            "high": high,
        }
    return found


def products(net: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        net(x)
    return counter.get_total_flops()


def network(host: str) -> nn.Module:
    torch.manual_seed(0)
    models = timm_host.load("timm").models
    if host == "resnet18":
        return models.resnet.ResNet(models.resnet.BasicBlock, (2, 2, 2, 2), num_classes=10).eval()  # type: ignore[no-any-return]
    return models.vision_transformer.VisionTransformer(embed_dim=192, depth=12, num_heads=3, num_classes=10).eval()  # type: ignore[no-any-return]


@torch.no_grad()
def hosts(batches: tuple[int, ...], rounds: int, layers: tuple[str, ...] = (*GATES, *MIXERS)) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for host, known in (("resnet18", GATES), ("vit-tiny", MIXERS)):
        names = [name for name in known if name in layers]
        if not names:
            continue
        plain, nets = network(host), {}
        for name in names:
            nets[name] = network(host)
            if host == "resnet18":
                replace(nets[name], "layer*.*.bn2", after(gate(name)))
            else:
                replace(nets[name], "blocks.*.attn", mixer(name))
        for batch in batches:
            x = torch.randn(batch, 3, 224, 224)
            base = products(plain, x)
            runs: dict[str, Callable[[], Any]] = {name: lambda net=net: net(x) for name, net in nets.items()}  # type: ignore[misc]
            one = in_pairs(lambda: plain(x), runs, rounds)
            for name, measured in one.items():
                measured["parameters"] = sum(p.numel() for p in nets[name].parameters())
                measured["products"] = products(nets[name], x) / base
                told = f"{measured['ratio']:.2f}x ({measured['low']:.2f} to {measured['high']:.2f}), products {measured['products']:.2f}x"
                print(f"{host:9} batch {batch} {name:32} {1e3 * measured['seconds']:8.1f} ms {told}", flush=True)
            one["plain"] = {
                "seconds": statistics.median(measured["plain_seconds"] for measured in one.values()),
                "ratio": 1.0,
                "parameters": sum(p.numel() for p in plain.parameters()),
            }
            found.setdefault(host, {})[str(batch)] = one
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
    x, dense = torch.randn(1, dim, side, side), layers.pop("softmax")
    runs: dict[str, Callable[[], Any]] = {name: lambda layer=layer: layer(x) for name, layer in layers.items()}  # type: ignore[misc]
    return in_pairs(lambda: dense(x), runs, rounds)


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Dictionaries one in the other, `new` before `old`."""
    both = {
        key: merged(old[key], value) if isinstance(value, dict) and isinstance(old.get(key), dict) else value for key, value in new.items()
    }
    return {**old, **both}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--layers", nargs="+", choices=(*GATES, *MIXERS, "maps"), help="some of them; 'maps': the maps of 56 x 56 tokens (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=15, help="runs of each layer")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="images at once (default: 1 8)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/vision.json"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    layers = tuple(given.layers or (*GATES, *MIXERS, "maps"))
    found: dict[str, Any] = {"torch": torch.__version__, "threads": given.threads, "rounds": given.rounds}
    found["hosts"] = hosts(tuple(given.batches), given.rounds, layers)
    found["maps"] = maps(given.rounds) if "maps" in layers else {}
    for name, one in found["maps"].items():
        print(f"56 x 56 tokens {name:20} {1e3 * one['seconds']:8.1f} ms {one['ratio']:.2f}x softmax")
    if given.layers and given.out.exists():
        found = merged(json.loads(given.out.read_text(encoding="utf-8")), found)
    write_text(given.out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
