"""Kernels of chunked recurrences (formulas in `engine.recurrent.chunk` and `.backward`): what stands inside chunks runs one program a chunk,
states run chunk after chunk, one program a head and block of values.

Tensors are float32, contiguous and padded: q, k (BH, N C, F), v (BH, N C, E), states (BH, N, F, E). KIND of decay: 0 none, 1 one a
token, G (BH, N C); 2 and 3 one a channel, G (BH, N C, F), 2 where a chunk's decay may be split into two factors.
"""

import triton
import triton.language as tl


@triton.jit
def product(a, b):
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def tile(P, rows, dims, WIDTH: tl.constexpr):
    """P[rows, dims] of rows WIDTH wide."""
    return P + rows[:, None] * WIDTH + dims[None, :]


@triton.jit
def load_decay(G, rows, dims, KIND: tl.constexpr, F: tl.constexpr):
    if KIND >= 2:
        return tl.load(tile(G, rows, dims, F))
    elif KIND == 1:
        return tl.load(G + rows)[:, None]
    else:
        return tl.zeros((rows.shape[0], 1), tl.float32)


@triton.jit
def since_start(g, dims, f, KIND: tl.constexpr):
    return tl.sum(tl.where((dims == f)[None, :], g, 0.0), 1)


@triton.jit
def weights(q, k, g, dims, KIND: tl.constexpr, C: tl.constexpr, F: tl.constexpr):
    """q_i . k_j e^{G_i - G_j} for j <= i, else 0."""
    at = tl.arange(0, C)
    past = at[:, None] >= at[None, :]
    if KIND <= 1:
        s = product(q, tl.trans(k)) * tl.exp(tl.minimum(g - tl.trans(g), 0.0))
    elif KIND == 2:
        middle = g - tl.min(g, 0)[None, :] * 0.5
        s = product(q * tl.exp(middle), tl.trans(k * tl.exp(-middle)))
    else:
        s = tl.zeros((C, C), tl.float32)
        for f in range(F):  # no exponent above zero is formed
            q_f, k_f, g_f = since_start(q, dims, f, KIND), since_start(k, dims, f, KIND), since_start(g, dims, f, KIND)
            s += q_f[:, None] * k_f[None, :] * tl.exp(tl.minimum(g_f[:, None] - g_f[None, :], 0.0))
    return tl.where(past, s, 0.0)


@triton.jit
def weights_back(q, k, g, w, d, dims, KIND: tl.constexpr, C: tl.constexpr, F: tl.constexpr):
    """Gradients of q, k and G from that of weights w; d is zero above the diagonal."""
    if KIND <= 1:
        p, moved = d * tl.exp(tl.minimum(g - tl.trans(g), 0.0)), d * w
        dq, dk = product(p, k), product(tl.trans(p), q)
        dg = (tl.sum(moved, 1) - tl.sum(moved, 0))[:, None]
    else:
        if KIND == 2:
            middle = g - tl.min(g, 0)[None, :] * 0.5
            up, down = tl.exp(middle), tl.exp(-middle)
            dq, dk = product(d, k * down) * up, product(tl.trans(d), q * up) * down
        else:
            dq, dk = tl.zeros((C, F), tl.float32), tl.zeros((C, F), tl.float32)
            for f in range(F):
                q_f, k_f, g_f = since_start(q, dims, f, KIND), since_start(k, dims, f, KIND), since_start(g, dims, f, KIND)
                p = d * tl.exp(tl.minimum(g_f[:, None] - g_f[None, :], 0.0))
                mine = (dims == f)[None, :]
                dq += tl.where(mine, tl.sum(p * k_f[None, :], 1)[:, None], 0.0)
                dk += tl.where(mine, tl.sum(p * q_f[:, None], 0)[:, None], 0.0)
        dg = q * dq - k * dk
    return dq, dk, dg


@triton.jit
def own_channels(x, KIND: tl.constexpr):
    """A gradient of log decays, summed over channels where they share one."""
    if KIND <= 1:
        return tl.sum(x, 1)[:, None]
    else:
        return x


@triton.jit
def solve_chunks(Q, K, V, G, Beta, W, U, T, KIND: tl.constexpr, C: tl.constexpr, F: tl.constexpr, E: tl.constexpr, BV: tl.constexpr):
    """T = (I + tril(beta K K^T o D, -1))^-1 of each chunk, W = T (beta k e^G), U = T (beta v)."""
    at, dims = tl.arange(0, C), tl.arange(0, F)
    rows = tl.program_id(0) * C + at
    k, g, beta = tl.load(tile(K, rows, dims, F)), load_decay(G, rows, dims, KIND, F), tl.load(Beta + rows)[:, None]
    system = tl.where(at[:, None] > at[None, :], beta * weights(k, k, g, dims, KIND, C, F), 0.0)
    eye = tl.where(at[:, None] == at[None, :], 1.0, 0.0)
    inverse = eye
    for i in range(1, C):  # forward substitution, a row at a time
        row = tl.sum(tl.where((at == i)[:, None], system, 0.0), 0)
        new = tl.sum(row[:, None] * inverse, 0)
        inverse = tl.where((at == i)[:, None], eye - new[None, :], inverse)
    tl.store(tile(T, rows, at, C), inverse)
    tl.store(tile(W, rows, dims, F), product(inverse, beta * k * tl.exp(g)))
    for part in range(E // BV):
        vdims = part * BV + tl.arange(0, BV)
        tl.store(tile(U, rows, vdims, E), product(inverse, beta * tl.load(tile(V, rows, vdims, E))))


@triton.jit
def run_states(
    K,
    U,
    G,
    W,
    First,
    States,
    Last,
    N,
    DELTA: tl.constexpr,
    KIND: tl.constexpr,
    C: tl.constexpr,
    F: tl.constexpr,
    E: tl.constexpr,
    BV: tl.constexpr,
):
    """States before each chunk, and after the last. With DELTA, U becomes what is written: U - W S."""
    bh, at, dims = tl.program_id(0), tl.arange(0, C), tl.arange(0, F)
    vdims = tl.program_id(1) * BV + tl.arange(0, BV)
    s = tl.load(tile(First, bh * F + dims, vdims, E))
    for n in range(N):
        rows = (bh * N + n) * C + at
        tl.store(tile(States, (bh * N + n) * F + dims, vdims, E), s)
        k, u, g = tl.load(tile(K, rows, dims, F)), tl.load(tile(U, rows, vdims, E)), load_decay(G, rows, dims, KIND, F)
        if DELTA:
            u -= product(tl.load(tile(W, rows, dims, F)), s)
            tl.store(tile(U, rows, vdims, E), u)
        end = tl.min(g, 0)[None, :]
        s = s * tl.trans(tl.exp(end)) + product(tl.trans(k * tl.exp(end - g)), u)
    tl.store(tile(Last, bh * F + dims, vdims, E), s)


@triton.jit
def read_chunks(Q, K, U, G, States, Out, KIND: tl.constexpr, C: tl.constexpr, F: tl.constexpr, E: tl.constexpr, BV: tl.constexpr):
    """o = A u + (q e^G) S."""
    chunk, at, dims = tl.program_id(0), tl.arange(0, C), tl.arange(0, F)
    rows, vdims = chunk * C + at, tl.program_id(1) * BV + tl.arange(0, BV)
    q, k, g = tl.load(tile(Q, rows, dims, F)), tl.load(tile(K, rows, dims, F)), load_decay(G, rows, dims, KIND, F)
    s, u = tl.load(tile(States, chunk * F + dims, vdims, E)), tl.load(tile(U, rows, vdims, E))
    tl.store(tile(Out, rows, vdims, E), product(weights(q, k, g, dims, KIND, C, F), u) + product(q * tl.exp(g), s))


@triton.jit
def told_back(Q, K, G, T, DO, Base, Slope, KIND: tl.constexpr, C: tl.constexpr, F: tl.constexpr, E: tl.constexpr, BV: tl.constexpr):
    """(I + N)^-T du = Base + Slope dS'."""
    at, dims = tl.arange(0, C), tl.arange(0, F)
    rows = tl.program_id(0) * C + at
    q, k, g = tl.load(tile(Q, rows, dims, F)), tl.load(tile(K, rows, dims, F)), load_decay(G, rows, dims, KIND, F)
    turned = tl.trans(tl.load(tile(T, rows, at, C)))
    tl.store(tile(Slope, rows, dims, F), product(turned, k * tl.exp(tl.min(g, 0)[None, :] - g)))
    into = product(turned, tl.trans(weights(q, k, g, dims, KIND, C, F)))
    for part in range(E // BV):
        vdims = part * BV + tl.arange(0, BV)
        tl.store(tile(Base, rows, vdims, E), product(into, tl.load(tile(DO, rows, vdims, E))))


@triton.jit
def run_states_back(
    Q,
    K,
    G,
    Beta,
    Base,
    Slope,
    DO,
    DLast,
    After,
    DFirst,
    N,
    DELTA: tl.constexpr,
    KIND: tl.constexpr,
    C: tl.constexpr,
    F: tl.constexpr,
    E: tl.constexpr,
    BV: tl.constexpr,
):
    """Gradients of the states after each chunk, and of the first."""
    bh, at, dims = tl.program_id(0), tl.arange(0, C), tl.arange(0, F)
    vdims = tl.program_id(1) * BV + tl.arange(0, BV)
    d = tl.load(tile(DLast, bh * F + dims, vdims, E))
    for back in range(N):
        n = N - 1 - back
        rows = (bh * N + n) * C + at
        tl.store(tile(After, (bh * N + n) * F + dims, vdims, E), d)
        q, g, do = tl.load(tile(Q, rows, dims, F)), load_decay(G, rows, dims, KIND, F), tl.load(tile(DO, rows, vdims, E))
        read = product(tl.trans(q * tl.exp(g)), do)
        if DELTA:
            reads = tl.load(Beta + rows)[:, None] * tl.load(tile(K, rows, dims, F)) * tl.exp(g)
            told = tl.load(tile(Base, rows, vdims, E)) + product(tl.load(tile(Slope, rows, dims, F)), d)
            read -= product(tl.trans(reads), told)
        d = d * tl.trans(tl.exp(tl.min(g, 0)[None, :])) + read
    tl.store(tile(DFirst, bh * F + dims, vdims, E), d)


@triton.jit
def chunks_back(
    Q,
    K,
    V,
    G,
    Beta,
    U,
    States,
    After,
    Base,
    Slope,
    DO,
    DQ,
    DK,
    DV,
    DG,
    DBeta,
    DELTA: tl.constexpr,
    KIND: tl.constexpr,
    C: tl.constexpr,
    F: tl.constexpr,
    E: tl.constexpr,
    BV: tl.constexpr,
):
    """Gradients of q, k, v, G and beta, of everything inside one chunk."""
    chunk, at, dims = tl.program_id(0), tl.arange(0, C), tl.arange(0, F)
    rows, past = chunk * C + at, at[:, None] >= at[None, :]
    q, k, g = tl.load(tile(Q, rows, dims, F)), tl.load(tile(K, rows, dims, F)), load_decay(G, rows, dims, KIND, F)
    end, up = tl.min(g, 0)[None, :], tl.exp(g)
    down = tl.exp(end - g)
    w = weights(q, k, g, dims, KIND, C, F)
    d_w, d_system = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    d_into, d_out_of, d_reads = tl.zeros((C, F), tl.float32), tl.zeros((C, F), tl.float32), tl.zeros((C, F), tl.float32)
    faded, d_beta = tl.zeros((1, F), tl.float32), tl.zeros((C, 1), tl.float32)
    beta = tl.load(Beta + rows)[:, None] if DELTA else d_beta
    for part in range(E // BV):
        vdims = part * BV + tl.arange(0, BV)
        do, u = tl.load(tile(DO, rows, vdims, E)), tl.load(tile(U, rows, vdims, E))
        s, after = tl.load(tile(States, chunk * F + dims, vdims, E)), tl.load(tile(After, chunk * F + dims, vdims, E))
        d_w += product(do, tl.trans(u))
        d_into += product(do, tl.trans(s))
        d_out_of += product(u, tl.trans(after))
        faded += tl.sum(s * after, 1)[None, :]
        if DELTA:
            solved = tl.load(tile(Base, rows, vdims, E)) + product(tl.load(tile(Slope, rows, dims, F)), after)
            error = tl.load(tile(V, rows, vdims, E)) - product(k * up, s)
            dv = beta * solved
            d_system -= product(solved, tl.trans(u))
            d_beta += tl.sum(solved * error, 1)[:, None]
            d_reads -= product(dv, tl.trans(s))
        else:
            dv = product(tl.trans(w), do) + product(k * down, after)
        tl.store(tile(DV, rows, vdims, E), dv)
    dq, dk, dg = weights_back(q, k, g, w, tl.where(past, d_w, 0.0), dims, KIND, C, F)
    out_of = k * down * d_out_of
    dq, dk = dq + d_into * up, dk + d_out_of * down
    dg += own_channels(q * up * d_into - out_of, KIND)
    d_end = own_channels(tl.sum(out_of, 0)[None, :] + faded * tl.exp(end), KIND)
    if DELTA:
        d_system = tl.where(at[:, None] > at[None, :], d_system, 0.0)
        overlap = weights(k, k, g, dims, KIND, C, F)
        d_beta += tl.sum(d_system * overlap, 1)[:, None]
        one, other, more = weights_back(k, k, g, overlap, beta * d_system, dims, KIND, C, F)
        dk += one + other + d_reads * up
        dg += more + own_channels(k * up * d_reads, KIND)
        tl.store(DBeta + rows[:, None], d_beta)
    tl.store(tile(DQ, rows, dims, F), dq)
    tl.store(tile(DK, rows, dims, F), dk)
    dg += tl.where((at == C - 1)[:, None], d_end, 0.0)
    if KIND >= 2:
        tl.store(tile(DG, rows, dims, F), dg)
    elif KIND == 1:
        tl.store(DG + rows[:, None], dg)
