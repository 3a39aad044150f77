"""The examples run as they stand, and print what they promise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"
ARGUMENTS = {"train": ["gla", "--steps", "12"], "convert": ["8"], "recommend": ["1"]}
ARGUMENTS |= {name: ["6"] for name in ("speech_codes", "rank_documents", "blocks_of_tokens", "classify_tables", "classify_documents")}
PROMISED = {
    "train": "bits per byte",
    "swap": "regard:moba?block_size=32&top_k=4",
    "own_mechanism": "token by token equals the whole pass",
    "cache": "StreamingLLM",
    "convert": "after transfer",
    "look_inside": "open attention.html",
    "recommend": "distillation 0.1: the liked item is among the first ten",
    "speech_codes": "a speaker it has not heard",
    "rank_documents": "by attention of layer 1 alone",
    "blocks_of_tokens": "entries of the block decoder's cache a token of the prompt: 0.2",
    "classify_tables": "512 rows of context",
    "classify_documents": "the topic word is what some head looks at most",
}


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_example(name, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    script = [sys.executable, str(FOLDER / f"{name}.py"), *ARGUMENTS.get(name, [])]
    done = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert PROMISED.get(name, "") in done.stdout and done.stdout
