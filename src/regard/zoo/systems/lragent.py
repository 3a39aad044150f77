"""LRAgent: agents with LoRA on one model share a cache of keys and base values, and a low-rank one beside it (id 204; Jeon et al., 2026).

v_t = W_V x_t + s B_a (A x_t):  kept are W_V x_t and c_t = s A x_t in R^r;   O_h = P V_g + (P C) B_{a,g},  P = softmax(q_h k_g^T / sqrt(d))
numbers a token and layer, n agents:  share="none" n 2 Hkv d;  "base" 2 Hkv d + n r;  "low-rank" (one A for all) 2 Hkv d + r
Not exact but in the first layer: what one agent's hidden states wrote is read by another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.adapt.attending import attending
from regard.algebra import Causal
from regard.catalog.registry import register
from regard.engine.door import attend
from regard.errors import RegardError
from regard.tasks.training import fit


def lora_attention(q: Tensor, k: Tensor, v: Tensor, c: Tensor, b: Tensor, scale: float | None = None) -> Tensor:
    """Causal attention over values v + c b that are never made: q (B, H, n, D), the last n tokens; k, v (B, Hkv, L, D), c (B, L, r), b (Hkv, r, Dv)."""
    if c.shape[:2] != (k.shape[0], k.shape[2]) or b.shape != (k.shape[1], c.shape[2], v.shape[3]):
        raise RegardError(
            f"c {tuple(c.shape)}, b {tuple(b.shape)} for v {tuple(v.shape)}: expected (B, L, r) and (Hkv, r, Dv) = ({v.shape[1]}, r, {v.shape[3]})"
        )
    wide = torch.cat((v, c[:, None].expand(-1, v.shape[1], -1, -1)), -1)
    o = attend(q, k, wide, mask=Causal(), scale=scale)
    own, low = o.split((v.shape[3], c.shape[2]), -1)
    return own + low @ b.repeat_interleave(q.shape[1] // b.shape[0], 0)


@dataclass
class Adapter:
    """LoRA of one agent, a tensor a layer: a_q, a_v (r, dim), b_q (H D, r), b_v (Hkv D, r); scale: alpha / r."""

    a_q: list[Tensor]
    b_q: list[Tensor]
    a_v: list[Tensor]
    b_v: list[Tensor]
    scale: float


def layers_of(model: nn.Module) -> list[Any]:
    """The attention layers of a transformers decoder."""
    found = [m for m in model.modules() if all(hasattr(m, name) for name in ("q_proj", "k_proj", "v_proj", "layer_idx", "head_dim"))]
    if not found:
        raise RegardError(f"{type(model).__name__}: expected a transformers decoder with q_proj, k_proj and v_proj")
    return found


@contextmanager
def applied(layers: list[Any], adapter: Adapter, values: Callable[[int, Tensor], None] | None = None) -> Iterator[None]:
    """q_proj gives W x + s B A x; v_proj too, or, with `values`, W x alone while values(layer, s A x) is told."""

    def q(at: int) -> Callable[..., Tensor]:
        return lambda module, args, out: out + adapter.scale * (args[0] @ adapter.a_q[at].mT) @ adapter.b_q[at].mT

    def v(at: int) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor | None:
            low = adapter.scale * (args[0] @ adapter.a_v[at].mT)
            if values is None:
                return out + low @ adapter.b_v[at].mT
            values(at, low)
            return None

        return hook

    handles = [h for at, m in enumerate(layers) for h in (m.q_proj.register_forward_hook(q(at)), m.v_proj.register_forward_hook(v(at)))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Kept:
    """One layer: keys (turned), values without adapters (B, Hkv, L, D), and c (B, L, r) by owner."""

    k: Tensor
    v: Tensor
    c: dict[str, Tensor]


@register("lragent", kind="policy")
class MultiLoRACache:
    """A trajectory of tokens that several agents of one transformers decoder write in turn: `logits = cache.extend("planner", ids)`.

    adapters: by agent. share: "low-rank" (all agents have the same a_v, and none reads again what another wrote), "base" (an agent first reads what
    it missed for its own c, without projecting keys and values again) or "none" (each agent has a cache of its own). No gradients.
    projected: tokens that ran through k_proj and v_proj. `bytes`: of all that is kept.
    """

    def __init__(self, model: nn.Module, adapters: Mapping[str, Adapter], share: str = "low-rank"):
        if share not in ("low-rank", "base", "none") or not adapters:
            raise RegardError(f"share={share!r}, {len(adapters)} adapters: expected 'low-rank', 'base' or 'none', and at least one")
        self.model, self.layers, self.adapters, self.share = model, layers_of(model), dict(adapters), share
        first = next(iter(adapters.values()))
        for name, one in adapters.items():
            if any(len(x) != len(self.layers) for x in (one.a_q, one.b_q, one.a_v, one.b_v)):
                raise RegardError(f"adapter {name!r}: expected {len(self.layers)} tensors each, one a layer")
            same = one.scale == first.scale and all(torch.equal(x, y) for x, y in zip(one.a_v, first.a_v, strict=True))
            if share == "low-rank" and not same:
                raise RegardError(
                    f"adapter {name!r} has an a_v or a scale of its own; expected the same for all with share='low-rank', or share='base'"
                )
        self.ids: Tensor | None = None
        self.known = dict.fromkeys(adapters, 0)  # tokens that an agent can read
        self.kept: dict[str, list[Kept]] = {}
        self.projected = 0

    def extend(self, agent: str, ids: Tensor) -> Tensor:
        """New tokens ids (B, n) behind the trajectory, read by `agent`: logits (B, n, vocab)."""
        if agent not in self.adapters:
            raise RegardError(f"agent={agent!r}: expected one of {', '.join(self.adapters)}")
        if ids.dim() != 2 or ids.shape[1] < 1 or (self.ids is not None and len(ids) != len(self.ids)):
            raise RegardError(f"ids {tuple(ids.shape)}: expected (B, n), n at least 1, with the batch of the trajectory")
        total = 0 if self.ids is None else self.ids.shape[1]
        self.ids = ids if self.ids is None else torch.cat((self.ids, ids), 1)
        start = total if self.share == "low-rank" else self.known[agent]
        if start < total:
            self.read(agent, start, total, written=self.share == "base")
        out = self.read(agent, total, self.ids.shape[1], written=False)
        self.known[agent] = self.ids.shape[1]
        return out

    @torch.no_grad()
    def read(self, agent: str, start: int, stop: int, written: bool) -> Tensor:
        """Tokens start .. stop of the trajectory under one agent's adapter. written: keys and base values are there already."""
        adapter = self.adapters[agent]
        store = self.kept.setdefault(agent if self.share == "none" else "", [])
        owner = "" if self.share == "low-rank" else agent
        fresh: dict[int, Tensor] = {}

        def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, **options: Any) -> tuple[Tensor, None]:
            at = self.layers.index(module)
            if len(store) == at:
                store.append(Kept(k[:, :, :0], v[:, :, :0], {}))
            kept, c, scale = store[at], fresh[at], options.get("scaling")
            low = adapter.b_v[at].unflatten(0, (k.shape[1], -1)).mT
            if self.share == "none":
                kept.k, kept.v = torch.cat((kept.k, k), 2), torch.cat((kept.v, v + c[:, None] @ low), 2)
                return attend(q, kept.k, kept.v, mask=Causal(), scale=scale).transpose(1, 2), None
            kept.c[owner] = torch.cat((kept.c.get(owner, c[:, :0]), c), 1)
            if not written:
                kept.k, kept.v = torch.cat((kept.k, k), 2), torch.cat((kept.v, v), 2)
            return lora_attention(q, kept.k[:, :, :stop], kept.v[:, :, :stop], kept.c[owner], low, scale).transpose(1, 2), None

        assert self.ids is not None
        places = torch.arange(start, stop, device=self.ids.device)[None].expand(len(self.ids), -1)
        with ExitStack() as stack:
            stack.enter_context(attending(self.model, "regard_lragent", attention))
            if written:
                for layer in self.layers:
                    stack.enter_context(skipped(layer.k_proj))
                    stack.enter_context(skipped(layer.v_proj))
            else:
                self.projected += stop - start
            stack.enter_context(applied(self.layers, adapter, fresh.__setitem__))
            return self.model(input_ids=self.ids[:, start:stop], position_ids=places, use_cache=False).logits  # type: ignore[no-any-return]

    @property
    def bytes(self) -> int:
        tensors = [x for store in self.kept.values() for kept in store for x in (kept.k, kept.v, *kept.c.values())]
        return sum(x.numel() * x.element_size() for x in tensors)


@contextmanager
def skipped(linear: Any) -> Iterator[None]:
    """A projection that gives zeros without running; its hooks still see its input."""
    linear.forward = lambda x: x.new_zeros(()).expand(*x.shape[:-1], linear.out_features)
    try:
        yield
    finally:
        del linear.forward


def train_roles(
    model: nn.Module,
    draws: Mapping[str, Callable[[torch.Generator], tuple[Tensor, Tensor]]],
    rank: int = 8,
    alpha: float = 16.0,
    steps: int = 200,
    lr: float = 1e-3,
    seed: int = 0,
) -> dict[str, Adapter]:
    """Adapters of several roles with one A: `steps` steps on all roles' texts together, then A stays and each role's B goes on alone for as many.

    draws: by role, generator -> (ids (B, L), asked (B, L) bool: tokens to be predicted). The model itself is not changed.
    """
    layers, generator = layers_of(model), torch.Generator().manual_seed(seed)
    if rank < 1 or not draws:
        raise RegardError(f"rank={rank}, {len(draws)} roles: expected positive numbers")

    def drawn(out: int, into: int, like: Tensor, zero: bool) -> nn.Parameter:
        return nn.Parameter((torch.zeros(out, into) if zero else torch.randn(out, into, generator=generator) * into**-0.5).to(like))

    def make(side: str, zero: bool) -> list[Tensor]:
        linears = [getattr(m, side) for m in layers]
        return [drawn(m.out_features if zero else rank, rank if zero else m.in_features, m.weight, zero) for m in linears]

    common = Adapter(make("q_proj", False), make("q_proj", True), make("v_proj", False), make("v_proj", True), alpha / rank)

    def learn(adapter: Adapter, learned: list[Tensor], draw: Callable[[torch.Generator], tuple[Tensor, Tensor]]) -> None:
        def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
            ids, asked = batch
            with applied(layers, adapter):
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            return torch.nn.functional.cross_entropy(logits[asked[:, 1:]], ids[:, 1:][asked[:, 1:]])

        fit(nn.ParameterList(learned), draw, loss, steps, lr=lr, seed=seed)

    def together(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        every = [draw(generator) for draw in draws.values()]
        return torch.cat([ids for ids, _ in every]), torch.cat([asked for _, asked in every])

    frozen = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(False)
    try:
        learn(common, [*common.a_q, *common.b_q, *common.a_v, *common.b_v], together)
        found = {}
        for role, draw in draws.items():
            own = [[nn.Parameter(x.detach().clone()) for x in side] for side in (common.b_q, common.b_v)]
            one = Adapter([x.detach() for x in common.a_q], [*own[0]], [x.detach() for x in common.a_v], [*own[1]], common.scale)
            learn(one, [*own[0], *own[1]], draw)
            found[role] = Adapter(one.a_q, [x.detach() for x in own[0]], one.a_v, [x.detach() for x in own[1]], one.scale)
    finally:
        for p, learned in zip(model.parameters(), frozen, strict=True):
            p.requires_grad_(learned)
    return found


__all__ = ["Adapter", "MultiLoRACache", "lora_attention", "train_roles"]
