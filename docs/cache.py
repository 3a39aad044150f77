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

READING = """## What is seen

- *Bits, tokens and facts are three questions.* With a quarter of the entries, the first and the newest tokens alone (`streaming`) cost the large model next to nothing in bits per byte, as much as
  policies that look at attention; but they say another token at one step in eight, and lose the facts. `random` costs 0.28 bits and more, and its long generations are elsewhere.
- *Fewer bits beat fewer entries* on the small model: `kivi` with 4 bits keeps 31% of the bytes (a scale and a minimum in float32 for each 32 numbers are counted) and all of what can be measured here; with 2 bits
  facts begin to go. Both together keep less still: what `snapkv` lets stay loses next to nothing by being stored in 4 bits.
- *What is gone is gone.* On the large model `tova` finds every fact whose question ends the prompt and none that is asked for later; on the small one no policy that drops finds half of what the full cache finds later,
  but `snapkv` with half of the entries. `duoattention`, whose retrieving heads keep everything, finds what the full cache finds (its gates here are the ranks of heads by how much they copy, not
  trained ones).
- `keynorm` is worse than chance on the small model, and `pyramidkv` worse than the same budget in all layers there.
- `recycled-attention` drops nothing and reads little, here 64 entries chosen anew at every tenth step: it is for speed, and what it rereads lies beside the cache once more, so that it keeps more than the full
  cache. It costs half of the bits that `random` with a quarter of the entries costs, and no fact that is asked for later is found: most of a question's tokens read what was chosen before it.
- *with notes*: places (8 bytes) and a flag an entry and head, in room for 32 more. `adakv`'s heads keep different numbers; rows of a batch lie in tensors as long as the longest of them, which is
  why a batch keeps more than its budget.

What was cut: one seed, few prompts (a fact more or less is a step of 0.1 on tiny, 0.2 on smollm2-135m), one budget for most policies on smollm2-135m, prompts of 512 tokens, `recycled-attention` with one budget on the larger model. An order of methods here is no order of the papers."""

KVPRESS = """Both sides in one process, prompts in turns, entries dropped after the prompt alone; kvpress 0.5.5 with the newest transformers it takes, which is older than regard's. Bits per byte are those of the
text behind the prompt. They are the same where both follow one paper, and differ where they do not: `KeyNorm` and `random` of regard keep the newest entry always, which is worth much; `H2O` keeps the newest half of
its budget and sums weights, as the paper does, where kvpress's ObservedAttention keeps no newest entries and divides by the number of queries that see an entry; `PyramidKV` of kvpress is SnapKV where its last layer
would get less than a window, so both have a window of 8 and a beta of 10 here, in a run of their own (with a window of 32 the small model's
prompts gave 0.964 bits in regard and 0.934 in kvpress, which was its SnapKV then), and its first layer's count has no window on top. `AdaKV` of kvpress hides entries of the other heads and frees nothing. Times are
processor seconds on a machine that did much other work, as medians over the prompts and steps of a row: a difference of less than a fifth is noise. Behind the prompt regard's layers do a dozen small operations a layer and
step more than kvpress's, which leaves transformers' own cache behind and cannot drop at later steps, while regard's know the places, rows and heads of what they hold: a tenth of a step at the most on the large model, and a
fifth on the small one, whose whole step takes a few milliseconds."""

SPEED = """Processor seconds, the least of a few runs that take turns, on a machine that did much other work: ratios within a tenth are noise, and an overhead of 5% cannot be told from none.

- *At best.* A step reads the weights (540 MB in float32) whatever is remembered. With 16 tokens in the cache a step is as many times as fast as the plain model's at 8,000 as the last line of the table says, with 1,024
  as the line before it: no policy that keeps or reads 1,024 entries can be faster. `Full` is faster than the plain model because its tensors have room to grow, while transformers' cache copies all keys and values
  at every step, and because a group's query heads read their key head once.
- *Trees.* 64 nodes at 1.3 times the time of a step is out of reach on a processor: the model's linear products alone, on 64 rows, take several times those of one row, where they are bound by arithmetic and
  no longer by reading weights: more than three whole steps of one token, were all else free. It needs a processor on which products are free beside the reading of weights, as a GPU's are up to some hundred rows.
- *Drafts.* Token Recycling says two tokens a pass on code, from an empty table on and within 64 tokens a prompt, and is slower than plain decoding all the same, for its 81 rows cost more than six steps here; and
  prompt lookup's 1.6 tokens a pass are eaten up likewise. The target of 1.4 times plain decoding is missed on this processor; where a pass costs little more than a step it is the tokens a pass that count.
- *Ragged batches.* Sequences that fill a quarter of the padded batch, of one layer of SmolLM2's size and one of a large model's; "keys read once": the query heads of a key head as its rows, the fastest that padding can be.

The greedy tables are in float32; `tests/slow/test_greedy_prompts.py` runs the tiny model's in float64."""


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
        loads = [one["load"] for one in own.values() if isinstance(one, dict) and "load" in one]
        busy = f", {min(loads):.0f} to {max(loads):.0f} processes at work on two cores" if loads else ""
        out.append(f"\n{model}, torch {own['torch']}, one thread, {own['processor']}{busy}.\n")
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
            one = own["tree"]
            out.append(
                f"| nodes of a tree at {one['context']} tokens | a pass, over one node | the model's linear products alone, over one row | their share of the pass |\n"
                "|---|---|---|---|"
            )
            for n, x in one["over one node"].items():
                out.append(f"| {n} | {x:.2f} | {one['products over one row'][n]:.2f} | {one['products ms'][n] / one['ms'][n]:.0%} |")
            out.append("")
        if "ragged" in own:
            sizes = {name: x for name, x in own["ragged"].items() if name != "load"}
            padded = list(next(iter(sizes.values()))["faster than"])
            head = ["LeanAttention's schedule for a step's attention: times as fast as", *padded]
            out.append("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
            out += [f"| {name} | " + " | ".join(f"{x['faster than'][key]:.2f}" for key in padded) + " |" for name, x in sizes.items()]
            out.append("")
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

{READING}

{"".join(section(one) for one in results)}
## Beside kvpress

{KVPRESS}

```
python benchmarks/cache.py --kvpress FOLDER --model tiny
```
{peers(bench)}

## Speed, and greedy output token for token

{SPEED}

```
python benchmarks/serving.py
```
{serving(served)}
"""
    (HOME / "cache.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
