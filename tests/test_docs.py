"""The worked example of CONTRIBUTING.md and the README's Python run as they stand."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import torch

import regard

ROOT = Path(__file__).parent.parent


def blocks(name):
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


def test_the_contributing_example_is_a_whole_mechanism():
    source = blocks("CONTRIBUTING.md")[0]
    exec(compile(source, "CONTRIBUTING.md", "exec"), {"__name__": "example"})
    try:
        q, k, v = (torch.randn(1, 2, 9, 8, dtype=torch.float64) for _ in range(3))
        s = torch.exp(q @ k.transpose(-1, -2) / 8**0.5)
        truth = (s / (1 + s.sum(-1, keepdim=True))) @ v
        assert torch.allclose(regard.attend(q, k, v, "my-softmax-plus-one"), truth)
        assert torch.allclose(regard.attend(q, k, v, "my-softmax-plus-one", executor="reference"), truth)
        assert regard.nn.Attention(16, 2, "my-softmax-plus-one")(torch.randn(1, 5, 16)).shape == (1, 5, 16)
    finally:
        regard.catalog.registry._added.pop("my-softmax-plus-one")


def test_the_readme_runs():
    space: dict[str, object] = {}
    for source in blocks("README.md"):
        exec(compile(source, "README.md", "exec"), space)
    finite(space)


def test_the_guide_runs():
    q, k, v = (torch.randn(1, 8, 32, 64) for _ in range(3))
    for source in blocks("docs/own.md"):
        space = {"torch": torch, "regard": regard, "q": q, "k": k, "v": v}
        exec(compile(source, "own.md", "exec"), space)
        finite(space)


def finite(space):
    """What a text computes are numbers, and there are some."""
    found = [x for x in space.values() if isinstance(x, torch.Tensor) and x.is_floating_point()]
    assert found and all(x.isfinite().all() for x in found)


def test_names_that_docstrings_point_to_exist():
    root = Path(regard.__file__).parent
    for path in root.rglob("*.py"):
        for name in re.findall(r"`regard\.nn\.(\w+)", path.read_text(encoding="utf-8")):
            known = hasattr(regard.nn, name) or find_spec(f"regard.nn.{name}") is not None
            assert known, f"{path.relative_to(root)} points to regard.nn.{name}"


def test_how_to_pages_show_examples_that_exist():
    """The marker as mkdocs reads it: a formatter of Python in Markdown would put spaces into it."""
    pages = sorted((ROOT / "docs" / "howto").glob("*.md"))
    shown = [re.findall(r'^--8<-- "(examples/\w+\.py)"$', page.read_text(), re.MULTILINE) for page in pages]
    assert len(pages) >= 6 and all(len(found) == 1 and (ROOT / found[0]).is_file() for found in shown)
