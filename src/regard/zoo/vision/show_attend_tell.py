"""Show, attend and tell: a caption's every word looks at the image anew (id 76; Xu et al., 2015).

e_ti = w . tanh(W a_i + U h_{t-1} + b), p_t = softmax(e_t);  z_t = sum_i p_ti a_i, or a_s with s ~ p_t;  h_t = LSTM(E y_{t-1}, h_{t-1}, z_t)
p(y_t) = softmax(L_o tanh(E y_{t-1} + L_h h_t + L_z z_t));  h_0 = tanh(W_h mean_i a_i), c_0 = tanh(W_c mean_i a_i)
Soft: -log p(y) + lambda sum_i (1 - sum_t p_ti)^2. Hard: samples of d log p(y|s) + r (log p(y|s) - b) d log p(s) + e dH[p]
Not built: the released code's LSTM over annotations and its stacks of LSTMs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.generate.beams import Beam, beam_search
from regard.nn.additive import AdditiveAttention, HardAttention, first_values
from regard.nn.parts import takes, whole


class Told(NamedTuple):
    """logits (B, T, vocab). weights (B, T, L) and their logarithms. picks (B, T): places read, None where expectations were."""

    logits: Tensor
    weights: Tensor
    log_weights: Tensor
    picks: Tensor | None


class Step(NamedTuple):
    hidden: Tensor
    memory: Tensor


@register("show-attend-tell", kind="module")
class CaptionDecoder(nn.Module):
    """annotations (B, L, features), words (B, T) -> Told: logits of every word from those before it (before the first: a zero embedding).

    attention: "soft" or "hard". In training, hard attention reads expectations instead of samples in one call of (1 - sampled); in evaluation it reads
    as `reads` says. deep_attention, deep_start, deep_readout: numbers of layers of these nets. selector: a gate on contexts. read_word, read_context:
    whether E y_{t-1} and z_t reach the readout (the paper's; the released code has both off). scale: of attention's logits. dropout (0.5 where the
    released code has it): of the start's hidden layers, of h_t and of the readout's hidden layers; gate_dropout: of the LSTM's three gates before the
    sigmoid. Neither is rescaled in training: evaluation multiplies by one minus it.
    """

    def __init__(
        self,
        vocab: int,
        features: int = 512,
        hidden: int = 1000,
        embed: int = 100,
        attention: str = "soft",
        sampled: float = 0.5,
        reads: str = "expectation",
        deep_attention: int = 1,
        deep_start: int = 1,
        deep_readout: int = 1,
        selector: bool = False,
        read_word: bool = True,
        read_context: bool = True,
        scale: float = 1.0,
        dropout: float = 0.0,
        gate_dropout: float = 0.0,
        std: float = 0.01,
    ):
        super().__init__()
        if attention not in ("soft", "hard") or min(deep_start, deep_readout) < 1 or not 0 <= sampled <= 1:
            raise RegardError(
                f"attention={attention!r}, deep_start={deep_start}, deep_readout={deep_readout}, sampled={sampled}; "
                "expected 'soft' or 'hard', at least one layer each, a probability"
            )
        self.vocab, self.features, self.sampled, self.dropout, self.gate_dropout = vocab, features, sampled, dropout, gate_dropout
        common = (features, hidden, deep_attention, selector, scale, std)
        self.attention = AdditiveAttention(*common) if attention == "soft" else HardAttention(*common, reads)
        self.read_word = read_word
        self.words, self.feed = nn.Embedding(vocab, embed), nn.Linear(embed, 4 * hidden)
        self.recur, self.see = nn.Linear(hidden, 4 * hidden, bias=False), nn.Linear(features, 4 * hidden, bias=False)
        self.start_deep = nn.ModuleList(nn.Linear(features, features) for _ in range(deep_start - 1))
        self.start_hidden, self.start_memory = nn.Linear(features, hidden), nn.Linear(features, hidden)
        self.tell = nn.Linear(hidden, embed)
        self.tell_context = nn.Linear(features, embed) if read_context else None
        self.tell_deep, self.out = nn.ModuleList(nn.Linear(embed, embed) for _ in range(deep_readout - 1)), nn.Linear(embed, vocab)
        for layer in (*self.children(), *self.start_deep, *self.tell_deep):
            if isinstance(layer, (nn.Linear, nn.Embedding)):
                first_values(layer, std, 4 if layer in (self.feed, self.recur) else 1)

    def thinned(self, x: Tensor, rate: float) -> Tensor:
        return F.dropout(x, rate, self.training) * (1 - rate) if rate else x

    @whole
    def start(self, annotations: Tensor) -> Step:
        mean = annotations.mean(1)
        for layer in self.start_deep:
            mean = self.thinned(torch.relu(layer(mean)), self.dropout)
        return Step(torch.tanh(self.start_hidden(mean)), torch.tanh(self.start_memory(mean)))

    @whole
    def step(
        self,
        word: Tensor | None,
        state: Step,
        annotations: Tensor,
        keys: Tensor | None = None,
        pick: Tensor | None = None,
        expected: bool = False,
    ) -> tuple[Tensor, Step, Tensor, Tensor | None]:
        """One word (B,), None before the first -> (logits of the next, state, log weights, place read). keys, pick, expected: attention's."""
        e = self.feed.weight.new_zeros(len(annotations), self.words.embedding_dim) if word is None else self.words(word)
        context, log_weights, pick = self.attention(state.hidden, annotations, keys, pick, expected)
        gates = self.feed(e) + self.recur(state.hidden) + self.see(context)
        sizes = (3 * state.hidden.shape[1], state.hidden.shape[1])
        squashed, new = gates.split(sizes, -1)
        enter, forget, leave = torch.sigmoid(self.thinned(squashed, self.gate_dropout)).chunk(3, -1)
        memory = forget * state.memory + enter * torch.tanh(new)
        hidden = leave * torch.tanh(memory)
        told = self.tell(self.thinned(hidden, self.dropout)) + (e if self.read_word else 0)
        told = self.thinned(torch.tanh(told if self.tell_context is None else told + self.tell_context(context)), self.dropout)
        for layer in self.tell_deep:
            told = self.thinned(torch.relu(layer(told)), self.dropout)
        return self.out(told), Step(hidden, memory), log_weights, pick

    @takes(annotations="batch places features", words="batch length", keep="batch length", picks="batch length")
    def forward(self, annotations: Tensor, words: Tensor, keep: Tensor | None = None, picks: Tensor | None = None) -> Told:
        """keep (B, T) bool: which words exist; the state stands still over others. picks (B, T) int: places to read, in place of the layer's choice."""
        if words.shape[1] == 0 or annotations.shape[1] == 0:
            raise RegardError(f"{words.shape[1]} words, annotations of {annotations.shape[1]} places; expected at least one of each")
        words = words if keep is None else torch.where(keep, words, 0)
        if not torch.compiler.is_compiling() and words.numel() and not 0 <= int(words.min()) <= int(words.max()) < self.vocab:
            raise RegardError(
                f"words from {int(words.min())} to {int(words.max())}; expected 0 to {self.vocab - 1} (or keep, which words exist)"
            )
        hard = isinstance(self.attention, HardAttention)
        expected = hard and self.training and picks is None and float(torch.rand(())) >= self.sampled
        state, keys, word, steps = self.start(annotations), self.attention.keys(annotations), None, []
        for t in range(words.shape[1]):
            logits, new, log_weights, pick = self.step(word, state, annotations, keys, None if picks is None else picks[:, t], expected)
            state = new if keep is None else Step(*(torch.where(keep[:, t, None], a, b) for a, b in zip(new, state, strict=True)))
            steps.append((logits, log_weights, pick))
            word = words[:, t]
        told, log_weights = (torch.stack(x, 1) for x in ([s[0] for s in steps], [s[1] for s in steps]))
        read = [s[2] for s in steps if s[2] is not None]
        return Told(told, log_weights.exp(), log_weights, torch.stack(read, 1) if read else None)

    @torch.no_grad()
    def generate(self, annotations: Tensor, width: int = 1, max_length: int = 30, end: int = 0, per_word: bool = False) -> list[list[Beam]]:
        """Each image's captions by beam search (width 1: greedily), best first; see `beam_search`. Evaluation, whatever the layer's mode."""
        mode, found = self.training, []
        self.eval()
        try:
            for at in range(len(annotations)):
                one = annotations[at : at + 1]
                keys = self.attention.keys(one)

                def step(words: Tensor | None, state: tuple[Tensor, ...], one: Tensor = one, keys: Tensor = keys) -> tuple[Tensor, Step]:
                    rows = len(state[0])
                    logits, new, *_ = self.step(words, Step(*state), one.expand(rows, -1, -1), keys.expand(rows, -1, -1))
                    return logits.log_softmax(-1), new

                found.append(beam_search(step, self.start(one), width, max_length, end, per_word))
        finally:
            self.train(mode)
        return found


def log_likelihood(told: Told, words: Tensor, keep: Tensor | None = None, floor: float = 1e-8) -> Tensor:
    """sum_t log(p(y_t) + floor) of the words that exist: (B,)."""
    words = words if keep is None else torch.where(keep, words, 0)
    log_p = told.logits.log_softmax(-1).gather(-1, words[..., None])[..., 0]
    if floor:
        log_p = torch.logaddexp(log_p, log_p.new_tensor(math.log(floor)))
    return (log_p if keep is None else torch.where(keep, log_p, 0.0)).sum(1)


def doubly_stochastic(weights: Tensor, keep: Tensor | None = None) -> Tensor:
    """mean_b sum_i (1 - sum_t p_ti)^2 of weights (B, T, L): every place is to be looked at once. keep (B, T): words that count (None: all, padding
    included, as in the released code)."""
    weights = weights if keep is None else torch.where(keep[..., None], weights, 0.0)
    return (1 - weights.sum(1)).square().sum(1).mean()


def caption_loss(told: Told, words: Tensor, keep: Tensor | None = None, penalty: float = 1.0, floor: float = 1e-8) -> Tensor:
    """The loss of soft attention; penalty: lambda (0 in the released code's defaults, 1 in its recipes)."""
    loss = -log_likelihood(told, words, keep, floor).mean()
    return loss + penalty * doubly_stochastic(told.weights, keep) if penalty else loss


class HardLoss(nn.Module):
    """The loss of hard attention, whose gradient is the estimate (-) mean_b d log p(y|s) + reward (log p(y|s) - b) d log p(s) + entropy dH[p].

    b <- decay b + (1 - decay) mean_b log p(y|s) after every call in training (baseline=False: b = 0). reward=1: the gradient of E[log p(y|s)]; the
    released code has 0.1, and each word's own log p(y_t|s) by default. Several samples an image: the image several times in the batch. Where
    expectations were read, the score term is absent.
    """

    average: Tensor

    def __init__(self, reward: float = 1.0, entropy: float = 0.002, decay: float = 0.9, baseline: bool = True, floor: float = 1e-8):
        super().__init__()
        self.reward, self.entropy, self.decay, self.baseline, self.floor = reward, entropy, decay, baseline, floor
        self.register_buffer("average", torch.zeros(()))

    def forward(self, told: Told, words: Tensor, keep: Tensor | None = None) -> Tensor:
        log_p = log_likelihood(told, words, keep, self.floor)
        exists = torch.ones_like(words, dtype=torch.bool) if keep is None else keep
        gain = log_p + self.entropy * torch.where(exists, -(told.weights * told.log_weights).sum(-1), 0.0).sum(1)
        if told.picks is not None:
            log_s = torch.where(exists, told.log_weights.gather(-1, told.picks[..., None])[..., 0], 0.0).sum(1)
            advantage = log_p.detach() - (self.average.to(log_p.dtype) if self.baseline else 0)
            gain = gain + self.reward * advantage * log_s
        if self.training and self.baseline:
            self.average.mul_(self.decay).add_((1 - self.decay) * log_p.detach().mean().to(self.average.dtype))
        return -gain.mean()


def attention_maps(weights: Tensor, grid: tuple[int, int], size: tuple[int, int] | None = None) -> Tensor:
    """Weights (B, T, L) of places row by row as maps (B, T, height, width), brought to `size` bilinearly where one is given."""
    if grid[0] * grid[1] != weights.shape[-1]:
        raise RegardError(f"grid={grid} has {grid[0] * grid[1]} places; expected the {weights.shape[-1]} of weights")
    maps = weights.unflatten(-1, grid)
    return maps if size is None else F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
