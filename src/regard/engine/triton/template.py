"""The text of the weighted kernels. Only the lines marked {{...}} differ between mechanisms; they are printed from expressions.

One program works on BLOCK_M queries of one head (forward, dq) or BLOCK_N keys of one head (dk, dv) and walks the list of blocks
that hold visible pairs. Tensors are contiguous; side inputs come with strides that are 0 where they broadcast.
"""

COMMON = """\
import triton
import triton.language as tl


@triton.jit
def load_rows(P, base, rows, limit, channels, D: tl.constexpr):
    return tl.load(P + base + rows[:, None] * D + channels[None, :], mask=(rows[:, None] < limit) & (channels[None, :] < D), other=0.0)

"""

HEAD = """
@triton.jit
def forward(Q, K, V, Out, Total, Shift, {pointers}Lists, Lengths, Lq, Lk, offset, lists_b, lists_h, lists_q, lengths_b, lengths_h,
            {strides}HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
            D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr, SPLITS: tl.constexpr):
    block, bh, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = bh // HEADS, bh % HEADS
    kv = b * (HEADS // GROUP) + h // GROUP
    rows, dims, vdims = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, D_PAD), tl.arange(0, DV_PAD)
    i = (rows + offset)[:, None]
    q = load_rows(Q, bh * Lq * D, rows, Lq, dims, D)
    out = tl.zeros((BLOCK_M, DV_PAD), tl.float32)
    entries = tl.load(Lengths + b * lengths_b + h * lengths_h + block)
    share = (entries + SPLITS - 1) // SPLITS
"""

SCORES = """\
        entry = tl.load(Lists + b * lists_b + h * lists_h + block * lists_q + at)
        columns = (entry // 2) * BLOCK_N + tl.arange(0, BLOCK_N)
        j = columns[None, :]
        k = load_rows(K, kv * Lk * D, columns, Lk, dims, D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
{loads}
        seen = (j < Lk) & (rows[:, None] < Lq)
        if entry % 2 == 0:  # a partial block
{mask}
            seen = seen & keep
{position}
"""

FORWARD = """\
    total = tl.zeros((BLOCK_M,), tl.float32)
    {start}
    for at in range(split * share, tl.minimum(entries, (split + 1) * share)):
{scores}
        v = load_rows(V, kv * Lk * DV, columns, Lk, vdims, DV)
{shift}
{weights}
        w = tl.where(seen, w, 0.0)
{mass}
        out += tl.dot(w.to(v.dtype), v, input_precision="ieee")
    where = (split * tl.num_programs(1) + bh) * Lq + rows
    tl.store(Out + where[:, None] * DV + vdims[None, :], out, mask=(rows[:, None] < Lq) & (vdims[None, :] < DV))
    tl.store(Total + where, total, mask=rows < Lq)
    tl.store(Shift + where, {stored}, mask=rows < Lq)

"""

# The c for which a row's weights sum to one: Newton's method inside a bracket, then one pass that leaves out blocks of zeros.
ROOT_FORWARD = """\
    high = tl.full((BLOCK_M, 1), float("-inf"), tl.float32)
    for at in range(0, entries):
{scores}
        high = tl.maximum(high, tl.max(tl.where(seen, s, float("-inf")), 1, keep_dims=True))
    live = high > float("-inf")
    high = tl.where(live, high, 0.0)
{floor_loads}
{floor}
    low, high = high - tl.maximum(span, 0.0), high - tl.minimum(span, 0.0)
    c = low
    last = tl.full((BLOCK_M, 1), float("inf"), tl.float32)
    going, step = tl.max(tl.max(tl.where(live, 1.0, 0.0), 1), 0), 0
    while (going > 0.0) & (step < 40):
        excess, slope = tl.zeros((BLOCK_M, 1), tl.float32) - 1.0, tl.zeros((BLOCK_M, 1), tl.float32)
        for at in range(0, entries):
{deep_scores}
{slopes}
            excess += tl.sum(tl.where(seen, w, 0.0), 1, keep_dims=True)
            slope += tl.sum(tl.where(seen, u, 0.0), 1, keep_dims=True)
        low, high = tl.where(excess >= 0.0, c, low), tl.where(excess >= 0.0, high, c)
        new = c - excess / tl.where(slope == 0.0, -1.0, slope)
        near = 2e-7 * (1.0 + tl.abs(c))
        stuck = (tl.abs(excess) > 4.0 * near * (1.0 + tl.minimum(tl.abs(slope), 64.0))) & ((tl.abs(new - c) <= near) | (tl.abs(excess) > 0.5 * last))
        last = tl.abs(excess)
        new = tl.where((new >= low) & (new <= high) & (stuck == 0), new, (low + high) * 0.5)
        going = tl.max(tl.max(tl.where(live & (tl.abs(new - c) > near) & (high - low > near), 1.0, 0.0), 1), 0)
        c, step = new, step + 1
    c = tl.where(live, c, 0.0)
    for at in range(0, entries):
{scores}
{weights}
        w = tl.where(seen, w, 0.0)
        if tl.max(tl.max(w, 1), 0) > 0.0:
            v = load_rows(V, kv * Lk * DV, columns, Lk, vdims, DV)
            out += tl.dot(w.to(v.dtype), v, input_precision="ieee")
    where = (bh * Lq + rows)[:, None]
    tl.store(Out + where * DV + vdims[None, :], out, mask=(rows[:, None] < Lq) & (vdims[None, :] < DV))
    tl.store(Total + where, tl.zeros((BLOCK_M, 1), tl.float32) + 1.0, mask=rows[:, None] < Lq)
    tl.store(Shift + where, c, mask=rows[:, None] < Lq)

"""

BACKWARD = """
@triton.jit
def backward_{name}(Q, K, V, DO, DT, Shift, {results}, {pointers}Lists, Lengths, Lq, Lk, offset, lists_b, lists_h, lists_q, lengths_b, lengths_h,
            {strides}HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
            D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr):
    block, bh = tl.program_id(0), tl.program_id(1)
    b, h = bh // HEADS, bh % HEADS
    kv = b * (HEADS // GROUP) + h // GROUP
    dims, vdims = tl.arange(0, D_PAD), tl.arange(0, DV_PAD)
{enter}
    entries = tl.load(Lengths + b * lengths_b + h * lengths_h + block)
{before}
    for at in range(0, entries):
{pairs}
{gradients}
        w, ds = tl.where(seen, w, 0.0), tl.where(seen, ds, 0.0)
{gather}
{leave}

"""

PAIRS = """\
        entry = tl.load(Lists + b * lists_b + h * lists_h + block * lists_q + at)
{walk}
        i, j = (rows + offset)[:, None], columns[None, :]
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        gw = tl.dot(do, tl.trans(v), input_precision="ieee")
{loads}
        seen = (j < Lk) & (rows[:, None] < Lq)
        if entry % 2 == 0:
{mask}
            seen = seen & keep
"""

# ds = dw/ds (gw - gh) with gh = sum(u gw) / sum(u), u = dw/dc: found first for all of a row, and left for the walk over keys.
ROOT_BEFORE = """\
    mass, pulled = tl.zeros((BLOCK_M, 1), tl.float32), tl.zeros((BLOCK_M, 1), tl.float32)
    for at in range(0, entries):
{pairs}
{slopes}
        mass += tl.sum(tl.where(seen, u, 0.0), 1, keep_dims=True)
        pulled += tl.sum(tl.where(seen, u * gw, 0.0), 1, keep_dims=True)
    gh = pulled / tl.where(mass == 0.0, 1.0, mass)
    tl.store(DT + (bh * Lq + rows)[:, None], gh, mask=rows[:, None] < Lq)
"""

WALK_QUERIES = {
    "name": "dq",
    "results": "DQ",
    "enter": """\
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    q = load_rows(Q, bh * Lq * D, rows, Lq, dims, D)
    do = load_rows(DO, bh * Lq * DV, rows, Lq, vdims, DV)
    gh = tl.load(DT + bh * Lq + rows, mask=rows < Lq, other=0.0)[:, None]
    c = tl.load(Shift + bh * Lq + rows, mask=rows < Lq, other=0.0)[:, None]
    dq = tl.zeros((BLOCK_M, D_PAD), tl.float32)""",
    "walk": """\
        columns = (entry // 2) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = load_rows(K, kv * Lk * D, columns, Lk, dims, D)
        v = load_rows(V, kv * Lk * DV, columns, Lk, vdims, DV)""",
    "gather": '        dq += tl.dot(ds.to(k.dtype), k, input_precision="ieee")',
    "leave": """\
    where = (bh * Lq + rows)[:, None] * D + dims[None, :]
    tl.store(DQ + where, dq, mask=(rows[:, None] < Lq) & (dims[None, :] < D))""",
}

WALK_KEYS = {
    "name": "dkv",
    "results": "DK, DV_",
    "enter": """\
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = load_rows(K, kv * Lk * D, columns, Lk, dims, D)
    v = load_rows(V, kv * Lk * DV, columns, Lk, vdims, DV)
    dk = tl.zeros((BLOCK_N, D_PAD), tl.float32)
    dv = tl.zeros((BLOCK_N, DV_PAD), tl.float32)""",
    "walk": """\
        rows = (entry // 2) * BLOCK_M + tl.arange(0, BLOCK_M)
        q = load_rows(Q, bh * Lq * D, rows, Lq, dims, D)
        do = load_rows(DO, bh * Lq * DV, rows, Lq, vdims, DV)
        gh = tl.load(DT + bh * Lq + rows, mask=rows < Lq, other=0.0)[:, None]
        c = tl.load(Shift + bh * Lq + rows, mask=rows < Lq, other=0.0)[:, None]""",
    "gather": """\
        dk += tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision="ieee")
        dv += tl.dot(tl.trans(w.to(do.dtype)), do, input_precision="ieee")""",
    "leave": """\
    where = (bh * Lk + columns)[:, None]
    tl.store(DK + where * D + dims[None, :], dk, mask=(columns[:, None] < Lk) & (dims[None, :] < D))
    tl.store(DV_ + where * DV + vdims[None, :], dv, mask=(columns[:, None] < Lk) & (vdims[None, :] < DV))""",
}

SHIFT = {
    "start": 'top = tl.full((BLOCK_M,), float("-inf"), tl.float32)',
    "body": """\
        size = {size}
        new = tl.maximum(top, {clamped})
        base = tl.where(new > float("-inf"), new, 0.0)
        c = base[:, None]
        fade = tl.where(top > float("-inf"), tl.exp(top - base), 0.0)
        out, total, top = out * fade[:, None], total * fade, new""",
    "stored": "top",
}
