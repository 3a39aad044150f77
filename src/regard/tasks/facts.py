"""Facts stated in several ways, and questions for them: what a model is told, and what it has made of it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import RegardError


class Facts:
    """A corpus: every subject's answer, and which `multiplicity` of the `paraphrases` state it. Tokens: subjects, paraphrases, the question,
    fillers, answers, in this order. answer (S,) and phrases (S, M) are drawn with `seed`, or given."""

    def __init__(
        self,
        subjects: int = 64,
        answers: int = 16,
        paraphrases: int = 24,
        fillers: int = 8,
        multiplicity: int = 4,
        *,
        seed: int = 0,
        answer: Tensor | None = None,
        phrases: Tensor | None = None,
    ):
        if min(subjects, answers, fillers, multiplicity) < 1 or multiplicity > paraphrases:
            raise RegardError(
                f"subjects={subjects}, answers={answers}, fillers={fillers}, multiplicity={multiplicity}, paraphrases={paraphrases}; expected "
                "positive numbers, and no more of multiplicity than paraphrases"
            )
        g = torch.Generator().manual_seed(seed)
        drawn = (
            torch.randint(answers, (subjects,), generator=g),
            torch.rand(subjects, paraphrases, generator=g).argsort(1)[:, :multiplicity],
        )
        self.answer, self.phrases = drawn[0] if answer is None else answer, drawn[1] if phrases is None else phrases
        for name, x, most, shape in (("answer", self.answer, answers, (subjects,)), ("phrases", self.phrases, paraphrases, drawn[1].shape)):
            if tuple(x.shape) != tuple(shape) or x.dtype != torch.long or not bool(((x >= 0) & (x < most)).all()):
                raise RegardError(
                    f"{name} {tuple(x.shape)} of {x.dtype}; expected {tuple(shape)} of torch.int64, each from 0 to {most - 1}"
                )
        self.subjects, self.question, self.fillers = subjects, subjects + paraphrases, fillers
        self.first_answer = self.question + 1 + fillers
        self.vocab = self.first_answer + answers
        self.order = torch.randperm(subjects, generator=g)  # the first of these are those that are asked about in fine-tuning

    def sequences(self, subject: Tensor, relation: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """subject, relation (B,) -> ids (B, 4) [filler, subject, filler, relation] and the answer's token (B,)."""
        f = self.question + 1 + torch.randint(self.fillers, (2, len(subject)), generator=generator)
        return torch.stack((f[0], subject, f[1], relation), 1), self.first_answer + self.answer[subject]

    def statements(self, count: int, generator: torch.Generator, leak: float = 0.0) -> tuple[Tensor, Tensor]:
        """`count` statements about subjects drawn evenly; leak: the probability that one is a question instead."""
        subject = torch.randint(self.subjects, (count,), generator=generator)
        phrase = torch.randint(self.phrases.shape[1], (count,), generator=generator)
        relation = self.subjects + self.phrases[subject, phrase]
        asked = torch.rand(count, generator=generator) < leak
        return self.sequences(subject, torch.where(asked, self.question, relation), generator)

    def questions(self, subject: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return self.sequences(subject, torch.full_like(subject, self.question), generator)
