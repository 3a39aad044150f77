"""Train the two small nets that ship as `regard.models.load("digits-vit")` and `("digits-resnet")`: about fifteen minutes of one core.

    python scripts/train_vision.py OUT [--only digits-vit] [--steps 900]

Each step sees digits (in the end three in four on photographs, ink inverting what is behind it; the others plain), whose names are learned, and pieces
of photographs turned by quarters, whose turns are learned without labels by a second head that is left out of the file. Writes, for each net,
config.json, model.safetensors (float16) and training.json (settings, versions, losses, and a linear probe on its features beside one on
pixels: digits that nobody was trained on, and which photograph a held-out piece is of) to OUT/NAME, and prints the probes.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from regard.lab.compare.train import optimise, thinned
from regard.models import vision
from regard.nn.images import timm_host
from regard.tasks.digits import digits, photo_patches, rotated

STEPS = {"digits-resnet": 900, "digits-vit": 1000}
DIGITS, PHOTOGRAPHS = 64, 16  # a step
HARD, GROWN = 0.75, 0.3  # the share of digits on photographs grows from 0 to this over this share of the steps


def batch(generator: torch.Generator, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """Images, the first DIGITS of them digits, `share` of these on photographs; their labels; the turns of the others."""
    hard = digits(round(share * DIGITS), generator)
    easy = digits(DIGITS - len(hard.labels), generator, background="plain")
    pieces, turns = rotated(photo_patches(PHOTOGRAPHS, generator)[0], generator)
    return torch.cat((hard.images, easy.images, pieces)), torch.cat((hard.labels, easy.labels)), turns


@torch.no_grad()
def probed(features: Tensor, labels: Tensor, others: Tensor, truth: Tensor) -> float:
    """Accuracy of ridge regression onto one-hot labels, its strength the best of a few."""
    mean, std = features.mean(0), features.std(0) + 1e-6
    x, y = (F.pad((z - mean) / std, (0, 1), value=1.0).double() for z in (features, others))
    target, gram = F.one_hot(labels).double(), x.T @ x
    found = []
    for strength in (1.0, 10.0, 100.0, 1000.0, 10000.0):
        weight = torch.linalg.solve(gram + strength * torch.eye(len(gram), dtype=torch.float64), x.T @ target)
        found.append(float(((y @ weight).argmax(1) == truth).double().mean()))
    return max(found)


@torch.no_grad()
def probes(model: nn.Module, count: int = 3000) -> dict[str, dict[str, float]]:
    """{task: {"pixels": accuracy, "features": accuracy}} and the model's own accuracy on digits."""
    found = {}
    for task in ("digit", "photograph"):
        sets = []
        for held_out in (False, True):
            generator = torch.Generator().manual_seed(7 + held_out)
            drawn = (
                digits(count, generator, held_out=held_out)[:2] if task == "digit" else photo_patches(count, generator, held_out=held_out)
            )
            sets.append(drawn)
        (x, labels), (y, truth) = sets
        pooled = [torch.cat([model.forward_head(model.forward_features(part), pre_logits=True) for part in z.split(250)]) for z in (x, y)]
        found[task] = {"pixels": probed(x.flatten(1), labels, y.flatten(1), truth), "features": probed(pooled[0], labels, pooled[1], truth)}
        if task == "digit":
            found[task]["model"] = float((torch.cat([model(part) for part in y.split(250)]).argmax(1) == truth).double().mean())
    return found


def train(name: str, out: Path, steps: int, seed: int = 0) -> None:
    torch.manual_seed(seed)
    model, generator, start = vision.made(name), torch.Generator().manual_seed(seed), time.perf_counter()
    turning = nn.Linear(model.num_features, 4)
    both = nn.ModuleDict({"model": model, "turning": turning})

    def loss(step: int) -> Tensor:
        images, labels, turns = batch(generator, HARD * min(1.0, step / (GROWN * steps)))
        pooled = model.forward_head(model.forward_features(images), pre_logits=True)
        value = F.cross_entropy(model.get_classifier()(pooled[:DIGITS]), labels) + 0.5 * F.cross_entropy(turning(pooled[DIGITS:]), turns)
        if step % 50 == 0:
            print(f"{name} step {step} loss {float(value.detach()):.3f} {time.perf_counter() - start:.0f} s", flush=True)
        return value

    losses = optimise(both, loss, steps)
    model.eval()
    told = probes(model)
    print(name, json.dumps(told), flush=True)
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: (x.half() if x.is_floating_point() else x).contiguous() for key, x in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(vision.SHAPES[name], indent=1) + "\n")
    facts = {
        "steps": steps, "seed": seed, "digits": DIGITS, "photographs": PHOTOGRAPHS,
        "parameters": sum(p.numel() for p in model.parameters()), "torch": torch.__version__, "timm": timm_host.load("timm").__version__,
        "probes": told, "loss": [(step, round(value, 3)) for step, value in thinned(losses, 40)],
    }  # fmt: skip
    (folder / "training.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", choices=tuple(STEPS))
    parser.add_argument("--steps", type=int)
    given = parser.parse_args()
    for each in [given.only] if given.only else STEPS:
        train(each, given.out, given.steps or STEPS[each])
