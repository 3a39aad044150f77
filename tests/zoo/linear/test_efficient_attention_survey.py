"""Where systems stand in the survey's table, one of each kind that a description can be, and how the table is written."""

from __future__ import annotations

import re

import pytest

from regard.catalog import get, names
from regard.zoo.linear.efficient_attention_survey import LEAVES, MODULES, Place, place_of, table, taxonomy

RUNS, SLOTS, WHOLE, BOTH = "parallel, chunk, step", "chunk, step", "whole", "whole, step"
# name, options, class, training time, growth of the state, causal, both directions, forms
PLACES: list[tuple[str, dict[str, object], str, str, str, bool, bool, str]] = [
    ("slab", {}, "linear, kernel", "L", "none", True, True, RUNS),
    ("rala", {}, "linear, kernel", "L", "-", False, True, RUNS),
    ("efficient-attention", {}, "linear, decay", "L", "none", True, True, RUNS),
    ("transnormerllm", {}, "linear, decay", "L", "none", True, False, RUNS),
    ("gsa", {}, "linear, decay", "L", "none", True, False, SLOTS),
    ("nha", {}, "hybrid, in a layer", "L", "none", True, False, SLOTS),
    ("deltanet", {}, "linear, fast weight", "L", "none", True, False, RUNS),
    ("log-linear-attention", {}, "linear, decay", "L log L", "log", True, False, RUNS),
    ("log-linear-attention", {"base": "gated-delta"}, "linear, fast weight", "L log L", "log", True, False, RUNS),
    ("local-linear-attention", {}, "linear, in-context regression", "L^2", "linear", True, True, BOTH),
    ("routing-transformer", {}, "sparse, clustering", "L^1.5", "-", False, True, WHOLE),
    ("hyperattention", {}, "sparse, clustering", "density x L^2", "-", False, True, WHOLE),
    ("hip", {}, "sparse, block routing", "density x L^2", "-", False, True, WHOLE),
    ("draftattention", {}, "sparse, block routing", "density x L^2", "-", False, True, WHOLE),
    ("adasplash", {}, "sparse, block routing", "density x L^2", "linear", True, True, BOTH),
    ("moba", {}, "sparse, block routing", "density x L^2", "linear", True, False, BOTH),
    ("swat", {}, "sparse, fixed", "density x L^2", "none", True, False, BOTH),
    ("sparse-transformer", {}, "sparse, fixed", "density x L^2", "linear", True, False, BOTH),
    ("neighborhood", {}, "sparse, fixed", "density x L^2", "-", False, True, WHOLE),
    ("agent-attention", {}, "reduced, low rank", "L", "-", False, True, WHOLE),
    ("soft", {}, "reduced, low rank", "L", "-", False, True, WHOLE),
    ("relaxed-attention", {}, "hybrid, in a layer", "L^2", "linear", True, True, BOTH),
    ("lln-attention", {"diagonal": True}, "hybrid, in a layer", "L", "-", False, True, WHOLE),
    ("lln-attention", {"diagonal": True, "statistics": "given"}, "hybrid, in a layer", "L", "linear", True, True, BOTH),
    ("sinkformer", {}, "dense", "L^2", "-", False, True, WHOLE),
    ("entmax", {}, "dense", "L^2", "linear", True, True, BOTH),
]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: "-".join((place[0], *(str(value) for value in place[1].values()))))
def test_a_system_stands_where_its_description_says(place: tuple[str, dict[str, object], str, str, str, bool, bool, str]) -> None:
    name, options, *rest = place
    assert place_of(name, get(name, **options)) == Place(name, *rest)  # type: ignore[arg-type]


def test_every_mechanism_and_every_named_layer_stands_once() -> None:
    found = taxonomy()
    assert list(found) == list(LEAVES)
    told = [one if isinstance(one, str) else one.name for members in found.values() for one in members]
    assert sorted(told) == sorted({*names(), *MODULES}) and set(MODULES) <= set(names(None))
    assert all(one in found[leaf] for one, leaf in MODULES.items())


def test_the_table_is_markdown_of_six_columns() -> None:
    lines = table().splitlines()
    assert lines[0] == "| class | system | training time | state when decoding | both directions | forms |"
    assert re.fullmatch(r"(\|-+){6}\|", lines[1]) and table().endswith("\n")
    assert len(lines) == 2 + len({*names(), *MODULES}) and all(line.count("|") == 7 for line in lines)
    for line in (
        "| linear, kernel | slab | L | constant | yes | parallel, chunk, step |",
        "| linear, kernel | rala | L | - | yes | parallel, chunk, step |",
        "| linear, decay | log-linear-attention | L log L | log L | no | parallel, chunk, step |",
        "| dense | entmax | L^2 | L | yes | whole, step |",
        "| hybrid, in a layer | mega (layer) | | | | |",
    ):
        assert line in lines
