"""`make mutants`: rows are broken on purpose, one small change at a time, and their checks and tests must notice.

A changed program lives in a fork of this process alone: the import of the row's file is answered with it. Killers, in order: the row's
quick checks (`regard verify SLUG`), every test named after the row (golden vectors, contracts, layers), the checks that take longer. A
mutant that runs three times as long as the unchanged row is killed too. Mutants that no caller could tell from the original stand in equivalent.json
with the reason.

cosmic-ray and mutmut start a process and import torch for each mutant, and cannot be told a row's own killers.
"""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.machinery
import importlib.util
import json
import multiprocessing
import os
import pathlib
import random
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import CodeType, ModuleType
from typing import Any

import pytest
import torch

from mutants.operators import Mutant, changed, mutants
from regard.catalog import records
from regard.catalog.registry import entries
from regard.lab import verification

TESTS = pathlib.Path(__file__).parent.parent
EQUIVALENT: dict[str, dict[str, str]] = json.loads((TESTS / "mutants" / "equivalent.json").read_text())
FOLDERS = ["golden", "contract", "zoo", "nn", "adapt", "cache", "parallel"]  # folders of tests whose cases carry the names of rows
QUICK = 3.0  # seconds of a check that comes before the tests
SLACK = 20.0  # seconds a mutant may take beyond three times the unchanged row


@dataclass(frozen=True)
class Killers:
    """What the unchanged row showed of its killers: the places of its quick checks and of the others, quickest first, and the tests that carry its name."""

    quick: tuple[int, ...]
    slow: tuple[int, ...]
    tests: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant. killer: "checks", "tests", "time"; None: it survived."""

    slug: str
    line: int
    key: str
    killer: str | None
    seconds: float


def source_of(slug: str) -> tuple[str, pathlib.Path]:
    module = entries()[slug].module
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    return module, pathlib.Path(spec.origin)


class Changed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers the import of one module with another program."""

    def __init__(self, module: str, path: pathlib.Path, code: CodeType) -> None:
        self.module, self.path, self.code = module, path, code

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        if name != self.module:
            return None
        return importlib.util.spec_from_file_location(name, self.path, loader=self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        exec(self.code, module.__dict__)


class Listing:
    """Plugin of pytest that remembers the tests it collects."""

    def __init__(self) -> None:
        self.found: list[tuple[str, str]] = []  # file's name, test's id

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.found = [(item.path.name, item.nodeid) for item in session.items]


def named_after(slug: str, listed: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """The tests that carry a row's name, as a word of its own: in their file's, or in their own."""
    stem = slug.replace("-", "_")
    own, told = f"test_{stem}.py", re.compile(f"(?<![a-z0-9])({re.escape(slug)}|{stem})(?![0-9]*[a-z])")  # pytest numbers equal names
    return tuple(found for file, found in listed if file == own or (told.search(found.partition("::")[2]) and "compile" not in found))


def all_tests() -> list[tuple[str, str]]:
    plugin = Listing()
    pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *(str(TESTS / name) for name in FOLDERS)], plugins=[plugin])
    return plugin.found


def unchanged(slug: str, listed: Sequence[tuple[str, str]]) -> tuple[str | None, Killers]:
    """Runs all checks and tests of the row as it is: what fails, and what there is."""
    results = [verification.run(check) for check in verification.checks_of(slug)]
    order = sorted(range(len(results)), key=lambda at: results[at].seconds)
    quick = tuple(at for at in order if results[at].seconds < QUICK)
    killers = Killers(quick, tuple(order[len(quick) :]), named_after(slug, listed))
    if not all(result.passed for result in results):
        return "checks", killers
    return tests_fail(killers), killers


def tests_fail(killers: Killers) -> str | None:
    return "tests" if killers.tests and pytest.main(["-x", "-q", "-p", "no:cacheprovider", *killers.tests]) else None


def killer(slug: str, killers: Killers) -> str | None:
    """What notices that the row is broken; None if nothing does."""
    checks = verification.checks_of(slug)

    def fail(places: tuple[int, ...]) -> str | None:
        return None if all(verification.run(checks[at]).passed for at in places) else "checks"

    return fail(killers.quick) or tests_fail(killers) or fail(killers.slow)


def work(slug: str, mutant: Mutant | None, what: Callable[[], object], pipe: multiprocessing.connection.Connection) -> None:
    """The fork: break the row, look who notices, say it."""
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    torch.set_num_threads(1)
    torch.set_num_threads = lambda count: None  # OpenMP's threads do not live through a fork: a second one would be waited for for ever
    try:
        if mutant is not None:
            module, path = source_of(slug)
            sys.meta_path.insert(0, Changed(module, path, compile(changed(path.read_text(), mutant), str(path), "exec")))
        pipe.send(what())
    except BaseException:  # a program that cannot even be imported is noticed by everybody
        pipe.send("checks")
    os._exit(0)


def in_fork(what: Callable[[], object], limit: float, slug: str = "", mutant: Mutant | None = None) -> tuple[Any, float]:
    """What a function gives in a fork, for `limit` seconds at most ("time" where that is too short), and the seconds it took."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=work, args=(slug, mutant, what, there))
    start = time.perf_counter()
    process.start()
    there.close()
    try:
        found = here.recv() if here.poll(limit) else "time"
    except EOFError:  # the fork died
        found = "checks"
    process.kill()
    process.join()
    return found, time.perf_counter() - start


def chosen(slugs: Sequence[str], sample: int | None, seed: int) -> Iterator[tuple[str, list[Mutant]]]:
    for slug in slugs:
        known = EQUIVALENT.get(slug, {})
        found = [mutant for mutant in mutants(source_of(slug)[1].read_text()) if mutant.key not in known]
        if sample is not None and sample < len(found):
            found = random.Random(f"{slug} {seed}").sample(found, sample)
        yield slug, sorted(found, key=lambda mutant: mutant.line)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("slugs", nargs="*", help="rows; none: every working row, in an order drawn by the seed")
    parser.add_argument("--sample", type=int, help="mutants a row (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="stop after so long")
    parser.add_argument("--score", type=float, default=0.0, help="exit with 1 if a smaller share is killed")
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    working = [record.slug for record in records() if record.status == "works"]
    unknown = set(options.slugs) - set(working)
    if unknown:
        parser.error(f"no working rows: {', '.join(sorted(unknown))}")
    slugs = options.slugs or random.Random(options.seed).sample(working, len(working))
    end = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    done: list[Outcome] = []
    failing: list[str] = []  # rows whose checks or tests fail as they are: nothing is learned of their mutants
    listed, _ = in_fork(all_tests, 600.0)
    for slug, some in chosen(slugs, options.sample, options.seed):
        if time.monotonic() > end:
            break
        found, seconds = in_fork(partial(unchanged, slug, listed), 600.0)
        if isinstance(found, str) or found[0]:
            print(f"{slug}: fails unchanged ({found if isinstance(found, str) else found[0]})", flush=True)
            failing.append(slug)
            continue
        killers, mine = found[1], []
        for mutant in some:
            if time.monotonic() > end:
                break
            who, took = in_fork(partial(killer, slug, killers), 3 * seconds + SLACK, slug, mutant)
            mine.append(Outcome(slug, mutant.line, mutant.key, who, took))
            if mine[-1].killer is None:
                print(f"  {slug}:{mine[-1].line}: survived: {mine[-1].key}", flush=True)
        killed = sum(one.killer is not None for one in mine)
        print(
            f"{slug}: {killed} of {len(mine)} killed, {len(EQUIVALENT.get(slug, {}))} equivalent, {seconds:.1f} s unchanged",
            flush=True,
        )
        done += mine
        if options.json:
            options.json.write_text(json.dumps([one.__dict__ for one in done], indent=1))
    score = sum(one.killer is not None for one in done) / max(len(done), 1)
    print(f"{len(done)} mutants, {100 * score:.0f}% killed")
    return int(bool(failing) or score < options.score)


if __name__ == "__main__":
    sys.exit(main())
