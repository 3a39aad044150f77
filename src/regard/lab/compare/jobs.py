"""The runs of a comparison as tasks: here one after another, or several at once through joblib, with the same numbers either way."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import MissingDependency, RegardError
from ...tasks import Corpus, python_text, read_text
from .train import Lesson, seconds_per_step, train


@dataclass(frozen=True)
class Job:
    """A model to train: `steps` of a task by one mechanism with one seed; steps 0: only find out how long a step takes."""

    task: str
    spec: str
    seed: int
    steps: int


Work = Callable[[Any, Job], dict[str, Any]]  # (config, job) -> its result; a function of a module, which processes can find


@functools.lru_cache(2)
def corpus_of(text: Path | None, needed: int) -> Corpus:
    """Each process reads the text once."""
    return python_text() if text is None else read_text(text, needed)


def text_work(config: Any, job: Job, shared: Callable[[Lesson], Lesson] = lambda own: own) -> dict[str, Any]:
    """A job on text or on sequences."""
    corpus = corpus_of(config.text, config.needed_bytes)
    if not job.steps:
        return {"seconds": seconds_per_step(config, job.task, job.spec, corpus, shared)}
    return train(config, job.task, job.spec, job.seed, job.steps, corpus, shared)


def run(config: Any, job: Job, threads: int, work: Work = text_work) -> tuple[Job, dict[str, Any]]:
    """A job's result. One that raises leaves the others alone: its result says what happened."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return job, work(config, job)
    except RegardError:
        raise
    except Exception as why:  # what a mechanism of the user's may do
        return job, {"error": f"{type(why).__name__}: {why}"}
    finally:
        torch.set_num_threads(before)


def workers_of(config: Any) -> int:
    """How many jobs run at once. One thread each is what small models use best, so as many as there are cores."""
    if config.parallel is not None:
        return config.parallel
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 16) if importable() else 1


def importable() -> bool:
    from importlib.util import find_spec

    return find_spec("joblib") is not None


def results(config: Any, jobs: list[Job], work: Work = text_work) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Results as they come. The numbers do not depend on how many run at once: each job has its own seed and one thread."""
    count = workers_of(config)
    if count == 1 and config.backend == "loky":
        for job in jobs:
            yield run(config, job, 1, work)
        return
    pool = pool_of(config, count, work)
    left = list(jobs)
    try:
        for job, found in pool(list(left)):
            left.remove(job)
            yield job, found
    except BrokenExecutor:  # a process died, and took the pool with it: the jobs that are left, each in a process of its own
        for job in left:
            try:
                yield from pool([job])
            except BrokenExecutor:
                yield job, {"error": "its process died"}


def pool_of(config: Any, count: int, work: Work = text_work) -> Callable[[list[Job]], Iterator[tuple[Job, dict[str, Any]]]]:
    """Jobs -> results as they come, by joblib."""
    try:
        from joblib import Parallel, delayed, parallel_config
    except ImportError as missing:
        raise MissingDependency(f"--parallel {count} needs joblib: pip install 'regard[report]'") from missing
    if config.backend == "ray":
        try:
            from ray.util.joblib import register_ray
        except ImportError as missing:
            raise MissingDependency("--backend ray needs ray: pip install ray") from missing
        register_ray()

    def pool(jobs: list[Job]) -> Iterator[tuple[Job, dict[str, Any]]]:
        with parallel_config(config.backend, n_jobs=max(2, count)):
            yield from Parallel(return_as="generator_unordered" if config.backend == "loky" else "generator")(
                delayed(run)(config, job, 1, work) for job in jobs
            )

    return pool
