"""Checks of secondary-attention-sinks."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.heads import mixers
from regard.lab.verification import check
from regard.nn.decoder import Decoder
from regard.taps import edit, read
from regard.zoo.analysis.secondary_attention_sinks import detect_sinks, mlp_alignment, sink_levels, sink_score, sink_window, suppress

U = torch.zeros(32, dtype=F64).index_fill(0, torch.tensor(0), 1.0)


def planted() -> Tensor:
    """24 layers of 64 tokens: a primary sink at layers 3 .. 20, secondary ones of two levels, and decoys."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(24, 1, 64, 32, generator=generator, dtype=F64)
    states[..., 0] = 0
    states[3:21, 0, 0] = 50 * U
    for tokens, start, life in (((9, 30), 8, 6), ((17,), 12, 7)):
        states[start : start + life, 0, list(tokens)] = 20 * U + 0.3 * states[start : start + life, 0, list(tokens)]
    side = torch.zeros(32, dtype=F64).index_fill(0, torch.tensor(1), 1.0)
    states[5:18, 0, 40] = 20 * (0.8 * U + 0.6 * side)  # cosine 0.8
    states[10:13, 0, 44] = 20 * U  # three layers
    states[5:18, 0, 50] = 90 * side  # a great norm in another direction
    states[21:24, 0, 55] = 20 * U  # behind the window
    states[8:14, 0, 60] = -20 * U  # against it: a sink too
    return states


@check(
    "secondary-attention-sinks",
    "planted streams: records (position, creation, life, kind) missing or too many, and wrong levels",
    below=0,
    control="tokens of great norm taken for sinks",
)
def _() -> tuple[float, float]:
    (found,) = detect_sinks(planted(), margin=8)
    truth = {(0, 3, 18, "primary"), (9, 8, 6, "secondary"), (30, 8, 6, "secondary"), (17, 12, 7, "secondary"), (60, 8, 6, "secondary")}
    truth |= {(44, 10, 3, "noise")}
    own = {(s.position, s.creation, s.life, s.kind) for s in found}
    levels = [sorted(s.position for s in level) for level in sink_levels(found)]
    near = [sorted(s.position for s in level) for level in sink_levels(found, reach=4)]
    wrong = len(own ^ truth) + int(levels != [[9, 30, 60], [17]]) + int(near != [[9, 17, 30, 60]])
    several = detect_sinks(torch.cat((planted()[:, :, :1] * 0.1, planted()), 2), bos=(0, 1), margin=8)[0]
    wrong += int(several[0].position != 1) + int(sink_window(torch.tensor([1.0, 2, 90, 91, 90, 3, 2])) != (2, 5))
    norms = planted().norm(dim=-1)[:, 0]
    tall = {t for t in range(64) if bool((norms[:, t] > 15).any())}
    return wrong, len(tall ^ {position for position, *_ in truth})


@check(
    "secondary-attention-sinks",
    "sink scores, all queries behind a token and a window of 3: equal loops",
    below=1e-12,
    control="its own query counted",
)
def _() -> tuple[float, float]:
    maps = torch.rand(2, 2, 3, 9, 9, dtype=F64).softmax(-1)
    gaps = []
    for window in (None, 3):
        truth, own = torch.zeros(2, 2, 9, dtype=F64), torch.zeros(2, 2, 9, dtype=F64)
        for layer in range(2):
            for b in range(2):
                for t in range(9):
                    behind = [i for i in range(t + 1, 9) if window is None or i <= t + window]
                    values = [float(maps[layer, b, :, i, t].mean()) for i in behind]
                    truth[b, layer, t] = sum(values) / len(values) if values else 0.0
                    with_own = [float(maps[layer, b, :, i, t].mean()) for i in [t, *behind]]
                    own[b, layer, t] = sum(with_own) / len(with_own)
        gaps.append((naive.gap(sink_score(maps, window), truth), naive.gap(own, truth)))
    return max(a for a, _ in gaps), min(b for _, b in gaps)


def wired() -> Decoder:
    """Nine layers in which every query looks along U; the first token gets a great U at layer 1 and loses it at layer 7."""
    torch.manual_seed(0)
    model = Decoder(vocab=20, dim=32, layers=9, heads=2, hidden=64, rope=False).to(F64).eval()
    with torch.no_grad():
        model.embed.weight.normal_().mul_(0.5)
        model.embed.weight[:, 0], model.embed.weight[:, 1] = 0.0, 2.0
        for layer in mixers(model):
            for projection, channel in ((layer.q, 1), (layer.k, 0)):
                projection.weight.zero_()
                for head in range(2):
                    projection.weight[16 * head, channel] = 0.8
            layer.out.weight.mul_(0.1)
        for block in model.blocks:
            block.mlp.down.weight.mul_(2.0)  # type: ignore[union-attr, operator]
    return model


IDS = torch.tensor([[0, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]])
MARK = 5


def studied(strength: float, hold: bool = False, along: Tensor = U) -> tuple[float, int, float, float]:
    """(sink score of the marked token behind layer 3, its life, its MLP's cosine with the sink and norm there)."""
    model = wired()

    def first(x: Tensor) -> Tensor:
        return x + 40 * U

    def last(x: Tensor) -> Tensor:
        return x - 40 * U

    def mark(x: Tensor) -> Tensor:
        return x + strength * along

    with torch.no_grad(), edit(model, {"mlp": first}, layers=[1], positions=[0]), edit(model, {"mlp": last}, layers=[7], positions=[0]):
        with read(model, "mlp", layers=[3]) as seen:
            model(IDS)
        typical = float(seen["mlp", 3][0, MARK].norm())
        with edit(model, {"mlp": mark}, layers=[3], positions=[MARK]):
            aligned = mlp_alignment(model, IDS)
            guard = suppress(model, 3, U, typical) if hold else edit(model, {"q": lambda x: x}, layers=[0])
            with guard, read(model, ["weights", "residual_out"]) as found:
                model(IDS)
    sinks = detect_sinks(found.stack("residual_out"), margin=3, least=1)[0]
    life = next((s.life for s in sinks if s.position == MARK), 0)
    score = float(sink_score(found.stack("weights"))[0, 4, MARK])
    return score, life, float(aligned.cosine[0, 3, MARK]), float(aligned.norm[0, 3, MARK])


@check(
    "secondary-attention-sinks",
    "a layer's MLP adds 0, 2, 8, 32 along the sink direction: sink score and life that do not grow, and cosines below 0.95 at 32",
    below=0,
    control="added across the sink direction",
)
def _() -> tuple[float, float]:
    def failures(along: Tensor) -> int:
        runs = [studied(c, along=along) for c in (0.0, 2.0, 8.0, 32.0)]
        scores, lives = [run[0] for run in runs], [run[1] for run in runs]
        growing = sum(b <= a for a, b in itertools.pairwise(scores)) + sum(b < a for a, b in itertools.pairwise(lives))
        return growing + int(lives[-1] <= lives[0]) + int(runs[-1][2] < 0.95) + int(runs[-1][3] < 30)

    return failures(U), failures(torch.zeros(32, dtype=F64).index_fill(0, torch.tensor(5), 1.0))


@check(
    "secondary-attention-sinks",
    "the same MLP output brought back to its usual length: sink score over the one without it",
    below=1.35,
    control="left as it is",
)
def _() -> tuple[float, float]:
    plain, held, free = studied(0.0)[0], studied(32.0, hold=True)[0], studied(32.0)[0]
    return held / plain, free / plain
