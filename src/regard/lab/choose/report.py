"""A choice as a table in the terminal and as one HTML page, in the look of `regard compare`'s report."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from ...plots import scatter
from ..compare.report import page, sortable
from ..compare.study import MEASURES
from ..files import write_text
from .rank import Choice, short, size, told

HEADS = ("mechanism", "quality", "prompt s", "token ms", "kept", "working", "standing")


def cells(choice: Choice) -> list[list[tuple[str, float | str]]]:
    """(text, what to sort by) of every row."""
    found: list[list[tuple[str, float | str]]] = []
    for row in choice.rows:
        c = row.cost
        costs = [(short(c.seconds), c.seconds), (short(1e3 * c.token), c.token), (size(c.kept), c.kept), (size(c.work), c.work)]
        quality = (told(row.quality, choice.needs.task), row.quality.mean)
        found.append([(row.name, row.name), quality, *costs, (row.standing, row.standing)])
    return found


def table(choice: Choice, most: int = 15) -> Table:
    """The first rows, for the terminal."""
    made = Table(title=f"for {choice.needs.context:,} tokens; quality: {MEASURES[choice.needs.task][2]}")
    for head in HEADS:
        made.add_column(head, justify="left" if head in ("mechanism", "standing") else "right", overflow="fold")
    for row in cells(choice)[:most]:
        made.add_row(*(text for text, _ in row))
    return made


def caveat(choice: Choice) -> str:
    left = f" Not measured: {', '.join(f'{name} ({why})' for name, why in choice.left_out.items())}." if choice.left_out else ""
    several = any(row.quality.half is not None for row in choice.rows)
    sure = (
        "Intervals are 95% ones, from the spread of seeds pooled over all mechanisms."
        if several
        else "One seed each: small differences are chance, and the order follows the means."
    )
    return (
        f"Quality is that of small models ({choice.study.told}): an order to start from, not what a large model will do. {sure} Costs are those of attention layers alone, with each mechanism's own "
        f"settings, measured here.{left}"
    )


def write_report(choice: Choice, path: Path) -> None:
    """One HTML file that needs no network."""
    needs = choice.needs
    groups = {"does not fit": {}, "fits": {}, "the choice": {}}  # type: dict[str, dict[str, tuple[float, float]]]
    first = next((row for row in choice.rows if row.fits), None)
    for row in choice.rows:
        group = "the choice" if row is first else "fits" if row.fits else "does not fit"
        groups[group][row.name] = (row.request(needs), row.quality.mean)
    figures = [
        f'<figure id="{key}">{scatter(title, x, MEASURES[needs.task][2], points, True)}<figcaption>{caption}</figcaption></figure>'
        for key, title, x, points, caption in (
            ("time", "What does quality cost in time?", "s a request", groups, "Seconds of a prompt and its answer, all layers."),
            ("memory", "What does quality cost in memory?", "bytes", by_bytes(choice, groups), "Bytes kept and worked with."),
        )
    ]
    memory = "" if needs.memory is None else f" in {size(needs.memory)}"
    shape = f"{needs.layers} layers of {needs.dim} channels, {needs.heads} heads, batch {needs.batch}"
    line = f"{needs.context:,} tokens and {needs.answer} after them{memory} on {needs.device}; {shape}"
    rows = [[*told, (row.why, row.why)] for told, row in zip(cells(choice), choice.rows, strict=True)]
    write_text(
        path,
        page(
            "Which attention?",
            [row.name for row in choice.rows[:3]],
            line,
            choice.verdict,
            sortable([*HEADS, "why"], rows),
            caveat(choice),
            figures,
        ),
    )


def by_bytes(choice: Choice, groups: dict[str, dict[str, tuple[float, float]]]) -> dict[str, dict[str, tuple[float, float]]]:
    """The same groups, along bytes."""
    cost = {row.name: row.cost.bytes for row in choice.rows}
    return {group: {name: (cost[name], y) for name, (_, y) in found.items()} for group, found in groups.items()}
