"""Stages of a conversion, as data: what learns, from which loss, for how long."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import RegardError

SCHEDULES = ("constant", "cosine", "plateau")
OPTIMIZERS = ("adam", "adamw", "sgd")
THRESHOLD = 1e-4  # a loss is a new lowest when it is lower by this share, as in PyTorch's plateau schedule
Lesson = tuple[tuple[Any, ...], dict[str, Any], Any]  # what a teacher was called with, and what it gave


@dataclass(frozen=True)
class Stage:
    """steps of an optimizer. learn: patterns of names of the model's parameters, as shells have them; all others are frozen.

    schedule: "constant"; "cosine", from lr to final_lr; or "plateau": times `factor` after `patience` windows of `every` steps whose mean loss
    was no new lowest, down to final_lr. accumulate: batches a step. clip: largest norm of gradients (None: any). betas, weight_decay: of Adam.
    """

    steps: int
    lr: float = 1e-3
    learn: tuple[str, ...] = ("*",)
    schedule: str = "constant"
    final_lr: float = 0.0
    every: int = 100
    patience: int = 10
    factor: float = 0.1
    optimizer: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float | None = None
    accumulate: int = 1

    def __post_init__(self) -> None:
        for name, value, known in (("schedule", self.schedule, SCHEDULES), ("optimizer", self.optimizer, OPTIMIZERS)):
            if value not in known:
                raise RegardError(f"{type(self).__name__}({name}={value!r}): expected one of {', '.join(known)}")
        if isinstance(self.learn, str) or not self.learn:
            raise RegardError(f"{type(self).__name__}(learn={self.learn!r}): expected a tuple of patterns of parameters' names")
        if min(self.steps, self.patience) < 0 or min(self.every, self.accumulate) < 1 or self.lr <= 0:
            raise RegardError(
                f"{type(self).__name__}: expected steps and patience of 0 or more, every and accumulate of 1 or more, lr above 0"
            )

    def rate(self, step: int, losses: Sequence[float]) -> float:
        """The learning rate of a step, losses being those of the steps before it."""
        if self.schedule == "cosine":
            return self.final_lr + (self.lr - self.final_lr) * (1 + math.cos(math.pi * step / self.steps)) / 2
        if self.schedule == "constant":
            return self.lr
        lowest, waited, rate = math.inf, 0, self.lr
        for at in range(0, step - step % self.every, self.every):
            now = sum(losses[at : at + self.every]) / self.every
            lowest, waited = (now, 0) if now < lowest * (1 - THRESHOLD) else (lowest, waited + 1)
            if waited > self.patience:
                rate, waited = max(rate * self.factor, self.final_lr), 0
        return rate

    @property
    def name(self) -> str:
        return type(self).__name__.lower()


def matched(student: Any, lesson: Lesson) -> Tensor:
    """Mean squared error between what the student and the teacher give."""
    args, kwargs, out = lesson
    return F.mse_loss(first(student(*args, **kwargs)), first(out))


def first(out: Any) -> Tensor:
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found


@dataclass(frozen=True)
class Transfer(Stage):
    """Each student alone learns its teacher's work, on what the teacher reads in the model as it was: the mean over students of
    scale * loss(student, (args, kwargs, output of the teacher))."""

    loss: Callable[[Any, Lesson], Tensor] = matched
    scale: float = 1.0


@dataclass(frozen=True)
class Tune(Stage):
    """The whole model learns from next tokens; loss(model, batch) in place of cross-entropy where it is given."""

    loss: Callable[[Any, Any], Tensor] | None = None


@dataclass(frozen=True)
class Lora(Tune):
    """`Tune` of low-rank updates B A alpha / rank beside the linear layers whose names end in `targets`, by peft; folded into their weights
    at the end, so that nothing of them stays. alpha None: peft's own, 8."""

    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    learn: tuple[str, ...] = ("*lora_*",)


@dataclass(frozen=True)
class Distil(Stage):
    """The whole model learns the logits of the model as it was: temperature^2 KL(teacher || student), mean over tokens; plus ce times
    cross-entropy with the next tokens."""

    temperature: float = 1.0
    ce: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise RegardError(f"Distil(temperature={self.temperature}): expected a number above 0")


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean cross-entropy of tokens 1.. of ids (B, L) under logits (B, L, vocab) of the tokens before; -100 is not counted."""
    return F.cross_entropy(wide(logits[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def distance(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """temperature^2 KL(teacher || student) of logits (..., vocab), mean over all but the last dimension."""
    p, q = ((wide(x) / temperature).log_softmax(-1).flatten(0, -2) for x in (teacher, student))
    return temperature**2 * F.kl_div(q, p, reduction="batchmean", log_target=True)


@torch.no_grad()
def bits_per_token(model: nn.Module, ids: Tensor) -> float:
    """Mean cross-entropy of texts ids (N, L) in bits, a text at a time."""
    losses = [next_token_loss(model(input_ids=row[None], use_cache=False).logits, row[None]).item() for row in ids]
    return sum(losses) / len(losses) / math.log(2)
