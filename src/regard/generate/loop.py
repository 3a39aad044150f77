"""The loop of all drafting strategies: draft a tree, verify it in one masked pass, accept, keep the accepted rows of the cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RegardError
from .accept import Acceptance, Greedy, Sampled
from .host import Host
from .state import State, Strategy
from .strategies import made
from .tree import Draft


@dataclass
class Generation:
    """tokens (B, L + new) with the prompt, padded after an end; counts: tokens that each step added, a tensor (B,) a step (0: the row
    had ended); seconds of wall time."""

    tokens: Tensor
    counts: list[Tensor] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def steps(self) -> int:
        return len(self.counts)

    @property
    def tokens_per_step(self) -> float:
        """Mean over the steps of every row that had not ended."""
        every = torch.stack(self.counts) if self.counts else torch.zeros(1, 1)
        return float(every.sum() / (every > 0).sum().clamp_min(1))


def ends_of(model: Any, ends: int | Iterable[int] | None) -> list[int]:
    if ends is None:
        config = getattr(model, "generation_config", None) or model.config
        ends = config.eos_token_id
    return [] if ends is None else [int(ends)] if isinstance(ends, int) else [int(end) for end in ends]


def checked(model: nn.Module, ids: Tensor, attention_mask: Tensor | None, count: int) -> Tensor:
    """The tokens that are no padding, (B, L) bool."""
    if ids.dim() != 2 or ids.numel() == 0 or ids.is_floating_point():
        raise RegardError(f"ids {tuple(ids.shape)} {ids.dtype}: expected token numbers (B, L) with L >= 1")
    vocab = model.get_input_embeddings().num_embeddings  # type: ignore[operator, union-attr]
    if int(ids.min()) < 0 or int(ids.max()) >= vocab:
        raise RegardError(f"ids from {int(ids.min())} to {int(ids.max())}: expected numbers from 0 to {vocab - 1}")
    if count < 1:
        raise RegardError(f"max_new_tokens={count}: expected at least 1")
    valid = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.to(ids.device, torch.bool)
    if valid.shape != ids.shape or not bool(valid[:, -1].all()):
        raise RegardError(
            f"attention_mask {tuple(valid.shape)}: expected (B, L) as ids, with padding on the left: the last column all ones"
        )
    return valid


@torch.no_grad()
def generate(
    model: nn.Module,
    ids: Tensor,
    strategy: str | Strategy = "prompt-lookup",
    *,
    max_new_tokens: int = 128,
    attention_mask: Tensor | None = None,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    accept: Acceptance | None = None,
    ends: int | Iterable[int] | None = None,
    stream: Callable[[int, list[int]], None] | None = None,
) -> Generation:
    """Continue prompts ids (B, L) by up to `max_new_tokens`, several tokens a pass, with a transformers decoder.

    With temperature 0 the tokens are those of `model.generate(ids, do_sample=False)`, with a positive one their distribution is that of
    sampling from softmax(logits / temperature), whatever the strategy guesses. accept: another rule, such as `Typical()`.
    attention_mask (B, L): padding on the left. ends: tokens that end a row (None: the model's; (): none). stream(row, tokens) is called
    with new tokens as they come. RegardError: a model without a cache of keys, or bad arguments.
    """
    began, host = time.perf_counter(), Host(model)
    valid = checked(model, ids, attention_mask, max_new_tokens)
    if temperature < 0 or (accept is not None and temperature):
        raise RegardError(f"temperature={temperature}, accept={accept}: expected a temperature of 0 or more, or a rule that has its own")
    rule = accept or (Greedy() if temperature == 0 else Sampled(temperature, generator))
    how, over = made(strategy), set(ends_of(model, ends))
    seen = host.read(ids[:, :-1], valid[:, :-1])
    texts = [row[keep].tolist() for row, keep in zip(ids, valid, strict=True)]
    state = State(host, ids[:, -1].clone(), texts, None if seen is None else seen.hidden[:, -1])
    new: list[list[int]] = [[] for _ in texts]
    done, counts = [False] * len(texts), []
    how.begin(state)
    while not all(done):
        draft = checked_draft(how.draft(state), state.root)
        with how.watch(state, draft):
            seen = host.verify(draft)
        node, after = rule(draft, seen.logits[:, : draft.tokens.shape[1]])
        path, count = draft.path_to(node)
        host.keep(path, count)
        state.root, state.hidden = after, seen.hidden[torch.arange(len(node), device=node.device), node]
        fresh = torch.cat((draft.tokens.gather(1, path), after[:, None]), 1).tolist()
        added = []
        for row, size in enumerate(count.tolist()):
            tokens = [*fresh[row][1:size], fresh[row][-1]]
            state.texts[row] += tokens
            kept = [] if done[row] else upto(tokens, over, max_new_tokens - len(new[row]))
            new[row] += kept
            done[row] = done[row] or len(new[row]) == max_new_tokens or bool(kept and kept[-1] in over)
            added.append(len(kept))
            if stream is not None and kept:
                stream(row, kept)
        counts.append(torch.tensor(added))
        if not all(done):
            how.learn(state, draft, seen, path, count)
    return Generation(joined(ids, new, padding(model, over)), counts, time.perf_counter() - began)


def checked_draft(draft: Draft, root: Tensor) -> Draft:
    if draft.tokens.dim() != 2 or len(draft.tokens) != len(root) or not torch.equal(draft.tokens[:, 0], root):
        raise RegardError(f"the strategy drafted {tuple(draft.tokens.shape)}; expected tokens (B, n) that begin with the root of each row")
    return draft


def upto(tokens: list[int], over: set[int], room: int) -> list[int]:
    """The tokens up to the first that ends, and no more than there is room for."""
    stop = next((at + 1 for at, token in enumerate(tokens) if token in over), len(tokens))
    return tokens[: min(stop, room)]


def padding(model: Any, over: set[int]) -> int:
    found = getattr(getattr(model, "generation_config", None), "pad_token_id", None)
    return int(found) if found is not None else min(over, default=0)


def joined(ids: Tensor, new: list[list[int]], pad: int) -> Tensor:
    longest = max(map(len, new))
    tail = torch.tensor([row + [pad] * (longest - len(row)) for row in new], dtype=ids.dtype, device=ids.device)
    return torch.cat((ids, tail), 1)
