"""Carrying out a recipe: stage after stage, going on where an interrupted one stopped."""

from __future__ import annotations

import fnmatch
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MissingDependency, RegardError
from ..nn.images.timm_host import operators
from .checkpoint import Place, fingerprint, put, read, write
from .conversion import Batch, Conversion
from .stages import Distil, Lora, Stage, Transfer, Tune, distance, next_token_loss

Draw = Callable[[torch.Generator], Batch]
PRIME = 1_000_003
OPTIMIZERS: dict[str, Any] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


@dataclass
class Report:
    """losses: of every step, a list a stage. seconds: of every stage carried out in this call, 0 for those that were done before."""

    stages: tuple[str, ...]
    losses: list[list[float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def carry_out(
    conversion: Conversion,
    recipe: Sequence[Stage],
    draw: Draw,
    *,
    folder: str | Path | None = None,
    seed: int = 0,
    save_every: int = 100,
    progress: bool = False,
    watch: Callable[[int, Stage], None] | None = None,
) -> Report:
    """Carry out the stages of a recipe on a conversion's model, in order.

    draw(generator) gives a batch: token ids (B, L), or keyword arguments of the model with input_ids. It is called with a generator made from
    seed, stage and step, so that a run is the same every time, interrupted or not. folder: where the place is kept every save_every steps and
    behind every stage; a run with the same recipe, seed and model goes on from there, and a finished one is read at once. progress: a bar a
    stage. watch(number, stage) is called behind every stage carried out.

    Whatever is raised on the way (KeyboardInterrupt, too): the model is then what it was before the call, and the folder holds the place that
    was kept last. RegardError: patterns that name no parameter, a loss that is no number, a folder of another conversion.
    """
    stages = list(recipe)
    wrong = [type(stage).__name__ for stage in stages if not isinstance(stage, (Transfer, Tune, Distil))]
    if wrong or not stages or save_every < 1:
        raise RegardError(
            f"recipe has {', '.join(wrong) or 'no stages'}, save_every={save_every}; expected Transfer, Lora, Tune or Distil, and 1 or more"
        )
    return Run(conversion, stages, draw, None if folder is None else Path(folder), seed, save_every, watch).go(progress)


class Run:
    """One call of `carry_out`."""

    def __init__(self, conversion: Conversion, stages: list[Stage], draw: Draw, folder: Path | None, seed: int, every: int, watch: Any):
        self.conversion, self.model, self.stages, self.draw = conversion, conversion.model, stages, draw
        self.folder, self.seed, self.every, self.watch = folder, seed, every, watch
        self.place = Place()
        self.teacher: nn.Module | None = None
        self.report = Report(tuple(stage.name for stage in stages))

    def go(self, progress: bool) -> Report:
        with self.conversion.taught():
            mark = fingerprint(self.stages, self.seed, self.model) if self.folder is not None else ""
        self.place = (None if self.folder is None else read(self.folder, mark)) or Place()
        if any(isinstance(stage, Distil) for stage in self.stages[self.place.stage :]):
            self.teacher = self.conversion.teacher()
        with kept_whole(self.model), bars(progress) as show, torch.random.fork_rng():
            put(self.own(), self.model.named_parameters())
            for number in range(self.place.stage, len(self.stages)):
                begin = time.perf_counter()
                self.stage(number, mark, show)
                self.report.seconds.append(time.perf_counter() - begin)
                if self.watch is not None:
                    with kept_modes(self.model):
                        self.watch(number, self.stages[number])
        self.report.losses = self.place.losses
        self.report.seconds = [0.0] * (len(self.stages) - len(self.report.seconds)) + self.report.seconds
        return self.report

    def stage(self, number: int, mark: str, show: Callable[[str, int, int, float], None]) -> None:
        stage, place = self.stages[number], self.place
        self.seeded(number, -1)
        own = self.own()
        with adapters(self.model, stage) if isinstance(stage, Lora) else nullcontext():
            if place.step:  # the rest: what adapters have learned so far
                put({name: x for name, x in place.weights.items() if name not in own}, self.model.named_parameters())
            learned = chosen(self.model, stage)
            optimizer = optimizer_of(stage, learned)
            restore_moments(optimizer, learned, place.moments)
            if len(place.losses) <= number:
                place.losses.append([])
            losses = place.losses[number]
            for step in range(place.step, stage.steps):
                self.step(number, stage, step, optimizer, learned, losses)
                place.step = step + 1
                show(f"{number + 1}. {stage.name}", step + 1, stage.steps, losses[-1])
                if self.folder is not None and place.step < stage.steps and place.step % self.every == 0:
                    place.weights |= {name: p.detach().clone() for name, p in learned.items()}
                    write(self.folder, replaced(place, moments_of(optimizer, learned)), mark)
            changed = set(learned)
        if isinstance(stage, Lora):
            changed = {f"{name}.weight" for name in lora_targets(self.model, stage)}
        names = dict(self.model.named_parameters())
        place.weights = self.own() | {name: names[name].detach().clone() for name in changed}
        place.stage, place.step, place.moments = number + 1, 0, {}
        if self.folder is not None:
            write(self.folder, place, mark)

    def own(self) -> dict[str, Tensor]:
        """Of the weights that changed, those of the model as it is built now."""
        names = {name for name, _ in self.model.named_parameters()}
        return {name: x for name, x in self.place.weights.items() if name in names}

    def seeded(self, number: int, step: int, micro: int = 0) -> torch.Generator:
        """A generator of a step's own; torch's own is seeded too, for dropout and first values."""
        own = (((self.seed * PRIME + number) * PRIME + step + 1) * 1009 + micro) % 2**62
        torch.manual_seed(own)
        return torch.Generator().manual_seed(own)

    def step(
        self, number: int, stage: Stage, step: int, optimizer: torch.optim.Optimizer, learned: dict[str, nn.Parameter], losses: list[float]
    ) -> None:
        for group in optimizer.param_groups:
            group["lr"] = stage.rate(step, losses)
        optimizer.zero_grad()
        total = 0.0
        for micro in range(stage.accumulate):
            generator = self.seeded(number, step, micro)
            batch = moved(self.draw(generator), next(iter(learned.values())).device)
            total += self.backward(stage, batch)
        if not math.isfinite(total):
            raise RegardError(
                f"stage {number + 1} ({stage.name}): the loss of step {step + 1} is {total}; expected a lower lr, or clip=..."
            )
        if stage.clip is not None:
            nn.utils.clip_grad_norm_(learned.values(), stage.clip)
        optimizer.step()
        losses.append(total)

    def backward(self, stage: Stage, batch: Batch) -> float:
        """Gradients of one batch, and its loss."""
        if isinstance(stage, Transfer):
            self.model.eval()
            lessons = self.conversion.lessons(batch)
            total = 0.0
            for name, student in self.conversion.students.items():
                student.train()
                with torch.enable_grad():
                    loss = stage.loss(student, lessons[name]) * stage.scale / (len(lessons) * stage.accumulate)
                if loss.requires_grad:
                    loss.backward()
                total += loss.item()
            return total
        self.model.train()
        loss = self.whole(stage, batch) / stage.accumulate
        loss.backward()
        return loss.item()

    def whole(self, stage: Stage, batch: Batch) -> Tensor:
        if isinstance(stage, Tune) and stage.loss is not None:
            return stage.loss(self.model, batch)
        logits = self.conversion.read(batch).logits
        ids: Tensor = batch if isinstance(batch, Tensor) else batch["labels" if "labels" in batch else "input_ids"]
        if isinstance(stage, Tune):
            return next_token_loss(logits, ids)
        assert isinstance(stage, Distil) and self.teacher is not None
        with torch.no_grad():
            given = {"input_ids": batch} if isinstance(batch, Tensor) else batch
            truth = self.teacher(**{"use_cache": False, **given}).logits
        loss = distance(logits, truth, stage.temperature)
        return loss + stage.ce * next_token_loss(logits, ids) if stage.ce else loss


def replaced(place: Place, moments: dict[str, Tensor]) -> Place:
    return Place(place.stage, place.step, place.losses, place.weights, moments)


def moved(batch: Batch, device: torch.device) -> Batch:
    if isinstance(batch, Tensor):
        return batch.to(device)
    return {key: x.to(device) if isinstance(x, Tensor) else x for key, x in batch.items()}


def chosen(model: nn.Module, stage: Stage) -> dict[str, nn.Parameter]:
    """The parameters that a stage learns, by name; all others are frozen."""
    found = {}
    for name, p in model.named_parameters():
        p.requires_grad_(any(fnmatch.fnmatchcase(name, pattern) for pattern in stage.learn))
        if p.requires_grad:
            found[name] = p
    if not found:
        raise RegardError(f"{type(stage).__name__}(learn={stage.learn}) names none of the model's parameters")
    return found


def optimizer_of(stage: Stage, learned: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    options: dict[str, Any] = {} if stage.optimizer == "sgd" else {"betas": stage.betas}
    made: torch.optim.Optimizer = OPTIMIZERS[stage.optimizer](learned.values(), lr=stage.lr, weight_decay=stage.weight_decay, **options)
    return made


def moments_of(optimizer: torch.optim.Optimizer, learned: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {f"{name}/{key}": x for name, p in learned.items() for key, x in optimizer.state.get(p, {}).items() if isinstance(x, Tensor)}


def restore_moments(optimizer: torch.optim.Optimizer, learned: dict[str, nn.Parameter], moments: dict[str, Tensor]) -> None:
    for key, x in moments.items():
        name, _, what = key.rpartition("/")
        p = learned[name]
        optimizer.state[p][what] = x.clone() if what == "step" else x.to(p)


def lora_targets(model: nn.Module, stage: Lora) -> list[str]:
    """Names of the linear layers that a stage puts updates beside."""
    ends = tuple(f".{target}" for target in stage.targets)
    found = [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and f".{name}".endswith(ends)]
    if not found:
        raise RegardError(f"Lora(targets={stage.targets}) names no linear layer of {type(model).__name__}")
    return found


@contextmanager
def adapters(model: nn.Module, stage: Lora) -> Iterator[None]:
    """peft's layers beside a model's own; folded at the end, taken off where something was raised."""
    names = lora_targets(model, stage)
    operators()
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as missing:
        raise MissingDependency("Lora needs peft: pip install 'regard[lora]'") from missing
    options: dict[str, Any] = {} if stage.alpha is None else {"lora_alpha": stage.alpha}
    had = hasattr(model, "peft_config")
    inject_adapter_in_model(LoraConfig(r=stage.rank, lora_dropout=stage.dropout, target_modules=names, **options), model)
    whole = False
    try:
        yield
        whole = True
    finally:
        for name in names:
            layer: Any = model.get_submodule(name)
            if whole:
                layer.merge(safe_merge=True)
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, layer.get_base_layer())
        if not had:
            del model.peft_config


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; behind it every part's mode is as it was."""
    modes = {part: part.training for part in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


@contextmanager
def kept_whole(model: nn.Module) -> Iterator[None]:
    """Modes and frozen parameters are put back at the end, and where something was raised every value too."""
    modes = {part: part.training for part in model.modules()}
    parameters = list(model.parameters())
    flags, values = [p.requires_grad for p in parameters], [p.detach().clone() for p in parameters]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for p, value in zip(parameters, values, strict=True):
                p.copy_(value)
        raise
    finally:
        for p, flag in zip(parameters, flags, strict=True):
            p.requires_grad_(flag)
            p.grad = None
        for part, mode in modes.items():
            part.training = mode


@contextmanager
def bars(wanted: bool) -> Iterator[Callable[[str, int, int, float], None]]:
    """show(stage, step, steps, loss), on a bar a stage if that is wanted."""
    if not wanted:
        yield lambda *_: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.4g}"),
    )
    with Progress(*columns) as shown:
        tasks: dict[str, Any] = {}

        def show(name: str, step: int, steps: int, loss: float) -> None:
            if name not in tasks:
                tasks[name] = shown.add_task(name, total=steps, loss=loss)
            shown.update(tasks[name], completed=step, loss=loss)

        yield show
