"""Chunks: matrix products inside a chunk, the recurrence between chunks. Linear in length, no exponent above zero is formed.

Within a chunk let G_i be the inclusive sum of log decays. With state S at its start,

    o_i = (q_i e^{G_i}) S + sum_{j<=i} (q_i . k_j e^{G_i - G_j}) u_j,      S' = e^{G_C} S + sum_j (k_j e^{G_C - G_j}) u_j^T,

where u = v for additive writes, and (I + tril(beta K K^T o e^{G_i - G_j}, -1)) u = beta (v - (K e^{G_i}) S) for the delta rule.
A transition diagonal plus low rank adds o_i += sum_{j<=i} (q_i . b_j e^{G_i - G_j}) w_j and to S' what b writes of w, where
w_i = (a_i e^{G_{i-1}}) S + sum_{j<i} (a_i . k_j e^{G_{i-1} - G_j}) v_j + sum_{j<i} (a_i . b_j e^{G_{i-1} - G_j}) w_j.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from ..exported import holds
from .parallel import decay_matrix, later, pairs, sooner
from .pose import Lift, Scan

SEGMENT = 1024  # tokens worked on at once: bounds memory, and keeps a segment near the caches
SUB = 16  # sub-chunks of per-channel decay
SAFE = 40.0  # largest decay of a chunk for which e^{+-SAFE/2} factors are exact in float32


def tensors(scan: Scan) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """All that a scan without wide features computes with."""
    return scan.q, scan.k, scan.v, scan.decay, scan.beta


def segments(scan: Scan, size: int) -> list[Scan]:
    """The scan in pieces of about SEGMENT tokens, whole chunks each but for the last."""
    step = max(size, SEGMENT // size * size)
    return [cut(scan, start, min(start + step, scan.length)) for start in range(0, scan.length, step)]


def empty_state(scan: Scan) -> Tensor:
    """(B, H, F, E) zeros."""
    k = scan.k if scan.lift is None else scan.lift.key(scan.k[..., :1, :])
    return scan.v.new_zeros(*k.shape[:2], k.shape[-1], scan.v.shape[-1])


def both_ways(scan: Scan) -> Tensor:
    """o of all keys at once, a segment at a time where features are wide."""
    if scan.lift is None:
        return scan.q @ (scan.k.transpose(-1, -2) @ scan.v)
    state = empty_state(scan)
    for start in range(0, scan.k.shape[-2], SEGMENT):
        state = state + again(wide_write, scan.lift, *(x[..., start : start + SEGMENT, :] for x in (scan.k, scan.v)))
    parts = [again(wide_read, scan.lift, scan.q[..., at : at + SEGMENT, :], state) for at in range(0, scan.q.shape[-2], SEGMENT)]
    return torch.cat(parts, -2)


def wide_write(lift: Lift, k: Tensor, v: Tensor) -> Tensor:
    return lift.key(k).transpose(-1, -2) @ v


def wide_read(lift: Lift, q: Tensor, state: Tensor) -> Tensor:
    return lift.query(q) @ state


def again(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), computed once more on the way back in place of keeping what it made."""
    return checkpoint(function, *args, use_reentrant=False) if torch.is_grad_enabled() else function(*args)


def cut(scan: Scan, start: int, stop: int) -> Scan:
    def part(x: Tensor | None) -> Tensor | None:
        return x if x is None or x.shape[-2] == 1 else x[..., start:stop, :]

    one = scan.length == 1
    return replace(
        scan,
        q=scan.q[..., start:stop, :],
        k=scan.k[..., start:stop, :],
        v=scan.v[..., start:stop, :],
        decay=scan.decay if one else part(scan.decay),
        beta=scan.beta if one else part(scan.beta),
        low=None if scan.low is None else (scan.low[0][..., start:stop, :], scan.low[1][..., start:stop, :]),
    )


def in_chunks(x: Tensor, size: int) -> Tensor:
    """(..., L, D) -> (..., N, size, D), the last chunk filled up with zeros."""
    fill = -x.shape[-2] % size
    return (pad(x, (0, 0, 0, fill)) if fill else x).unflatten(-2, (-1, size))


def steps_in(length: int, size: int, like: Tensor) -> Tensor:
    """How many tokens of its chunk have passed at each place, itself included: (N or 1, size, 1); no more where none are left."""
    steps = torch.arange(1, size + 1, device=like.device)[None]
    if length % size:
        last = torch.full((-(-length // size), 1), size, device=like.device)
        last[-1] = length % size
        steps = torch.minimum(steps, last)
    return steps[..., None].to(like.dtype)


def one_a_head(scan: Scan) -> bool:
    """Whether one decay serves every token."""
    return scan.decay is not None and scan.decay.shape[-2] == 1 and scan.length > 1


def totals(scan: Scan, size: int) -> Tensor | None:
    """Sums of log decays since each chunk's start, (..., N or 1, size, 1 or F)."""
    if scan.decay is None:
        return None
    if one_a_head(scan):
        return scan.decay.unsqueeze(-3) * steps_in(scan.length, size, scan.q)
    return in_chunks(scan.decay.expand(*scan.decay.shape[:-2], scan.length, scan.decay.shape[-1]), size).cumsum(-2)


def segment(scan: Scan, state: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(o, the state after the last token, the states before each chunk (B, H, N, F, E))."""
    q, k, v = (in_chunks(x, size) for x in (scan.q, scan.k, scan.v))
    total = totals(scan, size)
    inside, into, out_of, fade = within(q, k, total, scan.lift)
    if scan.low is not None:
        a, b = (in_chunks(x, size) for x in scan.low)
        out, state, states = low_rank(inside, into, out_of, fade, (q, k, v, a, b), total, state)
    elif scan.beta is None:
        states, state = carry(out_of.transpose(-1, -2) @ v, fade, state)
        out = inside @ v + into @ states
    else:
        out, state, states = delta(inside, into, out_of, fade, k, v, in_chunks(scan.beta, size), total, state)
    return out.flatten(-3, -2)[..., : scan.length, :], state, states


def within(q: Tensor, k: Tensor, total: Tensor | None, lift: Lift | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(weights inside each chunk, queries that read the incoming state, keys that write the outgoing one, the state's decay)."""
    wide_q, wide_k = (q, k) if lift is None else (lift.query(q), lift.key(k))
    if total is None:
        return pairs(q, k, lift).tril(), wide_q, wide_k, None
    end = total[..., -1:, :]
    fade = torch.exp(end).transpose(-1, -2)
    into, out_of = wide_q * torch.exp(total), wide_k * torch.exp(end - total)
    if total.shape[-1] == 1:
        return pairs(q, k, lift) * decay_matrix(total), into, out_of, fade
    if holds(end > -SAFE, False):
        middle = total - end / 2
        return ((q * torch.exp(middle)) @ (k * torch.exp(-middle)).transpose(-1, -2)).tril(), into, out_of, fade
    return strong_decay(q, k, total), into, out_of, fade


def strong_decay(q: Tensor, k: Tensor, total: Tensor) -> Tensor:
    """Weights inside chunks when decay is too strong to be split into two factors: sub-chunks of SUB tokens.

    Between sub-chunks both factors refer to the start of the later one, so no exponent is positive; inside one, the sum over
    channels is formed pair by pair.
    """
    size = q.shape[-2]
    total = total.double()  # differences of long sums: float32 would lose the small ones
    rows = []
    for start in range(0, size, SUB):
        stop = min(start + SUB, size)
        mine, before = total[..., start:stop, :], total[..., :start, :]
        reference = total[..., start - 1 : start, :] if start else torch.zeros_like(mine[..., :1, :])
        parts = [near_weights(q[..., start:stop, :], k[..., start:stop, :], mine - reference)]
        if start:
            left = q[..., start:stop, :] * torch.exp(mine - reference).to(q.dtype)
            right = k[..., :start, :] * torch.exp(reference - before).to(q.dtype)
            parts.insert(0, left @ right.transpose(-1, -2))
        rows.append(pad(torch.cat(parts, -1), (0, size - stop)))
    return torch.cat(rows, -2)


def near_weights(q: Tensor, k: Tensor, total: Tensor) -> Tensor:
    """Weights inside sub-chunks from sums of log decays since each one's start: split in two factors where that is safe."""
    end = total[..., -1:, :]
    if holds(end > -SAFE, False):
        middle = (total - end / 2).to(q.dtype)
        return ((q * torch.exp(middle)) @ (k * torch.exp(-middle)).transpose(-1, -2)).tril()
    past = torch.ones(total.shape[-2], total.shape[-2], dtype=torch.bool, device=q.device).tril()[..., None]
    gap = (total.unsqueeze(-2) - total.unsqueeze(-3)).masked_fill(~past, float("-inf"))
    return torch.einsum("...ic,...jc,...ijc->...ij", q, k, torch.exp(gap).to(q.dtype))


def faded(state: Tensor, fade: Tensor | None, n: int) -> Tensor:
    """The state after the decay of chunk n."""
    return state if fade is None else state * (fade[..., 0, :, :] if fade.shape[-3] == 1 else fade[..., n, :, :])


def carry(writes: Tensor, fade: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """States at the start of each chunk (B, H, N, F, E), and after the last."""
    states = []
    for n in range(writes.shape[-3]):
        states.append(state)
        state = faded(state, fade, n) + writes[..., n, :, :]
    return torch.stack(states, -3), state


def wy(k: Tensor, v: Tensor, beta: Tensor, total: Tensor | None) -> tuple[Tensor, Tensor]:
    """(W, U) of the delta rule: a chunk that meets the state S writes U - W S in place of its values."""
    overlap, reads, _, _ = within(k, k, total)
    system = (beta * overlap).tril(-1) + torch.eye(k.shape[-2], dtype=k.dtype, device=k.device)
    solved = torch.linalg.solve_triangular(system, torch.cat((beta * reads, beta * v), -1), upper=False, unitriangular=True)
    w, u = solved.split((k.shape[-1], v.shape[-1]), -1)
    return w, u


def delta(
    inside: Tensor,
    into: Tensor,
    out_of: Tensor,
    fade: Tensor | None,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    total: Tensor | None,
    state: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The WY form: u = U - W S with both solved for all chunks at once."""
    w, u = wy(k, v, beta, total)
    written, states = [], []
    for n in range(k.shape[-3]):
        states.append(state)
        new = u[..., n, :, :] - w[..., n, :, :] @ state
        state = faded(state, fade, n) + out_of[..., n, :, :].transpose(-1, -2) @ new
        written.append(new)
    before = torch.stack(states, -3)
    return inside @ torch.stack(written, -3) + into @ before, state, before


def low_rank(
    inside: Tensor,
    into: Tensor,
    out_of: Tensor,
    fade: Tensor | None,
    tokens: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    total: Tensor | None,
    state: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `delta`, of q, k, v, a and b in chunks: what a reads of each chunk is solved for all chunks at once."""
    q, k, v, a, b = tokens
    next_by_key, next_reads, _, _ = within(later(a), k, total)
    by_key, by_insert = sooner(next_by_key), sooner(within(later(a), b, total)[0])
    reads = torch.cat((a[..., :1, :], next_reads[..., :-1, :]), -2)
    system = torch.eye(k.shape[-2], dtype=k.dtype, device=k.device) - by_insert
    solved = torch.linalg.solve_triangular(system, torch.cat((reads, by_key @ v), -1), upper=False, unitriangular=True)
    w, u = solved.split((k.shape[-1], v.shape[-1]), -1)
    insert, _, out_of_b, _ = within(q, b, total)
    erased, states = [], []
    for n in range(k.shape[-3]):
        states.append(state)
        erased.append(u[..., n, :, :] + w[..., n, :, :] @ state)
        wrote = out_of[..., n, :, :].mT @ v[..., n, :, :] + out_of_b[..., n, :, :].mT @ erased[-1]
        state = faded(state, fade, n) + wrote
    before = torch.stack(states, -3)
    return inside @ v + insert @ torch.stack(erased, -3) + into @ before, state, before
