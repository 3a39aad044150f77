"""Formulas of the documentation's pages: MathML where there is mathematics, words left alone."""

from __future__ import annotations

import re
import sys
import xml.dom.minidom
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "docs"))

from formulas import line, typeset

from regard.catalog import records
from regard.catalog.cards import formula
from regard.catalog.registry import entry

IJ = "<mrow><mrow><mi>i</mi><mi>j</mi></mrow></mrow>"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("p_ij", f"<math><msub><mi>p</mi>{IJ}</msub></math>"),
        ("x^2", "<math><msup><mi>x</mi><mrow><mn>2</mn></mrow></msup></math>"),
        ("S_t^T", "<math><msubsup><mi>S</mi><mrow><mi>t</mi></mrow><mrow><mi>T</mi></mrow></msubsup></math>"),
        ("q^_i", '<math><msub><mover accent="true"><mi>q</mi><mo>^</mo></mover><mrow><mi>i</mi></mrow></msub></math>'),
        ("sqrt(D)", "<math><msqrt><mi>D</mi></msqrt></math>"),
        ("alpha, where", "<math><mi>α</mi></math>, where"),
        ("a sum of a query's keys", "a sum of a query&#x27;s keys"),
        ("`attend(q, k)` is called", "<code>attend(q, k)</code> is called"),
    ],
)
def test_a_line(text: str, shown: str) -> None:
    assert line(text) == shown


def test_a_fraction_above_is_one_only_where_it_is_negative() -> None:
    assert "<mrow><mn>2</mn></mrow></msup><mo" in line("s^2/2")
    assert line("D^-1/2").count("<mn>") == 2 and "</msup></math>" in line("D^-1/2")


def test_every_row_is_well_formed_and_keeps_its_words() -> None:
    for record in records(None, "works"):
        text = formula(entry(record.slug))
        html = typeset(text)
        xml.dom.minidom.parseString(html)
        shown = re.sub("<[^>]*>", " ", html)
        for word in re.findall(r"(?<![\w`'_^.])[a-z]{5,}(?![\w`'_^(])", text):
            if word not in shown:
                assert word in ("alpha", "gamma", "delta", "theta", "kappa", "lambda", "sigma", "omega", "infinity", "epsilon"), (
                    record.slug,
                    word,
                )
