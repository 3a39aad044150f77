"""Pages that are made when the documentation is built: one a row of the catalogue, and one a package of the API."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from formulas import typeset  # beside this file
from mkdocs.structure.files import File, Files

from regard.catalog import records
from regard.catalog.cards import formula, made, place
from regard.catalog.records import Record
from regard.catalog.registry import entry

SOURCE = "src/regard"
MEASURED = Path(__file__).parent / "results" / "verify.json"
PACKAGES = {
    "regard": [
        "regard.attend",
        "regard.plan",
        "regard.step",
        "regard.weights",
        "regard.merge",
        "regard.get",
        "regard.names",
        "regard.records",
        "regard.register",
    ],
    "masks": ["regard.algebra.mask", "regard.algebra.position_mask", "regard.algebra.token_mask", "regard.algebra.neighborhood"],
    "mechanisms": [
        "regard.algebra.mechanism",
        "regard.algebra.normalizer",
        "regard.algebra.score",
        "regard.algebra.position",
        "regard.algebra.select",
    ],
    "layers": ["regard.nn.attention", "regard.nn.multihead", "regard.nn.functional", "regard.nn.decoder", "regard.nn.mixers"],
    "adapt": [
        "regard.adapt.patch",
        "regard.adapt.named",
        "regard.adapt.replace",
        "regard.adapt.linearise",
        "regard.adapt.conversion",
        "regard.adapt.recipe",
        "regard.adapt.stages",
        "regard.adapt.student",
        "regard.adapt.intercept",
        "regard.adapt.merged",
        "regard.adapt.landmarks",
    ],
    "models": ["regard.models", "regard.models.causal_lm"],
    "taps": ["regard.taps", "regard.taps.points", "regard.taps.session", "regard.taps.reductions"],
    "cache": ["regard.cache", "regard.cache.policy", "regard.cache.policies", "regard.cache.kivi", "regard.cache.prompt"],
    "generate": ["regard.generate", "regard.generate.strategies"],
    "interpret": ["regard.interpret", "regard.interpret.heads", "regard.interpret.surgery", "regard.interpret.patching"],
    "compare": ["regard.lab.compare", "regard.lab.choose", "regard.lab.choose.needs", "regard.lab.choose.rank", "regard.lab.verification"],
}


def measured() -> dict[str, list[dict[str, Any]]]:
    """The results of the last `regard verify` that was written down, by row."""
    if not MEASURED.exists():
        return {}
    return {row["slug"]: row["checks"] for row in json.loads(MEASURED.read_text(encoding="utf-8"))["rows"]}


def table(checks: list[dict[str, Any]]) -> list[str]:
    lines = ["| claim | measured | expected | control |", "|---|---|---|---|"]
    for one in checks:
        number = "-" if one["measured"] is None else f"{one['measured']:.4g}"
        lines.append("| " + " | ".join(str(x).replace("|", "\\|") for x in (one["claim"], number, one["threshold"], one["control"])) + " |")
    return lines


def row_page(record: Record, results: dict[str, list[dict[str, Any]]]) -> str:
    """What a row is, how it is called, what it costs, and what was measured on it."""
    lines = [
        f"# {record.slug}",
        "",
        f"**{record.title}** ({record.year}). Id {record.id}, family {record.family}; {', '.join(record.parts)}.",
        "",
    ]
    if record.status != "works":
        return "\n".join(
            [*lines, "Planned, not working yet. What it must be:", "", "```text", record.math, "```", "", "Claim: " + record.claim, ""]
        )
    own = made().get(record.slug, [])
    head = own[: own.index("")] if "" in own else own
    lines += [
        typeset(formula(entry(record.slug))),
        "",
        *[f"- `{line}`" if line.startswith("used as") else f"- {line}" for line in head],
        "",
    ]
    lines += [
        f"Files: `{SOURCE}/zoo/{place(record)}`, checks `{SOURCE}/lab/checks/{place(record)}`.",
        "",
        f"The paper's claim: {record.claim}",
        "",
        "## Checks",
        "",
    ]
    if record.slug in results:
        lines += ["As `regard verify` measured them:", "", *table(results[record.slug])]
    else:
        lines += [line.strip() for line in own if line.startswith("  - ")]
    return "\n".join([*lines, ""])


def api_page(title: str, modules: list[str]) -> str:
    return "\n".join([f"# {title}", "", *[f"::: {name}\n" for name in modules]])


def on_files(files: Files, config: Any) -> Files:
    results = measured()
    for record in records():
        files.append(File.generated(config, f"rows/{record.family}/{record.slug}.md", content=row_page(record, results)))
    for title, modules in PACKAGES.items():
        files.append(File.generated(config, f"api/{title}.md", content=api_page(title, modules)))
    return files
