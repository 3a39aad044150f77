"""QAdA: which heads need the long context is told from the keys' first two moments, query by query (id 306; 2025).

local keys: the first `sink` tokens and the last `local` ones;  bulk: the n_B others, taken as N(mu, Sigma):
log A_bulk ~ log n_B + a q.mu + a^2 q' Sigma q / 2,  a = 1 / sqrt(d);   a head reads its local keys alone iff A_local / (A_local + A_bulk) >= tau
Moments are sums over the keys that have left the window (n, sum k, sum k k'), of every key head, or were found on other text.
Not reproduced on the tiny model: that a rule a head is worse (it has few heads that look far, always the same ones).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regard import taps
from regard.cache.layer import Part
from regard.cache.locality import Tally, errors, shares
from regard.cache.moments import Moments
from regard.cache.policy import Policy, oldest
from regard.cache.view import View, read, visible
from regard.catalog.registry import register
from regard.errors import RegardError
from regard.interpret.tables import HeadTable, table_of

ROWS = 64  # queries of a prompt that are decided together
RULES = ("moments", "mean", "oracle")


@register("qada", kind="policy")
class QAdA(Policy):
    """`with QAdA()(model): model.generate(...)`: nothing is dropped; each head of each query reads its local keys or all.

    sink, local: keys that are always read. tau: the share of the mass that local keys must hold; 0 is always local, above 1 always full. rule:
    "moments", "mean" (no covariance), "oracle" (the true mass), or a table (layers, heads) of bools, True for heads that are always local. moments:
    of each layer, (Hkv, D) and so on, found on other text (`calibrate`; None: running sums). prompt: decide for the prompt's queries too.
    report: also compute the oracle's decisions, for `errors`. Layers with a sliding window of their own read that.
    """

    def __init__(
        self,
        sink: int = 16,
        local: int = 1024,
        tau: float = 0.6,
        rule: str | Tensor = "moments",
        moments: Sequence[Moments] | None = None,
        prompt: bool = False,
        report: bool = False,
    ):
        super().__init__(1.0)
        known = rule.dtype == torch.bool and rule.dim() == 2 if isinstance(rule, Tensor) else rule in RULES
        if sink < 0 or local < 1 or not tau >= 0 or not known:
            came = f"a table {tuple(rule.shape)} of {rule.dtype}" if isinstance(rule, Tensor) else repr(rule)
            raise RegardError(
                f"sink={sink}, local={local}, tau={tau}, rule={came}; expected sink >= 0, local >= 1, tau >= 0, and a rule of "
                f"{', '.join(RULES)}, or a table (layers, heads) of bools"
            )
        self.sink, self.local, self.tau, self.rule, self.moments, self.prompt, self.report = sink, local, tau, rule, moments, prompt, report
        self.tally: dict[int, Tally] = {}
        self.last: dict[int, Tensor] = {}  # (B, H, n): the latest decisions of each layer
        self.read = 0  # keys read by decided queries, over all heads

    def begin(self, layers: int, heads: int) -> None:
        if self.moments is not None and len(self.moments) != layers:
            raise RegardError(f"moments has {len(self.moments)} layers; expected {layers}")
        if isinstance(self.rule, Tensor) and (len(self.rule) != layers or self.rule.shape[1] % heads):
            raise RegardError(f"rule is a table {tuple(self.rule.shape)}; expected {layers} layers, and a multiple of {heads} heads")

    def run(self, layer: Any, number: int, view: View) -> None:
        pass

    def compute(self, view: View, places: Tensor) -> Tensor:
        if view.window is not None or (view.first and not self.prompt):
            return super().compute(view, places)
        part, sinks = view.part, oldest(view, self.sink)
        real = view.real(places)
        pieces = [
            self.decided(view, part, sinks, at, q, r)
            for at, q, r in zip(places.split(ROWS), view.query.split(ROWS, 3), real.split(ROWS, 1), strict=True)
        ]
        self.last[view.layer] = torch.cat([local for _, local in pieces], 2)
        return torch.cat([out for out, _ in pieces], 3)

    def decided(self, view: View, part: Part, sinks: Tensor, places: Tensor, q: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs (B, h, group, n, Dv) and decisions (B, h group, n) of queries q at places (n,)."""
        shown = visible(part, places, None)
        near = shown & (sinks[:, :, None] | (part.places[:, :, None] > places[:, None] - self.local))
        any_near = near.any(2)
        few = any_near.long().argsort(dim=2, descending=True, stable=True)[..., : int(any_near.sum(2).max())]
        close = part.kept(few)
        seen = near.gather(3, few[:, :, None].expand(-1, -1, len(places), -1))[:, :, None]
        wide = torch.promote_types(q.dtype, torch.float32)
        s = (view.scale * q.to(wide) @ close.keys.to(wide).mT[:, :, None]).masked_fill(~seen, -torch.inf)
        mass = s.logsumexp(-1)
        weights = torch.where(seen, (s - mass[..., None].clamp_min(torch.finfo(wide).min)).exp(), 0.0)
        out = (weights @ close.values.to(wide)[:, :, None]).to(part.values.dtype)
        oracle = self.enough(mass, self.true_mass(view, part, q, shown & ~near)) if self.report or self.rule == "oracle" else None
        if isinstance(self.rule, Tensor):
            local = self.rule[view.layer].to(q.device).view(1, q.shape[1], q.shape[2], 1).expand(*mass.shape)
        else:
            local = oracle if self.rule == "oracle" and oracle is not None else self.enough(mass, self.guess(view, part, sinks, places, q))
        self.note(view, local, oracle, real, near, shown)
        full = (~local).any(0).any((1, 2)).nonzero()[:, 0]
        if len(full):
            whole = read(q.index_select(1, full), part.of(full), places, view.scale, None)
            out = out.index_copy(1, full, torch.where(local.index_select(1, full)[..., None], out.index_select(1, full), whole))
        return out, local.flatten(1, 2)

    def enough(self, near: Tensor, far: Tensor) -> Tensor:
        """Whether local keys hold the share tau: (log A_local, log A_bulk) -> bool."""
        if self.tau <= 0 or self.tau > 1:
            return torch.full(near.shape, self.tau <= 0, device=near.device)
        odds = math.log(self.tau / (1 - self.tau)) if self.tau < 1 else math.inf
        return (near.double() - far.double() >= odds) | far.isneginf()

    def true_mass(self, view: View, part: Part, q: Tensor, far: Tensor) -> Tensor:
        s = view.scale * q.double() @ part.keys.double().mT[:, :, None]
        return s.masked_fill(~far[:, :, None], -torch.inf).logsumexp(-1)

    def guess(self, view: View, part: Part, sinks: Tensor, places: Tensor, q: Tensor) -> Tensor:
        """log A_bulk of the Gaussian, (B, h, group, n), each query's bulk its own."""
        base = self.running(view, part, sinks, places)
        leaving, found = part.alive & ~sinks, []
        for n, place in enumerate(places.tolist()):
            if n:
                fresh = leaving & (part.places == place - self.local)
                at = fresh.long().argmax(2)[..., None, None]
                base = base + Moments.of(part.keys.take_along_dim(at, 2), fresh.any(2, keepdim=True))
            own = base if self.moments is None else self.of_layer(view.layer, part)
            found.append(own.log_mass(q[:, :, :, n], base.count, view.scale, self.rule != "mean"))
        return torch.stack(found, 3)

    def of_layer(self, layer: int, part: Part) -> Moments:
        assert self.moments is not None
        known = self.moments[layer]
        return Moments(*(x.to(part.keys.device)[part.heads][None] for x in (known.count, known.total, known.outer)))

    def running(self, view: View, part: Part, sinks: Tensor, places: Tensor) -> Moments:
        """The moments of the first query's bulk: those remembered, and the keys that have left the window since."""
        memory, left = view.memory, max(-1, int(places[0]) - self.local)  # the newest place outside the window
        gone = part.alive & ~sinks & (part.places <= left)
        if "upto" in memory:
            begin = int(memory["upto"][0]) + 1
            at = slice(begin, max(begin, left + 1))  # entries stand at their places, for nothing is dropped
            new = Moments.of(part.keys[:, :, at], gone[:, :, at]) + Moments(memory["count"], memory["total"], memory["outer"])
        else:
            new = Moments.of(part.keys, gone)
        memory.update(count=new.count, total=new.total, outer=new.outer, upto=torch.full((len(part.keys),), left, device=places.device))
        return new

    def note(self, view: View, local: Tensor, oracle: Tensor | None, real: Tensor, near: Tensor, shown: Tensor) -> None:
        tally = self.tally.setdefault(view.layer, Tally.empty(local.shape[1] * local.shape[2]))
        tally.add(local.flatten(1, 2), None if oracle is None else oracle.flatten(1, 2), real)
        counts = torch.where(local, near.sum(-1)[:, :, None], shown.sum(-1)[:, :, None])
        self.read += int(torch.where(real[:, None, None], counts, 0).sum())

    def shares(self) -> HeadTable:
        """The share of its queries for which each head was local, (layers, heads)."""
        return table_of(shares(self.tally), "local")

    def found(self) -> dict[str, float]:
        """sparsity: the share of (layer, head, query) that was local; with report=True also agreement, false_local and false_full."""
        if not self.tally:
            raise RegardError("no query was decided; expected calls behind a prompt, or prompt=True")
        known = errors(self.tally)
        return known if self.report else {"sparsity": known["sparsity"]}


def attend_adaptively(q: Tensor, k: Tensor, v: Tensor, policy: QAdA, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """q (B, H, n, D) of the last n tokens, k (B, Hkv, T, D), v (B, Hkv, T, Dv) -> outputs (B, H, n, Dv) and which were local (B, H, n)."""
    if q.dim() != 4 or k.dim() != 4 or q.shape[1] % k.shape[1] or q.shape[2] > k.shape[2] or v.shape[:3] != k.shape[:3]:
        raise RegardError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; expected (B, H, n, D), (B, Hkv, T, D), (B, Hkv, T, Dv)"
        )
    places = torch.arange(k.shape[2], device=k.device).expand(*k.shape[:3])
    part = Part(torch.arange(k.shape[1], device=k.device), k, v, places, torch.ones_like(places, dtype=torch.bool))
    view = View(0, 1, False, k.shape[2], part, q.unflatten(1, (k.shape[1], -1)), q.shape[-1] ** -0.5 if scale is None else scale, None)
    out = policy.compute(view, places[0, 0, -q.shape[2] :])
    return out.flatten(1, 2), policy.last[0]


@torch.no_grad()
def calibrate(model: nn.Module, ids: Tensor, sink: int = 16, local: int = 1024) -> list[Moments]:
    """Moments of each layer's keys on text ids (B, T), behind rotary positions, without the first `sink` tokens and the last `local` ones."""
    if ids.shape[1] <= sink + local:
        raise RegardError(f"ids has {ids.shape[1]} tokens; expected more than sink + local = {sink + local}")
    with taps.read(model, "k") as seen:
        model(ids)
    keys = [k[:, :, sink : k.shape[2] - local].transpose(0, 1).flatten(1, 2) for _, k in seen.items("k")]
    return [Moments.of(k, torch.ones(k.shape[:2], dtype=torch.bool, device=k.device)) for k in keys]


@torch.no_grad()
def sparsity_curve(
    model: Any, prompts: Sequence[tuple[Tensor, Tensor]], taus: Sequence[float], **options: Any
) -> list[tuple[float, float, float]]:
    """(tau, sparsity, accuracy) with QAdA(tau=tau, **options): accuracy is the share of tokens of the answers (n,) to prompts (T,) that greedy
    decoding gives at their places."""
    found = []
    for tau in taus:
        policy, right, total = QAdA(tau=tau, **options), 0, 0
        with policy(model):
            for ids, answer in prompts:
                out = model.generate(ids[None], max_new_tokens=len(answer), min_new_tokens=len(answer), do_sample=False)[0, len(ids) :]
                right, total = right + int((out == answer).sum()), total + len(answer)
        found.append((tau, policy.found()["sparsity"], right / total))
    return found
