"""Writes docs/results/sparse.md and its plots from a report of `regard sweep`.

python docs/sparse.py runs/sparse/report.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from regard.lab.sweep import Config, Point, Sweep, table
from regard.lab.sweep.report import plots

HOME = Path("docs/results")


def read(path: Path) -> Sweep:
    made = json.loads(path.read_text(encoding="utf-8"))
    config = Config(**{**made["config"], "depths": tuple(made["config"]["depths"])})
    points = [Point(**{**one, "retrieval": {float(d): r for d, r in one["retrieval"].items()}}) for one in made["points"]]
    return Sweep(config, made["model"], made["text"], points)


def nearest(result: Sweep, name: str, density: float) -> Point:
    return min((p for p in result.points if p.name == name), key=lambda p: abs(p.density - density))


def main() -> None:
    result = read(Path(sys.argv[1]))
    dense = result.points[0]
    for name, svg in plots(result).items():
        (HOME / f"sparse_{name}").write_text(svg, encoding="utf-8")
    c = result.config
    names = [n for n in dict.fromkeys(p.name for p in result.points) if n != "softmax"]
    close = []
    for name in names:
        p = nearest(result, name, 0.2)
        close.append(f"| `{name}` | {p.density:.2f} | {p.bits_per_byte - dense.bits_per_byte:+.3f} | {p.found:.2f} | {p.prefill:.2f} |")
    text = f"""# Sparse attention in a pretrained model

Training-free mechanisms in the prefill of all layers of `regard.models.load("tiny")`, a byte-level Llama of 2.6M parameters: {c.length} bytes a prompt,
{c.windows} held-out texts for bits per byte, {c.needles} prompts at each of {len(c.depths)} depths whose last words ask for a fact stated earlier. Density is what was read: pairs of
queries and keys that entered an output, over all causal ones. Softmax itself needs {dense.bits_per_byte:.3f} bits a byte and finds {dense.found:.0%} of the facts. Made by

```
regard sweep --needles {c.needles} --out runs/sparse
python docs/sparse.py runs/sparse/report.json
```

The two controls are `oracle` (the blocks of truly most mass, found with dense attention) and `random` (other blocks of the past); `streaming` is a fixed
pattern, sinks and a window. The prefill times are of the whole model on two CPU cores against softmax in the same run: at {c.length} tokens dense attention is a
small part of them, so that nothing here is much faster, and what chooses in Python loops (`hip`, `dhsa`, `ltri-llm`) is slower; docs/speed.md has long sequences. The times were taken again
after the sweep, with the machine otherwise idle.

![bits per byte against density](sparse_bits.svg)

![needles found against density](sparse_needles.svg)

![prefill time against density](sparse_prefill.svg)

## At about a fifth of the pairs

| method | density | bits a byte over softmax | needles found | prefill / softmax |
|---|---|---|---|---|
{chr(10).join(close)}

What is seen: bits per byte and needles are two questions. A window alone costs little text quality and loses nearly all facts outside of it; methods that look at
the last queries (`flexprefill`) or descend to single keys (`hip`) find the facts with an eighth to a third of the pairs. Choices by mean keys of blocks (`moba`) miss a fact that is
a tenth of its block unless the model was trained with them, as MoBA's are. One small model and one kind of needle: an order of methods here is no
order of the papers.

## All points

{table(result)}
"""
    (HOME / "sparse.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
