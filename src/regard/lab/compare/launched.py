"""A comparison whose models are trained data-parallel by the processes of torchrun: the first one decides and writes, the others follow.

torchrun --nproc-per-node 2 -m regard.lab.compare.launched CONFIG.json
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from ...errors import RegardError
from .config import Config
from .jobs import Job, corpus_of, text_work
from .run import compare
from .train import COUNT, Lesson


def launch(config: Config, processes: int, resume: bool, sharded: bool = False) -> int:
    """Start torchrun on this machine and wait for it; returns its exit status. sharded: FSDP2 in place of DDP."""
    if not 1 <= processes <= 64:
        raise RegardError(f"--processes {processes}: expected between 1 and 64")
    for name, count in (("--batch", config.batch), ("the synthetic tasks' batch", COUNT)):
        if count % processes:
            raise RegardError(f"{name} of {count} sequences cannot be shared equally by --processes {processes}; expected a divisor")
    corpus_of(config.text, config.needed_bytes)  # what is wrong with the text or the folder is said once, here
    config.prepare_out()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps({**config.as_dict(), "resume": resume, "sharded": sharded}), encoding="utf-8")
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", __name__, str(path)]
        return subprocess.run([sys.executable, *command], check=False).returncode


def read(path: Path) -> tuple[Config, bool, bool]:
    told = json.loads(path.read_text(encoding="utf-8"))
    resume, sharded = told.pop("resume"), told.pop("sharded")
    kept: dict[str, Any] = {one.name: told[one.name] for one in fields(Config)}
    kept |= {"mechanisms": tuple(kept["mechanisms"]), "lengths": tuple(kept["lengths"]), "out": Path(kept["out"]), "parallel": 1}
    return Config(**{**kept, "text": kept["text"] and Path(kept["text"])}), resume, sharded


class Share:
    """This process's part: every process draws the whole batch of a step and reads every world-th sequence of it, so that the mean of
    their gradients is the gradient of the whole batch. sharded: each process holds a share of every parameter, gradient and state of the
    optimizer (FSDP2), not a copy (DDP)."""

    def __init__(self, rank: int, world: int, device: torch.device, sharded: bool = False):
        self.rank, self.world, self.device, self.sharded = rank, world, device, sharded

    def __call__(self, own: Lesson) -> Lesson:
        own.model.to(self.device)

        def batch(step: int) -> tuple[Tensor, ...]:
            return tuple(x[self.rank :: self.world] for x in own.batch(step))

        if self.sharded:
            self.shard(own.model)
            return Lesson(own.model, batch, own.loss, gather)
        ids = [self.device.index] if self.device.type == "cuda" else None
        return Lesson(DistributedDataParallel(own.model, device_ids=ids, find_unused_parameters=True), batch, own.loss)

    def shard(self, model: nn.Module) -> None:
        """Makes each block, and what is left of the model, a unit of FSDP2."""
        mesh = init_device_mesh(self.device.type, (self.world,))
        for block in model.blocks:  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)


def gather(model: nn.Module) -> None:
    """All parameters in every process, for good: a trained model is measured by calls of its parts too, which FSDP2 does not see."""
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.set_reshard_after_forward(False)
            unit.unshard()


def together(config: Config, share: Share, job: Job | None) -> dict[str, Any]:
    """One job, or the end, told to all processes by the first and done by all."""
    box: list[Any] = [job]
    dist.broadcast_object_list(box, src=0)
    return text_work(config, box[0], share) if box[0] is not None else {}


def follow(config: Config, share: Share) -> None:
    """What the processes behind the first one do: its jobs, until there are no more."""
    box: list[Any] = [None]
    while True:
        dist.broadcast_object_list(box, src=0)
        if box[0] is None:
            return
        with contextlib.suppress(Exception):  # the first process meets the same one, and reports it
            text_work(config, box[0], share)


def main(path: Path) -> None:
    """What torchrun runs in every process."""
    config, resume, sharded = read(path)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        share = Share(dist.get_rank(), dist.get_world_size(), device, sharded)
        if share.rank:
            return follow(config, share)
        try:
            compare(config, resume, learn=lambda config, job: together(config, share, job))
        finally:
            together(config, share, None)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # FSDP2 keeps gloo's threads beyond destroy_process_group; one of them that meets the end of the interpreter aborts the process, and
    # torchrun then stops the others while they write.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
