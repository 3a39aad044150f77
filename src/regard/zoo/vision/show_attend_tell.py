"""Show, attend and tell: a caption's every word looks at the image anew (id 76; Xu et al., 2015).

e_ti = w . tanh(W a_i + U h_{t-1} + b), p_t = softmax(e_t);  z_t = sum_i p_ti a_i, or a_s with s ~ p_t;  h_t = LSTM(E y_{t-1}, h_{t-1}, z_t)
p(y_t) = softmax(L_o tanh(E y_{t-1} + L_h h_t + L_z z_t));  h_0 = tanh(W_h mean_i a_i), c_0 = tanh(W_c mean_i a_i)
Soft: -log p(y) + lambda sum_i (1 - sum_t p_ti)^2. Hard: samples of d log p(y|s) + r (log p(y|s) - b) d log p(s) + e dH[p]
The released code's options: an LSTM over annotations both ways, and further LSTMs above, each with an attention of its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.generate.beams import Beam, beam_search
from regard.nn.additive import AdditiveAttention, HardAttention, first_values
from regard.nn.parts import takes, whole
from regard.nn.reading_lstm import LSTMState, ReadingLSTM, TwoWayLSTM, thinned


class Told(NamedTuple):
    """logits (B, T, vocab). weights (B, T, L) and their logarithms. picks (B, T): places read, None where expectations were."""

    logits: Tensor
    weights: Tensor
    log_weights: Tensor
    picks: Tensor | None


State = tuple[LSTMState, ...]  # of each layer


@register("show-attend-tell", kind="module")
class CaptionDecoder(nn.Module):
    """annotations (B, L, features), words (B, T) -> Told: logits of every word from those before it (before the first: a zero embedding).

    attention: "soft" or "hard". In training, hard attention reads expectations instead of samples in one call of (1 - sampled); in evaluation it reads
    as `reads` says. deep_attention, deep_start, deep_readout: numbers of layers of these nets. selector: a gate on contexts. read_word, read_context:
    whether E y_{t-1} and z_t reach the readout (the paper's; the released code has both off). scale: of attention's logits. dropout (0.5 where the
    released code has it): of the start's hidden layers, of h_t and of the readout's hidden layers; gate_dropout: of the LSTMs' three gates before the
    sigmoid. Neither is rescaled in training: evaluation multiplies by one minus it. around: annotations are first read by an LSTM both ways, to 2 hidden
    each. layers: LSTMs one above the other, each reading annotations by its own state; the last one's hidden state, context and weights are told. With
    hard attention one, for the estimate of the gradient knows the places that one layer read.
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
        around: bool = False,
        layers: int = 1,
        std: float = 0.01,
    ):
        super().__init__()
        if attention not in ("soft", "hard") or min(deep_start, deep_readout) < 1 or not 0 <= sampled <= 1:
            raise RegardError(
                f"attention={attention!r}, deep_start={deep_start}, deep_readout={deep_readout}, sampled={sampled}; "
                "expected 'soft' or 'hard', at least one layer each, a probability"
            )
        if layers < 1 or (layers > 1 and attention == "hard"):
            raise RegardError(f"layers={layers}, attention={attention!r}; expected at least one layer, and one if attention is 'hard'")
        self.vocab, self.features, self.sampled, self.dropout, self.read_word = vocab, features, sampled, dropout, read_word
        self.around = TwoWayLSTM(features, hidden, gate_dropout, std) if around else None
        seen = 2 * hidden if around else features
        common = (seen, hidden, deep_attention, selector, scale, std)
        self.cells = nn.ModuleList()
        for at in range(layers):
            look = AdditiveAttention(*common) if attention == "soft" else HardAttention(*common, reads)
            self.cells.append(ReadingLSTM(hidden if at else embed, hidden, seen, look, gate_dropout, std))
        self.words = nn.Embedding(vocab, embed)
        self.start_deep = nn.ModuleList(nn.Linear(seen, seen) for _ in range(deep_start - 1))
        self.tell, self.tell_context = nn.Linear(hidden, embed), nn.Linear(seen, embed) if read_context else None
        self.tell_deep, self.out = nn.ModuleList(nn.Linear(embed, embed) for _ in range(deep_readout - 1)), nn.Linear(embed, vocab)
        for layer in (self.words, *self.start_deep, self.tell, self.tell_context, *self.tell_deep, self.out):
            if layer is not None:
                first_values(layer, std)  # type: ignore[arg-type]

    def thinned(self, x: Tensor) -> Tensor:
        return thinned(x, self.dropout, self.training)

    @takes(annotations="batch places features")
    def looked_over(self, annotations: Tensor) -> Tensor:
        """What is read: the annotations, through the LSTM over them where there is one."""
        return annotations if self.around is None else self.around(annotations)  # type: ignore[no-any-return]

    @whole
    def start(self, seen: Tensor) -> State:
        mean = seen.mean(1)
        for layer in self.start_deep:
            mean = self.thinned(torch.relu(layer(mean)))
        return tuple(cell.start(mean) for cell in self.cells)  # type: ignore[operator]

    @whole
    def step(
        self,
        word: Tensor | None,
        state: State,
        seen: Tensor,
        keys: Sequence[Tensor] | None = None,
        pick: Tensor | None = None,
        expected: bool = False,
    ) -> tuple[Tensor, State, Tensor, Tensor | None]:
        """One word (B,), None before the first -> (logits of the next, state, log weights, place read). keys: of each layer; pick, expected: attention's."""
        e = self.words.weight.new_zeros(len(seen), self.words.embedding_dim) if word is None else self.words(word)
        x, states = e, []
        for at, (cell, own) in enumerate(zip(self.cells, state, strict=True)):
            new, reading = cell.read(x, own, seen, None if keys is None else keys[at], pick, expected)  # type: ignore[operator]
            states.append(new)
            x = new.hidden
        told = self.tell(self.thinned(x)) + (e if self.read_word else 0)
        told = self.thinned(torch.tanh(told if self.tell_context is None else told + self.tell_context(reading.context)))
        for layer in self.tell_deep:
            told = self.thinned(torch.relu(layer(told)))
        return self.out(told), tuple(states), reading.log_weights, reading.pick

    def keys(self, seen: Tensor) -> list[Tensor]:
        return [cell.attention.keys(seen) for cell in self.cells]  # type: ignore[operator, union-attr]

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
        hard = isinstance(self.cells[0].attention, HardAttention)
        expected = hard and self.training and picks is None and float(torch.rand(())) >= self.sampled
        seen = self.looked_over(annotations)
        state, keys, word, steps = self.start(seen), self.keys(seen), None, []
        for t in range(words.shape[1]):
            logits, new, log_weights, pick = self.step(word, state, seen, keys, None if picks is None else picks[:, t], expected)
            state = new if keep is None else kept(keep[:, t, None], new, state)
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
                one = self.looked_over(annotations[at : at + 1])
                keys = self.keys(one)

                def step(
                    words: Tensor | None, flat: tuple[Tensor, ...], one: Tensor = one, keys: list[Tensor] = keys
                ) -> tuple[Tensor, tuple[Tensor, ...]]:
                    rows = len(flat[0])
                    state = tuple(LSTMState(*pair) for pair in zip(flat[::2], flat[1::2], strict=True))
                    logits, new, *_ = self.step(words, state, one.expand(rows, -1, -1), [k.expand(rows, -1, -1) for k in keys])
                    return logits.log_softmax(-1), tuple(itertools.chain(*new))

                found.append(beam_search(step, tuple(itertools.chain(*self.start(one))), width, max_length, end, per_word))
        finally:
            self.train(mode)
        return found


def kept(where: Tensor, new: State, old: State) -> State:
    """New states where (B, 1) bool is true, old ones elsewhere."""
    return tuple(LSTMState(*(torch.where(where, a, b) for a, b in zip(*pair, strict=True))) for pair in zip(new, old, strict=True))


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
