"""Writes docs/results/vision.md from a report of `regard compare --task digits` and from benchmarks/results/vision.json.

python docs/vision.py runs/vision/report.json
python docs/vision.py                            (without a report: what layers learned stands as it is, the rest is written anew)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from regard import models
from regard.lab.compare.statistics import seeds_of

HOME = Path(__file__).parent
COSTS = "## What it costs in a network"
BUSY = "Few runs, on a machine that did other work at the same time: differences of a tenth are noise.\n\n"


def accuracy(one: dict[str, Any], task: str) -> list[float]:
    return [run["accuracy"] for run in seeds_of(one, task)]


def learned(report: dict[str, Any]) -> str:
    task, lines = report["config"]["task"], []
    for spec, one in report["mechanisms"].items():
        values = accuracy(one, task)
        mean = sum(values) / len(values) if values else 0.0
        spread = f"{min(values):.1%} to {max(values):.1%}" if len(values) > 1 else ""
        cells = [
            f"`{spec}`",
            f"{mean:.1%}",
            spread,
            str(len(values)),
            f"{one['parameters']:,}",
            f"{one['flops'] / 1e6:.2f}",
            f"{one['time']:.2f}",
        ]
        lines.append((mean, "| " + " | ".join(cells) + " |"))
    head = "| in the slot | accuracy | over seeds | seeds | parameters | MFLOPs an image | time of a step |\n|---|---:|---|---:|---:|---:|---:|"
    return "\n".join([head, *(line for _, line in sorted(lines, reverse=True))])


def spread(one: dict[str, Any]) -> str:
    quartiles = f" ({one['low']:.2f} to {one['high']:.2f})" if "low" in one else ""
    return f"{one['ratio']:.2f}{quartiles}"


def measured(found: dict[str, Any]) -> str:
    lines = ["| network | layer | batch 1 | batch 8 | products alone | parameters |", "|---|---|---:|---:|---:|---:|"]
    for host, batches in found["hosts"].items():
        for name, one in batches["1"].items():
            lines.append(
                f"| {host} | `{name}` | {spread(one)} | {spread(batches['8'][name])} | {one.get('products', 1.0):.3f} "
                f"| {one['parameters'] / 1e6:.2f}M |"
            )
    return "\n".join(lines)


def main(path: str | None = None) -> None:
    written = HOME / "results/vision.md"
    if path is None:
        first = written.read_text(encoding="utf-8").partition(COSTS)[0].rstrip()
    else:
        first = what_was_learned(json.loads(Path(path).read_text(encoding="utf-8")))
    speed = json.loads((HOME.parent / "benchmarks/results/vision.json").read_text(encoding="utf-8"))
    written.write_text(f"{first}\n\n{the_rest(speed)}", encoding="utf-8")


def what_was_learned(report: dict[str, Any]) -> str:
    config, names = report["config"], " ".join(report["config"]["layers"])
    return f"""# Layers of images

## Learned on digits

scikit-learn's handwritten digits, up-sampled to {config["side"]} x {config["side"]} pixels, each shifted, scaled and turned at random; a small convolutional net
(`regard.nn.images.slot_net.SlotNet`, blocks of {" and ".join(map(str, config["widths"]))} channels) with the layer behind the last norm of each block's branch, trained for
{report["steps"]} steps of {config["batch"]} by AdamW, the same images, rate and steps for all; accuracy on {1000} draws of 360 digits that no net was trained on.
`none` is the net with nothing in its slots. Time of a training step is over that of `none`, both taken in turns. Made by

```
regard compare {names} --task {config["task"]} --minutes 13 --out runs/vision
python docs/vision.py runs/vision/report.json
```

{learned(report)}

So few steps show how fast a layer lets a net learn, not what it learns in the end; with three seeds, differences of a few points are not told from chance.
The first seed was run with `--minutes 13`, which decided the steps, the others added with `--resume --minutes 30`; the machine did other work at the same time.
In the first seed's run, on the same images: `mossformer:group=16,qk_dim=16` 82.3%, `mamba-yolo:state=4` 81.1%, `convit` 73.4%, `biformer:regions=2,top_k=2` 71.9%,
`hyperzzw` 80.9%.
"""


def the_rest(speed: dict[str, Any]) -> str:
    trained = {
        name: json.loads((models.path(name) / "training.json").read_text(encoding="utf-8"))["probes"] for name in models.names("image")
    }
    probes = "\n".join(
        f"| `{name}` | {told['digit']['model']:.1%} | {told['digit']['features']:.1%} | {told['digit']['pixels']:.1%} | "
        f"{told['photograph']['features']:.1%} | {told['photograph']['pixels']:.1%} |"
        for name, told in trained.items()
    )
    maps = ", ".join(f"`{name}` {one['ratio']:.2f}" for name, one in speed["maps"].items() if name != "softmax")
    return f"""{COSTS}

`python benchmarks/vision.py`: random weights, evaluation at 224 x 224, one thread, processor time, medians of {speed["rounds"]} runs (and their quartiles), each over the mean of the
runs of the plain network before and behind it. Gates stand behind the second BatchNorm of every block of ResNet-18, mixers in place of every attention of ViT-tiny.
Products alone: what the network's multiplications are over the plain one's. `two-passes` is a mean over the plane and a product with it, which is what every gate
over channels at least does: a gate is not told to be within 8% of the plain network where that range lies above it.

{"" if speed["rounds"] > 5 else BUSY}{measured(speed)}

Gates at batch 1, seven runs each, before and after they were written with fewer passes over the map: `polarized-attention` 1.16 and 1.10 (its products 1.086 and 1.002
of the network's: it collapses the map before it projects), `little-attention-block` 1.10 and 1.07, `ela` 1.10 and 1.09, `cbam` 1.13 and 1.13, `ulsam` 1.15 and 1.16;
with channels last 1.22 and 1.11, 1.12 and 1.08, 1.13 and 1.18, 1.17 and 1.16, 1.17 and 1.06. Multiplications are under 0.3% of the network's in all of them, so 8% is
not out of reach by arithmetic; what is left is passes over maps and calls of small functions. `torch.compile` of each gate does not win here (batch 1, nine runs:
`cbam` 1.09 and compiled 1.15, `ela` 1.10 and 1.23, `ulsam` 1.09 and 1.17, `polarized-attention` 1.10 and 1.10, `little-attention-block` 1.04 and 1.09).

On one map of 56 x 56 tokens and 64 channels, over dense softmax attention: {maps}.

## The trained nets that come with regard

`regard.models.load("digits-vit")` and `("digits-resnet")`, made by `scripts/train_vision.py`. Accuracy on digits of 32 x 32 pixels on photographs, of the net and of a
linear probe on its features and on pixels, and of a linear probe on which photograph a held-out piece is of.

| net | digits | probe | probe on pixels | photographs | probe on pixels |
|---|---:|---:|---:|---:|---:|
{probes}
"""


if __name__ == "__main__":
    main(*sys.argv[1:2])
