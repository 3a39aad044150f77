"""Writes docs/results/cache.md and its plots from reports of `regard sweep --cache` and the benchmarks' JSON.

python docs/cache.py benchmarks/results/cache_tiny.json benchmarks/results/cache_smollm2-135m.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from regard.lab.sweep import CacheSweep, cache_table
from regard.lab.sweep.cache_report import cache_plots, depth_table

HOME = Path("docs/results")
RESULTS = Path("benchmarks/results")
WORDS = HOME / "cache_reading.md"  # what is seen, written by hand


def called(name: str) -> str:
    return Path(name).name.replace("-", "_").replace(".", "_")


def section(result: CacheSweep) -> str:
    c = result.config
    name = called(result.model)
    for key, svg in cache_plots(result).items():
        (HOME / f"cache_{name}_{key}").write_text(svg, encoding="utf-8")
    given: dict[str, list[str]] = {}
    for p in result.points[1:]:
        given.setdefault(p.name, []).append(p.settings)
    methods = " ".join(f"{n}:{s}" for n, settings in given.items() for s in settings)
    return f"""## {result.model}

{c.length} tokens a prompt, {c.steps} behind it; {c.windows} texts for bits per byte, {c.windows} others that the model continues, and {c.needles} facts at each of {len(c.depths)} depths, each asked
for at the end of the prompt and once more after it.

```
regard sweep --cache {result.model} --seq-len {c.length} --windows {c.windows} --steps {c.steps} --needles {c.needles} --out runs/cache_{name} \\
  {methods}
```

![bits per byte against kept bytes](cache_{name}_bits.svg)

![facts found against kept bytes](cache_{name}_needles.svg)

![facts found, asked later, against kept bytes](cache_{name}_later.svg)

![divergence of long generations against kept bytes](cache_{name}_generation.svg)

{cache_table(result)}

Facts found by depth, the question in the prompt / after it:

{depth_table(result)}
"""


def peers(found: dict[str, Any]) -> str:
    """regard beside kvpress."""
    out = []
    for model, own in found.items():
        s = own["settings"]
        told = (
            f"{s['texts']} texts of {s['length']} tokens and {s['steps']} steps behind each, {5 * s['facts']} facts"
            if s["facts"]
            else f"{s['texts']} texts of {s['length']} tokens and {s['steps']} steps behind each"
        )
        out.append(f"\n{model}: {told}; transformers {s['transformers']}, torch {s['torch']}, one thread, {s['processor']}.\n")
        head = [
            "policy and budget",
            "bits a byte",
            "kvpress",
            "facts",
            "kvpress",
            "bytes, regard / kvpress",
            "prompt time, regard / kvpress",
            "step time, regard / kvpress",
        ]
        out.append("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
        for key, one in own["results"].items():
            a, b = one["regard"], one["kvpress"]
            cells = [
                key,
                f"{a['bits']:.3f}",
                f"{b['bits']:.3f}",
                f"{a['facts']:.2f}" if s["facts"] else "",
                f"{b['facts']:.2f}" if s["facts"] else "",
            ]
            cells += [f"{a[name] / b[name]:.2f}" for name in ("bytes", "prompt", "step")]
            out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out)


def ratios(title: str, values: dict[str, float]) -> str:
    return f"| {title} | ratio |\n|---|---|\n" + "\n".join(f"| {name} | {x:.2f} |" for name, x in values.items())


def serving(found: dict[str, Any]) -> str:
    out = []
    for model, own in found.items():
        out.append(f"\n{model}, torch {own['torch']}, one thread, {own['processor']}.\n")
        if "overhead" in own:
            out.append(
                ratios(
                    f"a step at {own['overhead']['context']} tokens, budget never reached, over the plain model",
                    own["overhead"]["over plain"],
                )
                + "\n"
            )
        if "long" in own:
            out.append(
                ratios(f"a step at {own['long']['context']} tokens: times as fast as the plain model", own["long"]["faster than plain"])
                + "\n"
            )
        if "tree" in own:
            out.append(
                ratios(
                    f"a pass over a tree of so many nodes at {own['tree']['context']} tokens, over one node", own["tree"]["over one node"]
                )
                + "\n"
            )
        if "recycling" in own:
            one = own["recycling"]
            out.append(f"| code, {one['tokens']} tokens behind each of 3 prompts | times as fast as plain | tokens a pass |\n|---|---|---|")
            out += [f"| {name} | {x:.2f} | {one['tokens a pass'][name]:.2f} |" for name, x in one["faster than plain"].items()]
            out.append("")
        if "greedy" in own:
            one = own["greedy"]
            out.append(
                f"| greedy, {one['tokens']} tokens | prompts wholly the same | tokens a pass | largest gap where they differ (logits) |\n|---|---|---|---|"
            )
            for name, x in one["strategies"].items():
                out.append(f"| {name} | {x['equal']} of {x['prompts']} | {x['tokens a pass']:.2f} | {max(x['gaps'], default=0):.1e} |")
    return "\n".join(out)


def main() -> None:
    results = [CacheSweep.read(Path(name)) for name in sys.argv[1:]]
    bench, served = (json.loads((RESULTS / name).read_text(encoding="utf-8")) for name in ("cache.json", "serving.json"))
    text = f"""# What a cache remembers

Policies that drop entries of a pretrained model's cache, or store them in fewer bits, against the bytes that are kept: the two controls are the full cache and entries
dropped by lot (`random`). *kept*: bytes of keys and values when the last token was read, over those of the full cache; *with notes*: with places, flags and what a
policy notes of its entries. *same token*, *KL*, *first other*: along the model's own greedy continuation, the share of steps at which the policy would say the same token, the divergence from
the full cache's distribution, and how many tokens would be the same before the first other one. *facts*: of those hidden in the prompt, the share whose value is said digit by digit.

{WORDS.read_text(encoding="utf-8").split("---", 1)[0].strip()}

{"".join(section(one) for one in results)}
## Beside kvpress

{WORDS.read_text(encoding="utf-8").split("---")[1].strip()}

```
python benchmarks/cache.py --kvpress FOLDER --model tiny
```
{peers(bench)}

## Speed, and greedy output token for token

{WORDS.read_text(encoding="utf-8").split("---")[2].strip()}

```
python benchmarks/serving.py
```
{serving(served)}
"""
    (HOME / "cache.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
