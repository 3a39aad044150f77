"""`regard look`: one page of what a model's heads look at in a text. It needs no network."""

from __future__ import annotations

import html
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import RegardError
from ..interpret.tables import HeadTable
from ..interpret.views import HeadViews, head_views, induction
from ..models.needles import fact, question
from ..zoo.analysis.retrieval_head import Needle, RetrievalHeads, hidden, retrieval_scores
from .compare.report import STYLE
from .files import write_text
from .sweep.reader import Reader, model_and_reader


@dataclass(frozen=True)
class Look:
    """text: the tokens looked at. retrieval: None where the model answers no question about the text, for the reason `why`. seconds: by part."""

    model: str
    text: list[str]
    views: HeadViews
    induction: HeadTable
    retrieval: RetrievalHeads | None
    why: str
    seconds: dict[str, float]

    @property
    def tables(self) -> list[tuple[str, HeadTable, str]]:
        """(title, table, caption), in the order of the page."""
        found = [
            ("Sinks", self.views.sink, "Mean weight on the first token."),
            ("Second sinks", self.views.second, "The greatest mean weight that one other token gets from those behind it."),
            ("Induction", self.induction, "In random tokens that come again: weight on what followed the token the first time."),
            ("The token before", self.views.previous, "Mean weight on it."),
            ("Spread", self.views.entropy, "Mean entropy of a query's weights, in nats: 0 is one token."),
            ("Reach", self.views.distance, "Mean distance of what is looked at, in tokens."),
        ]
        if self.retrieval is not None:
            told = f"How often a head looks into the needle at the very token that is copied; {self.retrieval.answered} of {len(self.retrieval.recalls)} questions answered."
            found.insert(2, ("Retrieval", self.retrieval.scores, told))
        return found


def needles(reader: Reader, haystack: list[int], count: int, seed: int = 0) -> list[Needle]:
    """Facts of five digits at even depths of the text, and the questions for them; the digits are the needle."""
    draw, out = random.Random(seed), []
    begin = [] if reader.begin is None else [reader.begin]
    for at in range(count):
        one = fact(draw)
        before, after = one.text.split(one.value.encode())
        parts = [torch.tensor(reader.tokens(piece)) for piece in (before, one.value.encode(), after)]
        asked, hay = torch.tensor(reader.tokens(question(one.name))), torch.tensor(begin + haystack)
        copied = slice(len(parts[0]), len(parts[0]) + len(parts[1]))
        out.append(hidden(hay, torch.cat(parts), asked, (at + 1) / (count + 1), copied=copied))
    return out


def look(name: str, text: bytes, tokens: int = 512, questions: int = 4) -> Look:
    """name: of `regard.models`, or a folder of a causal language model in transformers' format. tokens: of the text that are read, the first ones.
    questions: facts hidden in the text and asked for, to find heads that copy them."""
    if tokens < 64 or questions < 1:
        raise RegardError(f"tokens={tokens}, questions={questions}; expected 64 or more, and 1 or more")
    model, reader = model_and_reader(name)
    limit = getattr(model.config, "max_position_embeddings", None) or tokens + 128
    ids = reader.tokens(text)[: min(tokens, int(limit) - 128)]
    if len(ids) < 64:
        raise RegardError(f"the text has {len(ids)} tokens; expected 64 or more")
    begin, clock = ([] if reader.begin is None else [reader.begin]), {}
    whole = torch.tensor([begin + ids])

    def timed(part: str, run: Any) -> Any:
        start = time.perf_counter()
        found = run()
        clock[part] = time.perf_counter() - start
        return found

    views = timed("views", lambda: head_views(model, whole))
    known = torch.tensor(sorted(set(ids)))
    repeated = timed("induction", lambda: induction(model, known, min(128, len(ids) // 2), begin=reader.begin))
    prompts = needles(reader, ids, questions)
    try:
        found = timed("retrieval", lambda: retrieval_scores(model, prompts, limit=max(p.stop - p.start for p in prompts) + 1))
        why = ""
    except RegardError as reason:
        found, why = None, str(reason)
    return Look(name, [reader.text([at]) for at in whole[0].tolist()], views, repeated, found, why, clock)


def best(table: HeadTable, count: int = 5) -> str:
    return ", ".join(f"layer {layer} head {head} ({float(table.scores[layer, head]):.3g})" for layer, head in table.top(count))


def page(found: Look) -> str:
    """The page, one HTML file."""
    head = f"Heads of {html.escape(Path(found.model).name)}"
    sink = float(found.views.sink.scores.nanmean())
    told = f"On average a head gives {sink:.0%} of its weight to the first token. "
    strong = len(found.induction.above(0.4))
    told += f"{strong} of {len(found.induction.heads)} heads look for repeats (induction above 0.4). "
    if found.retrieval is not None:
        told += f"{len(found.retrieval.scores.above(0.1))} copy what is asked for (retrieval of 0.1 or more)."
    else:
        told += f"Heads that retrieve were not found: {html.escape(found.why)}."
    figures = "".join(
        f"<figure><h2>{title}</h2>{table.plot()}<figcaption>{html.escape(caption)} Most: {best(table)}.</figcaption></figure>"
        for title, table, caption in found.tables
    )
    rows = second_sinks(found.views, found.text)
    listed = "".join(
        f"<tr><td>{html.escape(repr(word))}</td><td>{place}</td><td>{count}</td><td>{most:.3f}</td></tr>"
        for word, place, count, most in rows
    )
    table = (
        "<h2>Tokens that are second sinks</h2><div class=wide><table><thead><tr><th>token<th>place<th>heads<th>greatest mean weight</thead>"
    )
    clock = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in found.seconds.items())
    return (
        f'<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width"><title>{head}</title>'
        f"<style>{STYLE}h2{{margin:1rem 0 .3rem;font-size:1.1rem}}</style><h1>{head}</h1><p class=sub>{len(found.text)} tokens; {clock}</p>"
        f"<p class=verdict>{told}</p><div class=plots>{figures}</div>{table}<tbody>{listed}</tbody></table></div></html>"
    )


def second_sinks(views: HeadViews, text: list[str], least: float = 0.1, most: int = 12) -> list[tuple[str, int, int, float]]:
    """(token, place, heads, greatest mean weight) of tokens other than the first to which some head gives `least` on average, by the number of heads."""
    chosen: dict[int, list[float]] = {}
    for at in views.second.above(least):
        chosen.setdefault(int(views.places[at]), []).append(float(views.second.scores[at]))
    order = sorted(chosen.items(), key=lambda pair: (-len(pair[1]), pair[0]))
    return [(text[place], place, len(weights), max(weights)) for place, weights in order[:most]]


def write(found: Look, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, page(found))
