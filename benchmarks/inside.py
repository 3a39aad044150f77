"""What heads of real models do, and what is lost without them: python benchmarks/inside.py --out docs/results/inside.md

Heads are found by `regard look`'s scores on a text, then ablated, against as many heads drawn at random (the mean of three draws) that are none of them.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import inside_scores
import torch
import torch.nn.functional as F

from regard import taps
from regard.interpret import ablated, activation_patch, importance, logit_difference
from regard.interpret.views import head_views, induction
from regard.lab.files import write_text
from regard.lab.look import Look, best, look, needles
from regard.lab.sweep.reader import model_and_reader
from regard.tasks.text import python_text
from regard.zoo.analysis.head_pruning import prune_schedule
from regard.zoo.analysis.retrieval_head import needle_recall
from regard.zoo.analysis.secondary_attention_sinks import detect_sinks

Head = tuple[int, int]
TEXT = Path("CONTRIBUTING.md")


@torch.no_grad()
def loss(model: Any, ids: torch.Tensor, heads: Sequence[Head] = (), start: int = 0) -> float:
    """Bits a token from `start` on, with these heads giving zeros."""
    with ablated(model, heads) if heads else nullcontext():
        logits = model(ids).logits[:, :-1]
    return float(F.cross_entropy(logits[:, start:].flatten(0, 1), ids[:, 1 + start :].flatten())) / 0.6931471805599453


def against_chance(table: Any, kind: Sequence[Head], measure: Callable[[Sequence[Head]], float]) -> dict[str, float]:
    others = [at for at in table.heads if at not in set(kind)]
    drawn = [measure(random.Random(seed).sample(others, len(kind))) for seed in range(3)]
    return {"whole": measure([]), "without": measure(list(kind)), "random": sum(drawn) / 3, "heads": len(kind)}


def studied(name: str, tokens: int) -> dict[str, Any]:
    start, clock = time.perf_counter(), {}

    def timed(part: str, run: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        found = run()
        clock[part] = round(time.perf_counter() - begin, 1)
        return found

    model, reader = model_and_reader(name)
    first = [] if reader.begin is None else [reader.begin]
    seen: Look = timed("look", lambda: look(name, TEXT.read_bytes(), tokens, 4))
    other = torch.tensor([first + reader.tokens(bytes(python_text(40_000).train[20_000:].tolist()))[:tokens]])
    half = torch.randint(100, 120 if name == "tiny" else 30_000, (1, 100), generator=torch.Generator().manual_seed(3))
    twice = torch.cat((torch.tensor([first]).long(), half, half), 1)
    asked = needles(reader, reader.tokens(TEXT.read_bytes())[1000 : 1000 + tokens // 2], 3, seed=5)
    out: dict[str, Any] = {"heads": len(seen.induction.heads), "best": {title: best(table) for title, table, _ in seen.tables}}
    repeats = seen.induction.above(0.3) or seen.induction.top(2)
    out["induction"] = timed("induction heads", lambda: against_chance(seen.induction, repeats, lambda h: loss(model, twice, h, 101)))
    if seen.retrieval is not None:
        top = seen.retrieval.scores.top(max(2, len(seen.retrieval.scores.above(0.3))))
        limit = max(one.stop - one.start for one in asked) + 1
        out["retrieval"] = timed(
            "retrieval heads", lambda: against_chance(seen.retrieval.scores, top, lambda h: needle_recall(model, asked, list(h), limit))
        )  # type: ignore[union-attr]
    dormant = seen.views.sink.above(0.7) or seen.views.sink.top(2)
    out["dormant"] = timed("dormant heads", lambda: against_chance(seen.views.sink, dormant, lambda h: loss(model, other, h)))
    with torch.no_grad(), taps.read(model, "residual_out") as stream:
        model(other)
    layers = model.config.num_hidden_layers
    sinks = detect_sinks(stream.stack("residual_out"), margin=round(0.3 * layers), least=2)[0]
    out["sinks"] = [(s.kind, s.position, reader.text([int(other[0, s.position])]), s.creation, s.life) for s in sinks if s.kind != "noise"][
        :6
    ]
    table = timed(
        "importance", lambda: importance(model, [other[:, :128]], lambda ids: F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:]))
    )
    curve = timed("pruning", lambda: prune_schedule(model, table, lambda: loss(model, other[:, :256]), step=0.1, until=0.5))
    out["pruning"] = [(len(r.removed) / curve.heads, r.value) for r in curve.rounds]
    if name != "tiny":
        texts = ["When Mary and John went to the store, John gave a drink to", "When Mary and John went to the store, Tom gave a drink to"]
        clean, corrupt = (torch.tensor([reader.tokens(t.encode())]) for t in texts)
        answers = torch.tensor([[reader.tokens(b" Mary")[0], reader.tokens(b" John")[0]]])
        found = timed("patching", lambda: activation_patch(model, clean, corrupt, logit_difference(answers), position=-1))
        out["patching"] = best(type(found)(found.scores.abs(), "effect"))
    out["seconds"] = {**clock, "all": round(time.perf_counter() - start, 1)}
    return out


def scores(name: str, tokens: int = 64) -> dict[str, Any]:
    """The scores' part alone."""
    start = time.perf_counter()
    model, reader = model_and_reader(name)
    first = [] if reader.begin is None else [reader.begin]
    text = torch.tensor([first + reader.tokens(TEXT.read_bytes())[500 : 500 + tokens - len(first)]])
    half = torch.randint(100, 120 if name == "tiny" else 30_000, (1, 24), generator=torch.Generator().manual_seed(3))
    twice = torch.cat((torch.tensor([first]).long(), half, half), 1)
    table = induction(model, torch.arange(100, 120 if name == "tiny" else 30_000), 24, begin=reader.begin)
    previous = head_views(model, text).previous
    known = {at: float(previous.scores[at]) for at in previous.heads}
    found = inside_scores.decomposed(model, text, twice, table.top(1)[0], known)
    return {**found, "seconds": round(time.perf_counter() - start, 1)}


def line(title: str, what: str, one: dict[str, float] | None) -> str:
    if one is None:
        return f"| {title} | | {what} | not found | | |"
    return f"| {title} | {one['heads']:.0f} | {what} | {one['whole']:.3f} | {one['without']:.3f} | {one['random']:.3f} |"


def page(found: dict[str, dict[str, Any]]) -> str:
    lines = ["# Inside two real models", ""]
    lines += [
        "Made by `python benchmarks/inside.py` (one thread of a shared processor). Heads are found by the scores of `regard look` on this repository's CONTRIBUTING.md, and"
    ]
    lines += [
        "tried on other text. *Random* is the mean over three draws of as many other heads: the control. Numbers are what these runs gave, not claims of the papers.",
        "",
    ]
    for name, one in found.items():
        lines += [f"## {name}", "", f"{one['heads']} heads. All of it took {one['seconds']['all']:.0f} s: "]
        lines[-1] += ", ".join(f"{part} {s:.0f} s" for part, s in one["seconds"].items() if part != "all") + "."
        lines += ["", "| score | most of it |", "|---|---|", *(f"| {title} | {told} |" for title, told in one["best"].items()), ""]
        lines += ["| ablated | heads | measure | all heads | without them | without random ones |", "|---|---|---|---|---|---|"]
        lines += [line("induction heads", "bits a token of random tokens, the second time", one["induction"])]
        lines += [line("retrieval heads", "recall of needles", one.get("retrieval"))]
        lines += [line("dormant heads (mostly on the first token)", "bits a token of text", one["dormant"])]
        told = "; ".join(
            f"{kind if place else 'the first token'}: {word!r} at place {place}, from layer {begin} for {life} layers"
            for kind, place, word, begin, life in one["sinks"]
        )
        lines += ["", f"Sinks in the stream (`detect_sinks`): {told or 'none'}.", ""]
        lines += [
            "Heads pruned by importance, the least first: bits a token at each share removed.",
            "",
            "| removed | " + " | ".join(f"{share:.0%}" for share, _ in one["pruning"]) + " |",
        ]
        lines += [
            "|---|" + "---|" * len(one["pruning"]),
            "| bits a token | " + " | ".join(f"{bits:.2f}" for _, bits in one["pruning"]) + " |",
            "",
        ]
        lines += inside_scores.told(one["scores"]) if "scores" in one else []
        if "patching" in one:
            lines += [
                f'Patching "... John gave a drink to" with a run in which Tom gives it, at the last token: {one["patching"]} move the logit of Mary over John most.',
                "",
            ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="*", default=["tiny", "smollm2-135m"])
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--scores", action="store_true", help="measure the scores' part alone; the rest is the file's at --json")
    parser.add_argument("--out", type=Path, default=Path("docs/results/inside.md"))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/inside.json"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, Any]] = {}
    if asked.scores:
        found = json.loads(asked.json.read_text())
    for name in asked.models:
        found[name] = {**(found[name] if asked.scores else studied(name, asked.tokens)), "scores": scores(name)}
        print(name, json.dumps(found[name], indent=1), flush=True)
        write_text(asked.json, json.dumps(found, indent=1))
        write_text(asked.out, page(found))


if __name__ == "__main__":
    main()
