"""The way back through chunks, by hand: forward keeps the states between chunks alone, everything inside them is made again.

With S, S' the states around a chunk, A its inside weights, and u what is written (see `chunk`):

    dS = (q e^G)^T do + e^{G_C} dS' - (k e^G)^T d_error,     du = A^T do + (k e^{G_C - G}) dS',     dA = do u^T,

for the delta rule (I + N) u = beta error, error = v - (k e^G) S: d_error = beta (I + N)^-T du and dN = -((I + N)^-T du) u^T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..exported import holds
from .chunk import SAFE, faded, in_chunks, one_a_head, steps_in, strong_decay, totals, within
from .parallel import decay_matrix
from .pose import Scan

Maybe = Tensor | None


def piece_shape(grad: Tensor, piece: Tensor) -> list[int]:
    """The shape of a gradient's rows that a piece belongs to: what was broadcast is summed."""
    return [*grad.shape[:-2], 1 if grad.shape[-2] == 1 else piece.shape[-2], grad.shape[-1]]


def segment_back(scan: Scan, states: Tensor, size: int, d_out: Tensor, d_end: Tensor) -> tuple[Maybe, ...]:
    """Gradients of q, k, v, decay, beta and of the state before the segment."""
    q, k, v, do = (in_chunks(x, size) for x in (scan.q, scan.k, scan.v, d_out))
    beta = None if scan.beta is None else in_chunks(scan.beta, size)
    total = totals(scan, size)
    inside, into, out_of, fade = within(q, k, total)
    d_beta: Maybe = None
    if beta is None:
        after, d_state = backwards(into.mT @ do, fade, d_end)
        u, du = v, inside.mT @ do + out_of @ after
        dv = du
    else:
        overlap, reads, _, _ = within(k, k, total)
        overlap = overlap.tril(-1)
        system = beta * overlap + torch.eye(size, dtype=q.dtype, device=q.device)
        error = v - reads @ states
        u = torch.linalg.solve_triangular(system, beta * error, upper=False, unitriangular=True)
        told = torch.linalg.solve_triangular(system.mT, torch.cat((inside.mT @ do, out_of), -1), upper=True, unitriangular=True)
        base, slope = told.split((v.shape[-1], k.shape[-1]), -1)  # (I + N)^-T du = base + slope dS'
        after, d_state = backwards(into.mT @ do - (beta * reads).mT @ base, fade, d_end, (beta * reads).mT @ slope)
        solved = base + slope @ after
        dv = beta * solved
        d_system = -(solved @ u.mT).tril(-1)
        d_beta = (solved * error).sum(-1, keepdim=True) + (d_system * overlap).sum(-1, keepdim=True)
    dq, dk, dt = pairs_back(q, k, total, (do @ u.mT).tril(), inside)
    d_into, d_out_of = do @ states.mT, u @ after.mT
    if total is None:
        dq, dk = dq + d_into, dk + d_out_of
    else:
        end = total[..., -1:, :]
        dq, dk = dq + d_into * torch.exp(total), dk + d_out_of * torch.exp(end - total)
        left = out_of * d_out_of
        assert dt is not None and fade is not None
        dt = dt + channels(into * d_into - left, total)
        d_end_total = channels(left.sum(-2, keepdim=True) + ((states * after).sum(-1, keepdim=True) * fade).mT, total)
        dt[..., -1:, :] += d_end_total
    if beta is not None:
        d_reads = -dv @ states.mT
        one, other, more = pairs_back(k, k, total, beta * d_system, overlap)
        dk = dk + one + other + (d_reads if total is None else d_reads * torch.exp(total))
        dt = None if dt is None or more is None else dt + more + channels(reads * d_reads, total)
    back = [None if x is None else x.flatten(-3, -2)[..., : scan.length, :] for x in (dq, dk, dv, d_beta)]
    return back[0], back[1], back[2], decay_back(scan, dt, size), back[3], d_state


def backwards(reads: Tensor, fade: Maybe, d_end: Tensor, erased: Maybe = None) -> tuple[Tensor, Tensor]:
    """(gradients of the states after each chunk, of the state before the first): dS = reads + e^{G_C} dS' - erased dS'."""
    after = []
    for n in reversed(range(reads.shape[-3])):
        after.append(d_end)
        rest = faded(d_end, fade, n) + reads[..., n, :, :]
        d_end = rest if erased is None else rest - erased[..., n, :, :] @ d_end
    return torch.stack(after[::-1], -3), d_end


def channels(x: Tensor, total: Maybe) -> Tensor:
    """A gradient of log decays, summed over channels where they share one."""
    return x.sum(-1, keepdim=True) if total is not None and total.shape[-1] == 1 else x


def pairs_back(q: Tensor, k: Tensor, total: Maybe, d: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Maybe]:
    """Gradients of q, k and log decays through the weights inside chunks, whose gradient d is zero above the diagonal."""
    if total is None:
        return d @ k, d.mT @ q, None
    if total.shape[-1] == 1:
        p, moved = d * decay_matrix(total), d * weights
        return p @ k, p.mT @ q, moved.sum(-1, keepdim=True) - moved.sum(-2).unsqueeze(-1)
    end = total[..., -1:, :]
    if holds(end > -SAFE, False):
        middle = total - end / 2
        up, down = torch.exp(middle), torch.exp(-middle)
        dq, dk = (d @ (k * down)) * up, (d.mT @ (q * up)) * down
        return dq, dk, q * dq - k * dk
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (q, k, total)]
        found = torch.autograd.grad(strong_decay(*leaves), leaves, d)
    return found[0], found[1], found[2]


def decay_back(scan: Scan, dt: Maybe, size: int) -> Maybe:
    """The gradient of log decays from that of their sums since each chunk's start."""
    if dt is None:
        return None
    if one_a_head(scan):
        return (dt * steps_in(scan.length, size, dt)).sum((-3, -2)).unsqueeze(-2)
    return dt.flip(-2).cumsum(-2).flip(-2).flatten(-3, -2)[..., : scan.length, :]
