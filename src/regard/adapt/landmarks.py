"""A pretrained decoder with rotary positions that reads blocks through landmark tokens (Mohtashami and Jaggi, 2023): conversion, recipe, generation.

conversion = convert_landmark(model, block=63)          # a new token, conversion.model.config.landmark_token_id, and every attention layer
carry_out(conversion, [landmark_tuning(1000)], lambda draw: with_landmarks(texts(draw), 63, landmark))
model.generate(with_landmarks(prompt, 63, landmark), logits_processor=[LandmarkTokens(63, landmark)])
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import RegardError
from ..nn.landmarks import grouped_softmax
from .conversion import Conversion, convert
from .stages import Tune
from .student import Student, Tokens

State = tuple[Tensor, Tensor]  # turned keys and values of all tokens so far


class LandmarkStudent(Student):
    """Every block + 1-st token of a text is a landmark. top_blocks: past blocks that a query reads, those whose landmarks it scores highest, for each
    head (None: all). Keys keep the positions of the text with its landmarks."""

    def __init__(self, layer: nn.Module, block: int, top_blocks: int | None = None):
        super().__init__(layer)
        self.block, self.top_blocks = block, top_blocks

    def mix(self, tokens: Tokens, state: State | None) -> tuple[Tensor, State]:
        if tokens.keep is not None and not bool(tokens.keep.all()):
            raise RegardError(
                "a padded text with a cache: blocks are counted from its first token; expected rows of one length, or use_cache=False"
            )
        k, v = tokens.turned_k, tokens.v
        if state is not None:
            k, v = torch.cat((state[0], k), 2), torch.cat((state[1], v), 2)
        keys, values, first = tokens.repeated(k), tokens.repeated(v), k.shape[2] - tokens.q.shape[2]
        rows = []
        for start in range(0, tokens.q.shape[2], 512):  # rows of the matrix a piece at a time; what later rows see is cut off
            q = tokens.turned_q[:, :, start : start + 512]
            at, stop = first + start, first + start + q.shape[2]
            s = q @ keys[:, :, :stop].mT * self.scaling
            w = grouped_softmax(s.to(torch.promote_types(s.dtype, torch.float32)), self.block, at, self.best(s, at))
            rows.append(w.to(v.dtype) @ values[:, :, :stop])
        return torch.cat(rows, 2), (k, v)

    def best(self, s: Tensor, first: int) -> Tensor | None:
        """(B, H, n, blocks) bool: which past blocks are read."""
        size, count = self.block + 1, -(-s.shape[-1] // (self.block + 1))
        if self.top_blocks is None or count <= self.top_blocks:
            return None
        marks = F.pad(s, (0, count * size - s.shape[-1]), value=-torch.inf)[..., self.block :: size]
        own = torch.arange(first, first + s.shape[2], device=s.device)[:, None] // size
        marks = marks.masked_fill(torch.arange(count, device=s.device) >= own, -torch.inf)
        return torch.zeros_like(marks, dtype=torch.bool).scatter_(-1, marks.topk(self.top_blocks, -1).indices, True)


def convert_landmark(model: nn.Module, block: int = 63, top_blocks: int | None = None, layers: Iterable[int] | None = None) -> Conversion:
    """A transformers decoder with rotary positions with landmarks in its attention layers (layers: which, None: all), and a token more, the landmark:
    `model.config.landmark_token_id`, its embedding the mean of the others'. `restore()` gives the layers back; the token stays."""
    if block < 1 or (top_blocks is not None and top_blocks < 1):
        raise RegardError(f"block={block}, top_blocks={top_blocks}; expected at least 1")
    conversion = convert(model, lambda layer: LandmarkStudent(layer, block, top_blocks), layers=layers)
    host: Any = model
    if getattr(host.config, "landmark_token_id", None) is None:
        count = host.get_input_embeddings().weight.shape[0]
        host.resize_token_embeddings(count + 1, mean_resizing=False)
        with torch.no_grad():
            for table in {id(x.weight): x.weight for x in (host.get_input_embeddings(), host.get_output_embeddings())}.values():
                table[count] = table[:count].mean(0)
        host.config.landmark_token_id = count
    return conversion


def landmark_loss(model: Any, ids: Tensor) -> Tensor:
    """Cross-entropy of next tokens, mean over those that are no landmarks."""
    logits, wanted = model(input_ids=ids, use_cache=False).logits[:, :-1], ids[:, 1:]
    wanted = wanted.masked_fill(wanted == model.config.landmark_token_id, -100)
    return F.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten())


def landmark_tuning(steps: int, lr: float = 2e-5, **options: Any) -> Tune:
    """The stage that trains the whole model on texts with landmarks (`regard.nn.landmarks.with_landmarks`). options: of `Tune`."""
    return Tune(steps, lr, loss=landmark_loss, **options)


class LandmarkTokens:
    """A logits processor of transformers: the landmark at every block + 1-st place, and nowhere else."""

    def __init__(self, block: int, landmark: int):
        self.block, self.landmark = block, landmark

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        here = torch.arange(scores.shape[-1], device=scores.device) == self.landmark
        due = input_ids.shape[1] % (self.block + 1) == self.block
        return scores.masked_fill(~here if due else here, -torch.inf)
