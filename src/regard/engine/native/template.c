/* Weighted attention on a CPU, forward and backward. The parts between @ signs are printed from a mechanism's traced functions;
 * everything else is the same for all of them.
 *
 * Work is cut into tiles of bq queries x bk keys that stay in the cache: a product, one pass of elementwise functions, a product.
 * q, k, v are float32, their channels padded to a multiple of NR; kt and vt are k and v with each block of keys turned into panels. */
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* A block of a product is MR x NR sums in registers, with room for two vectors of b and one of a; rows come in multiples of GR. */
#if defined(__AVX512F__)
#define LANES 16
#define MR 8
#define GR 8
#elif defined(__AVX__)
#define LANES 8
#define MR 6
#define GR 2
#else
#define LANES 4
#define MR 8
#define GR 8
#endif
#define NR (2 * LANES)
#define SIDES @SIDES@
#define SHIFTING @SHIFTING@
#define ROOT @ROOT@
#define DISTANCE @DISTANCE@ /* scores are |q - k|^2, not q . k */
#define INLINE static inline __attribute__((always_inline))
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

typedef struct Call {
    const float *q, *k, *v, *grad_out, *grad_total;
    float *kt, *vt, *out, *total, *shift, *dq, *dk, *dv;
    const float *side[SIDES + 1];
    float *grad_side[SIDES + 1];
    int64_t side_b[SIDES + 1], side_h[SIDES + 1], side_q[SIDES + 1];
    int64_t grad_slot[SIDES + 1], grad_head[SIDES + 1], grad_q[SIDES + 1];
    const int32_t *lists, *lengths; /* per query block: 2 * key block + (1 if all of it is visible) */
    int64_t list_b, list_h, list_q, length_b, length_h;
    const uint8_t *keep, *kind; /* of column order, else NULL: which blocks a query chose, and the kinds of blocks of bk x bk */
    int64_t keep_b, keep_h, kind_b, kind_h;
    int32_t batch, heads, group, q_len, k_len, k_pad, d, dv_size, bq, bk, slots, threads;
    int32_t unshifted; /* no score is large enough for exp to need a shift */
    int64_t units, next, failed;
    void (*work)(struct Call *, int64_t, float *);
    int64_t room; /* floats of scratch a thread needs */
} Call;

typedef struct {
    int b, h, i, row, j0, count;
    const float *side[SIDES + 1];
    float *grad[SIDES + 1];
} Row;

/* Elementary functions, branch-free so that loops over them vectorise; about one unit in the last place. */
INLINE float as_float(int32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
INLINE int32_t as_bits(float x) { int32_t bits; memcpy(&bits, &x, 4); return bits; }
INLINE float exp_(float x) { /* 0 below -87.7, infinite above 88.4, NaN stays NaN */
    x = x < -88.0f ? -88.0f : x;
    x = x > 88.8f ? 88.8f : x;
    const float magic = 12582912.0f + 127.0f; /* adding it rounds, and leaves n + 127 in the lowest bits */
    float t = x * 1.44269504f + magic, n = t - magic;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.375140273e-03f;
    p = p * r + 8.368917741e-03f;
    p = p * r + 4.166953266e-02f;
    p = p * r + 1.666651815e-01f;
    p = p * r + 4.999998808e-01f;
    p = p * (r * r) + r + 1.0f;
    return p * as_float(as_bits(t) << 23);
}
INLINE float log_(float x) {
    int32_t bits = as_bits(x < 1.17549435e-38f ? x * 8388608.0f : x);
    float e = (float)((bits >> 23) - 126) - (x < 1.17549435e-38f ? 23.0f : 0.0f);
    float m = as_float((bits & 0x007fffff) | 0x3f000000); /* in [0.5, 1) */
    int low = m < 0.707106781f;
    e = low ? e - 1.0f : e;
    m = low ? m + m - 1.0f : m - 1.0f;
    float z = m * m, p = 7.0376836292e-2f;
    p = p * m - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    float y = m * z * p - 2.12194440e-4f * e - 0.5f * z + m + 0.693359375f * e;
    float end = x == 0.0f ? -INFINITY : NAN;
    y = x < INFINITY ? y : x;
    return x > 0.0f ? y : end;
}
INLINE float expm1_(float x) {
    float p = 1.98412698e-4f;
    p = p * x + 1.38888889e-3f;
    p = p * x + 8.33333333e-3f;
    p = p * x + 4.16666667e-2f;
    p = p * x + 1.66666667e-1f;
    p = p * x + 0.5f;
    float near = p * x * x + x, far = exp_(x) - 1.0f;
    return fabsf(x) < 0.35f ? near : far;
}
INLINE float log1p_(float x) {
    float u = 1.0f + x, y = log_(u), d = u - 1.0f;
    return u == INFINITY ? u : d == 0.0f ? x : u > 0.0f ? y + (x - d) / u : y;
}
INLINE float sigmoid_(float x) { return 1.0f / (1.0f + exp_(-x)); }
INLINE float tanh_(float x) {
    float z = x * x, p = -5.70498872745e-3f;
    p = p * z + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    float near = p * z * x + x, far = 1.0f - 2.0f / (exp_(2.0f * fabsf(x)) + 1.0f);
    return fabsf(x) < 0.625f ? near : x < 0.0f ? -far : far;
}
INLINE float pow_sign_(float y) { /* what a negative base does to x^y: 1, -1, or no number unless y is whole */
    float whole = __builtin_rintf(y) - y, half = y * 0.5f, even = __builtin_rintf(half) - half;
    return whole != 0.0f ? NAN : even != 0.0f ? -1.0f : 1.0f;
}
INLINE float pow_(float x, float y, float sign) {
    float l = log_(fabsf(x));
    l = l < -1e30f ? -1e30f : l > 1e30f ? 1e30f : l;
    float m = exp_(y * l);
    return x < 0.0f ? m * sign : m;
}
INLINE float sign_(float x) { return (float)((x > 0.0f) - (x < 0.0f)); }
INLINE int mod_(int a, int b) { int r = a % b; return r != 0 && ((r < 0) != (b < 0)) ? r + b : r; }
INLINE int floordiv_(int a, int b) { return (a - mod_(a, b)) / b; }
INLINE float fmod_(float a, float b) { return a - __builtin_floorf(a / b) * b; }

/* c[m, n] (+)= sum_k a[m * am + k * ak] b[k * ldb + n] for `rows` x NR sums. */
INLINE void micro(const int rows, const float *a, int am, int ak, const float *b, int ldb, float *c, int64_t ldc, int depth, int add) {
    vec sum[8][2]; /* as many as any block has */
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < 2; n++) sum[m][n] = add ? *(const vec *)(c + m * ldc + n * LANES) : (vec){0};
    for (int k = 0; k < depth; k++) {
        vec b0 = *(const vec *)(b + (int64_t)k * ldb), b1 = *(const vec *)(b + (int64_t)k * ldb + LANES);
        for (int m = 0; m < rows; m++) {
            float x = a[m * am + k * ak];
            sum[m][0] += x * b0;
            sum[m][1] += x * b1;
        }
    }
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < 2; n++) *(vec *)(c + m * ldc + n * LANES) = sum[m][n];
}
/* All rows of NR columns; what does not fill a block of MR goes in smaller ones, 8 = 4 + 4 rather than 6 + 2. */
INLINE void strip(int rows, const float *a, int am, int ak, const float *b, int ldb, float *c, int64_t ldc, int depth, int add) {
    int m = 0;
    for (; rows - m >= MR && (GR == MR || rows - m != MR + GR); m += MR) micro(MR, a + m * am, am, ak, b, ldb, c + m * ldc, ldc, depth, add);
    if (GR < MR)
        for (; rows - m >= 2 * GR; m += 2 * GR) micro(2 * GR, a + m * am, am, ak, b, ldb, c + m * ldc, ldc, depth, add);
    for (; m < rows; m += GR) micro(GR, a + m * am, am, ak, b, ldb, c + m * ldc, ldc, depth, add);
}
/* The same for any number of columns; b's next NR columns are `panel` further on: NR where its rows are whole. */
static void product(int rows, int columns, int depth, const float *a, int am, int ak, const float *b, int ldb, int64_t panel, float *c, int64_t ldc, int add) {
    if (ak == 1)
        for (int n = 0; n < columns; n += NR) strip(rows, a, am, 1, b + n / NR * panel, ldb, c + n, ldc, depth, add);
    else
        for (int n = 0; n < columns; n += NR) strip(rows, a, 1, ak, b + n / NR * panel, ldb, c + n, ldc, depth, add);
}

/* Raw scores of a tile: a row of q (depth wide) against turned keys. Distances are summed from differences, which do not cancel. */
INLINE void score(int rows, int columns, int depth, const float *q, const float *kt, float *s, int64_t lds) {
    if (!DISTANCE) {
        product(rows, columns, depth, q, depth, 1, kt, NR, (int64_t)depth * NR, s, lds, 0);
        return;
    }
    for (int n = 0; n < columns; n += NR)
        for (int m = 0; m < rows; m += GR) {
            vec sum[GR][2] = {{{0}}};
            for (int k = 0; k < depth; k++) {
                const float *b = kt + ((int64_t)n / NR * depth + k) * NR;
                const vec b0 = *(const vec *)b, b1 = *(const vec *)(b + LANES);
                for (int r = 0; r < GR; r++) {
                    const float x = q[(m + r) * depth + k];
                    const vec d0 = x - b0, d1 = x - b1;
                    sum[r][0] += d0 * d0;
                    sum[r][1] += d1 * d1;
                }
            }
            for (int r = 0; r < GR; r++)
                for (int t = 0; t < 2; t++) *(vec *)(s + (m + r) * lds + n + t * LANES) = sum[r][t];
        }
}

/* The mechanism: a row of a tile at a time. */
INLINE float move(const Row *r, float *restrict x, int partial) {
    float top = -INFINITY;
    const int b = r->b, h = r->h, i = r->i, j0 = r->j0, count = r->count;
    (void)b, (void)h, (void)i, (void)j0;
@ROW_LOADS@
@SEEN_FIXED@
@POSITION_FIXED@
#pragma omp simd reduction(max : top)
    for (int at = 0; at < count; at++) {
        const int j = j0 + at;
        (void)j;
@PAIR_LOADS@
@SEEN@
        const int seen = !partial || keep;
        float s = x[at];
@POSITION@
        float size = seen ? @SIZE@ : -INFINITY;
        top = size > top ? size : top;
        x[at] = ROOT && !seen ? -INFINITY : s;
    }
    return top;
}

INLINE int weigh(const Row *r, float *restrict x, float c, float *total, int partial) {
    float mass = 0.0f, any = 0.0f;
    const int b = r->b, h = r->h, i = r->i, j0 = r->j0, count = r->count;
    (void)b, (void)h, (void)i, (void)j0, (void)c;
@ROW_LOADS@
@SEEN_FIXED@
@WEIGHT_FIXED@
#pragma omp simd reduction(+ : mass) reduction(max : any)
    for (int at = 0; at < count; at++) {
        const int j = j0 + at;
        (void)j;
@PAIR_LOADS@
@SEEN@
        const int seen = !partial || keep;
        float s = x[at];
@WEIGHT@
        x[at] = seen ? w : 0.0f;
        mass += seen ? m : 0.0f;
        if (ROOT) any = x[at] > any ? x[at] : any;
    }
    *total += mass;
    return any > 0.0f;
}

/* x: raw scores -> weights; g: gradients of weights -> gradients of scores; even: what a root's own movement takes off g. */
INLINE void pull(const Row *r, float *restrict x, float *restrict g, float c, float gh, float even, int partial) {
    const int b = r->b, h = r->h, i = r->i, j0 = r->j0, count = r->count;
    (void)b, (void)h, (void)i, (void)j0, (void)c, (void)gh;
@ROW_LOADS@
@SEEN_FIXED@
@PULLBACK_FIXED@
@GRAD_START@
#pragma omp simd @GRAD_SUMS@
    for (int at = 0; at < count; at++) {
        const int j = j0 + at;
        (void)j;
@PAIR_LOADS@
@SEEN@
        const int seen = !partial || keep;
        float s = x[at];
        const float gw = g[at] - even;
@PULLBACK@
        x[at] = seen ? w : 0.0f;
        g[at] = seen ? ds : 0.0f;
@GRAD_STEP@
    }
@GRAD_END@
}

#if ROOT
/* Sums over a row of weights and of their slopes in c. */
INLINE void slopes(const Row *r, const float *restrict x, const float *restrict g, int count, float c, float *weight, float *slope, float *pulled) {
    float weights = 0.0f, us = 0.0f, gs = 0.0f;
    const int b = r->b, h = r->h, i = r->i;
    (void)b, (void)h, (void)i;
@SCALAR_LOADS@
@SLOPE_FIXED@
#pragma omp simd reduction(+ : weights, us, gs)
    for (int at = 0; at < count; at++) {
        const float s = x[at];
        const int seen = s > -INFINITY;
@SLOPE@
        weights += seen ? w : 0.0f;
        us += seen ? u : 0.0f;
        if (g) gs += seen ? u * g[at] : 0.0f;
    }
    *weight += weights, *slope += us, *pulled += gs;
}

/* The c at which the row's weights sum to 1: only scores above max - |floor| can weigh anything. Newton's method kept in a bracket. */
static float root(const Row *r, const float *x, int count, float top, float *few) {
    const int b = r->b, h = r->h, i = r->i;
    (void)b, (void)h, (void)i;
    if (!(top > -INFINITY)) return 0.0f;
@SCALAR_LOADS@
@FLOOR@
    float low = span < 0.0f ? top : top - span, high = span < 0.0f ? top - span : top, c = low;
    const float cut = top - fabsf(span);
    float last = INFINITY;
    int kept = 0;
    for (int from = 0; from < count; from += 64) {
        int to = from + 64 < count ? from + 64 : count;
        float best = -INFINITY;
#pragma omp simd reduction(max : best)
        for (int at = from; at < to; at++) best = x[at] > best ? x[at] : best;
        if (best > cut)
            for (int at = from; at < to; at++) {
                few[kept] = x[at];
                kept += x[at] > cut;
            }
    }
    for (int step = 0; step < 60; step++) {
        float weight = 0.0f, slope = 0.0f, none = 0.0f;
        slopes(r, few, NULL, kept, c, &weight, &slope, &none);
        float excess = weight - 1.0f, next = slope == 0.0f ? NAN : c - excess / slope;
        if (excess >= 0.0f) low = c; else high = c;
        /* Where weights rise steeply steps may be tiny far from the root, or go back and forth around it. */
        const float near = 1e-7f * (1.0f + fabsf(c));
        const float steep = fabsf(slope) < 64.0f ? fabsf(slope) : 64.0f, noise = 4.0f * near * (1.0f + steep);
        int stuck = fabsf(excess) > noise && (fabsf(next - c) <= near || fabsf(excess) > 0.5f * last);
        last = fabsf(excess);
        if (!(next >= low && next <= high) || stuck) next = 0.5f * (low + high);
        float moved = fabsf(next - c);
        c = next;
        if (!(moved > near) || !(high - low > near)) break;
    }
    return c;
}
#endif

INLINE Row row_of(const Call *p, int b, int h, int row, int slot) {
    Row r = {.b = b, .h = h, .row = row, .i = row + p->k_len - p->q_len};
    for (int t = 0; t < SIDES; t++) {
        r.side[t] = p->side[t] + b * p->side_b[t] + h * p->side_h[t] + row * p->side_q[t];
        if (p->grad_side[t])
            r.grad[t] = p->grad_side[t] + slot * p->grad_slot[t] + ((int64_t)b * p->heads + h) * p->grad_head[t] + row * p->grad_q[t];
    }
    return r;
}

INLINE void fill(float *to, const float *from, int rows, int width) {
    memcpy(to, from, sizeof(float) * (size_t)rows * width);
    int whole = (rows + GR - 1) / GR * GR;
    if (whole > rows) memset(to + (size_t)rows * width, 0, sizeof(float) * (size_t)(whole - rows) * width);
}

/* The block of keys (and its length) that an entry of a list names. */
INLINE int enter(const Call *p, int32_t entry, int *j0) {
    *j0 = entry / 2 * p->bk;
    return *j0 + p->bk < p->k_len ? p->bk : p->k_len - *j0;
}

/* Fade what a row has gathered when its shift rises. */
INLINE float raise_shift(float *c, float top, float *total, float *out, int width, int clamp) {
    float old = *c;
    if (clamp && top < 0.0f) top = 0.0f;
    if (top > old) {
        if (old > -INFINITY) {
            float fade = exp_(old - top);
            *total *= fade;
            for (int n = 0; n < width; n++) out[n] *= fade;
        }
        *c = old = top;
    }
    return old > -INFINITY ? old : 0.0f;
}

static void forward_rows(Call *p, int64_t unit, float *room) {
    const int blocks = (p->q_len + p->bq - 1) / p->bq, block = blocks - 1 - unit % blocks; /* the longest first, where causal */
    const int n = unit / blocks, b = n / p->heads, h = n % p->heads;
    const int first = block * p->bq, rows = first + p->bq < p->q_len ? p->bq : p->q_len - first, whole = (rows + GR - 1) / GR * GR;
    const int64_t kv = (int64_t)b * (p->heads / p->group) + h / p->group, at = (int64_t)n * p->q_len + first;
    const int32_t *list = p->lists + b * p->list_b + h * p->list_h + block * p->list_q;
    const int entries = p->lengths[b * p->length_b + h * p->length_h + block];
    const int64_t wide = ROOT ? (int64_t)entries * p->bk : p->bk;
    float *q = room, *out = q + p->bq * p->d, *total = out + p->bq * p->dv_size, *c = total + p->bq, *few = c + p->bq, *s = ROOT ? few + wide : few;
    fill(q, p->q + at * p->d, rows, p->d);
    memset(out, 0, sizeof(float) * (size_t)whole * p->dv_size);
    for (int m = 0; m < rows; m++) total[m] = 0.0f, c[m] = SHIFTING && !p->unshifted ? -INFINITY : 0.0f;
    if (ROOT) {
        for (int e = 0; e < entries; e++) {
            int j0, count = enter(p, list[e], &j0);
            score(whole, p->bk, p->d, q, p->kt + (kv * p->k_pad + j0) * p->d, s + (int64_t)e * p->bk, wide);
            for (int m = 0; m < rows; m++) {
                Row r = row_of(p, b, h, first + m, 0);
                r.j0 = j0, r.count = count;
                float *x = s + m * wide + (int64_t)e * p->bk, top = list[e] & 1 ? move(&r, x, 0) : move(&r, x, 1);
                for (int t = count; t < p->bk; t++) x[t] = -INFINITY;
                c[m] = e == 0 || top > c[m] ? top : c[m];
            }
        }
#if ROOT
        for (int m = 0; m < rows; m++) {
            Row r = row_of(p, b, h, first + m, 0);
            c[m] = entries ? root(&r, s + m * wide, wide, c[m], few) : 0.0f;
        }
#endif
    }
    for (int e = 0; e < entries; e++) {
        int j0, count = enter(p, list[e], &j0), any = !ROOT;
        float *tile = ROOT ? s + (int64_t)e * p->bk : s;
        if (!ROOT) score(whole, p->bk, p->d, q, p->kt + (kv * p->k_pad + j0) * p->d, s, p->bk);
        for (int m = 0; m < rows; m++) {
            Row r = row_of(p, b, h, first + m, 0);
            r.j0 = j0, r.count = count;
            float *x = tile + m * wide, shift = c[m];
            if (SHIFTING && !p->unshifted) {
                float top = list[e] & 1 ? move(&r, x, 0) : move(&r, x, 1);
                shift = raise_shift(c + m, top, total + m, out + m * p->dv_size, p->dv_size, @CLAMP@);
            }
            any |= list[e] & 1 ? weigh(&r, x, shift, total + m, 0) : weigh(&r, x, shift, total + m, 1);
        }
        if (any) product(whole, p->dv_size, count, tile, wide, 1, p->v + (kv * p->k_len + j0) * p->dv_size, p->dv_size, NR, out, p->dv_size, 1);
    }
    memcpy(p->out + at * p->dv_size, out, sizeof(float) * (size_t)rows * p->dv_size);
    for (int m = 0; m < rows; m++) p->total[at + m] = total[m], p->shift[at + m] = c[m] > -INFINITY ? c[m] : 0.0f;
}

#if !ROOT
/* For each block of keys the queries that chose it and see any of it, laid end to end: `starts` and, behind it, the queries. */
static int32_t *queries_of_blocks(const Call *p, int b, int h) {
    const int blocks = p->k_pad / p->bk;
    const uint8_t *keep = p->keep + b * p->keep_b + h * p->keep_h, *kind = p->kind + b * p->kind_b + h * p->kind_h;
    int64_t kept = 0;
    for (int64_t at = 0; at < (int64_t)p->q_len * blocks; at++) kept += keep[at];
    int32_t *starts = malloc(sizeof(int32_t) * (size_t)(2 * blocks + 2 + kept)), *next = starts + blocks + 1, *queries = next + blocks + 1;
    if (!starts) return NULL;
    memset(next, 0, sizeof(int32_t) * (size_t)(blocks + 1));
    for (int fill = 0; fill < 2; fill++) {
        for (int row = 0; row < p->q_len; row++) {
            const uint8_t *mine = keep + (int64_t)row * blocks, *seen = kind + (int64_t)(row / p->bk) * blocks;
            for (int block = 0; block < blocks; block++)
                if (mine[block] && seen[block]) {
                    if (fill) queries[next[block]] = row;
                    next[block]++;
                }
        }
        if (!fill) {
            starts[0] = 0;
            for (int block = 0; block < blocks; block++) starts[block + 1] = starts[block] + next[block], next[block] = starts[block];
        }
    }
    return starts;
}

/* One head at a time, block of keys by block, with the queries that chose it: the order when every query chooses for itself. */
static void forward_columns(Call *p, int64_t n, float *room) {
    const int b = n / p->heads, h = n % p->heads, blocks = p->k_pad / p->bk, width = p->dv_size;
    const int64_t kv = (int64_t)b * (p->heads / p->group) + h / p->group, at = n * p->q_len;
    float *q = room, *out = q + p->bq * p->d, *s = out + p->bq * width;
    const uint8_t *kind = p->kind + b * p->kind_b + h * p->kind_h;
    int32_t *starts = queries_of_blocks(p, b, h), *chosen = starts + 2 * blocks + 2;
    if (!starts) { p->failed = 1; return; }
    memset(p->out + at * width, 0, sizeof(float) * (size_t)p->q_len * width);
    for (int m = 0; m < p->q_len; m++) p->total[at + m] = 0.0f, p->shift[at + m] = SHIFTING && !p->unshifted ? -INFINITY : 0.0f;
    for (int block = 0; block < blocks; block++) {
        const int32_t from = starts[block], to = starts[block + 1];
        const int j0 = block * p->bk, count = j0 + p->bk < p->k_len ? p->bk : p->k_len - j0;
        for (int32_t start = from; start < to; start += p->bq) {
            const int rows = start + p->bq < to ? p->bq : to - start, whole = (rows + GR - 1) / GR * GR;
            for (int m = 0; m < rows; m++) memcpy(q + m * p->d, p->q + (at + chosen[start + m]) * p->d, sizeof(float) * p->d);
            score(whole, p->bk, p->d, q, p->kt + (kv * p->k_pad + j0) * p->d, s, p->bk);
            for (int m = 0; m < rows; m++) {
                const int row = chosen[start + m], full = kind[(int64_t)(row / p->bk) * blocks + block] == 2;
                Row r = row_of(p, b, h, row, 0);
                r.j0 = j0, r.count = count;
                float *x = s + m * p->bk, shift = 0.0f;
                if (SHIFTING && !p->unshifted) {
                    float top = full ? move(&r, x, 0) : move(&r, x, 1);
                    shift = raise_shift(p->shift + at + row, top, p->total + at + row, p->out + (at + row) * width, width, @CLAMP@);
                }
                if (full) weigh(&r, x, shift, p->total + at + row, 0); else weigh(&r, x, shift, p->total + at + row, 1);
            }
            product(whole, width, count, s, p->bk, 1, p->v + (kv * p->k_len + j0) * width, width, NR, out, width, 0);
            for (int m = 0; m < rows; m++) {
                float *into = p->out + (at + chosen[start + m]) * width;
                for (int t = 0; t < width; t++) into[t] += out[m * width + t];
            }
        }
    }
    for (int m = 0; m < p->q_len; m++) p->shift[at + m] = p->shift[at + m] > -INFINITY ? p->shift[at + m] : 0.0f;
    free(starts);
}
#endif

/* The gradients one tile gives, added to dq (local), dk and dv. */
INLINE void backward_tile(Call *p, int b, int h, int slot, const int32_t *row_of_m, int first, int rows, int32_t entry, const float *even,
                          const float *q, const float *grad, float *dq, float *s, float *g, float *dk, float *dv, int64_t kv) {
    const int whole = (rows + GR - 1) / GR * GR;
    int j0, count = enter(p, entry, &j0);
    const int columns = (count + GR - 1) / GR * GR;
    const int64_t n = (int64_t)b * p->heads + h;
    score(whole, p->bk, p->d, q, p->kt + (kv * p->k_pad + j0) * p->d, s, p->bk);
    product(whole, p->bk, p->dv_size, grad, p->dv_size, 1, p->vt + (kv * p->k_pad + j0) * p->dv_size, NR, (int64_t)p->dv_size * NR, g, p->bk, 0);
    for (int m = 0; m < rows; m++) {
        const int row = row_of_m ? row_of_m[m] : first + m;
        Row r = row_of(p, b, h, row, slot);
        r.j0 = j0, r.count = count;
        float *x = s + m * p->bk, *y = g + m * p->bk, c = p->shift[n * p->q_len + row], gh = p->grad_total[n * p->q_len + row];
        const int full = row_of_m ? p->kind[b * p->kind_b + h * p->kind_h + (int64_t)(row / p->bk) * (p->k_pad / p->bk) + entry / 2] == 2 : entry & 1;
        if (full) pull(&r, x, y, c, gh, even ? even[m] : 0.0f, 0); else pull(&r, x, y, c, gh, even ? even[m] : 0.0f, 1);
    }
    product(columns, p->dv_size, rows, s, 1, p->bk, grad, p->dv_size, NR, dv + (int64_t)j0 * p->dv_size, p->dv_size, 1);
#if DISTANCE /* d |q - k|^2 = 2 (q - k) (dq - dk): the products below with -2 g, and each side times its own sums of that */
    for (int m = 0; m < rows; m++) {
        float sum = 0.0f, *own = g + m * p->bk;
        for (int t = 0; t < count; t++) own[t] *= -2.0f, sum += own[t];
        for (int t = 0; t < p->d; t++) dq[m * p->d + t] -= sum * q[m * p->d + t];
    }
    for (int t = 0; t < count; t++) {
        float sum = 0.0f;
        for (int m = 0; m < rows; m++) sum += g[m * p->bk + t];
        for (int e = 0; e < p->d; e++) dk[(int64_t)(j0 + t) * p->d + e] -= sum * p->k[(kv * p->k_len + j0 + t) * p->d + e];
    }
#endif
    product(columns, p->d, rows, g, 1, p->bk, q, p->d, NR, dk + (int64_t)j0 * p->d, p->d, 1);
    product(whole, p->d, count, g, p->bk, 1, p->k + (kv * p->k_len + j0) * p->d, p->d, NR, dq, p->d, 1);
}

/* One head of keys and a share of its queries; dk and dv of each share are summed by the caller. */
static void backward_rows(Call *p, int64_t unit, float *room) {
    const int kv_heads = p->heads / p->group, slot = unit / ((int64_t)p->batch * kv_heads);
    const int64_t kv = unit % ((int64_t)p->batch * kv_heads);
    const int b = kv / kv_heads, blocks = (p->q_len + p->bq - 1) / p->bq;
    float *q = room, *grad = q + p->bq * p->d, *dq = grad + p->bq * p->dv_size, *even = dq + p->bq * p->d, *s = even + p->bq, *g = s + (int64_t)p->bq * p->bk;
    float *dk = p->dk + (slot * (int64_t)p->batch * kv_heads + kv) * p->k_pad * p->d, *dv = p->dv + (slot * (int64_t)p->batch * kv_heads + kv) * p->k_pad * p->dv_size;
    for (int h = kv % kv_heads * p->group, last = h + p->group; h < last; h++)
        for (int block = slot; block < blocks; block += p->slots) {
            const int first = block * p->bq, rows = first + p->bq < p->q_len ? p->bq : p->q_len - first;
            const int64_t at = ((int64_t)b * p->heads + h) * p->q_len + first;
            const int32_t *list = p->lists + b * p->list_b + h * p->list_h + block * p->list_q;
            const int entries = p->lengths[b * p->length_b + h * p->length_h + block], whole = (rows + GR - 1) / GR * GR;
            fill(q, p->q + at * p->d, rows, p->d);
            fill(grad, p->grad_out + at * p->dv_size, rows, p->dv_size);
            memset(dq, 0, sizeof(float) * (size_t)whole * p->d);
#if ROOT
            uint8_t used[entries + 1];
            float slope[p->bq], pulled[p->bq];
            memset(slope, 0, sizeof slope), memset(pulled, 0, sizeof pulled);
            for (int e = 0; e < entries; e++) {
                int j0, count = enter(p, list[e], &j0);
                float weight = 0.0f;
                score(whole, p->bk, p->d, q, p->kt + (kv * p->k_pad + j0) * p->d, s, p->bk);
                product(whole, p->bk, p->dv_size, grad, p->dv_size, 1, p->vt + (kv * p->k_pad + j0) * p->dv_size, NR, (int64_t)p->dv_size * NR, g, p->bk, 0);
                float before = 0.0f, after = 0.0f;
                for (int m = 0; m < rows; m++) {
                    Row r = row_of(p, b, h, first + m, slot);
                    r.j0 = j0, r.count = count;
                    if (list[e] & 1) move(&r, s + m * p->bk, 0); else move(&r, s + m * p->bk, 1);
                    before += fabsf(slope[m]);
                    slopes(&r, s + m * p->bk, g + m * p->bk, count, p->shift[at + m], &weight, slope + m, pulled + m);
                    after += fabsf(slope[m]);
                }
                used[e] = weight > 0.0f || after != before; /* a block without weights or slopes has no gradients */
            }
            for (int m = 0; m < rows; m++) even[m] = slope[m] != 0.0f ? pulled[m] / slope[m] : 0.0f;
            for (int e = 0; e < entries; e++)
                if (used[e]) backward_tile(p, b, h, slot, NULL, first, rows, list[e], even, q, grad, dq, s, g, dk, dv, kv);
#else
            for (int e = 0; e < entries; e++) backward_tile(p, b, h, slot, NULL, first, rows, list[e], NULL, q, grad, dq, s, g, dk, dv, kv);
#endif
            memcpy(p->dq + at * p->d, dq, sizeof(float) * (size_t)rows * p->d);
        }
}

#if !ROOT
static void backward_columns(Call *p, int64_t kv, float *room) {
    const int kv_heads = p->heads / p->group, b = kv / kv_heads, blocks = p->k_pad / p->bk;
    float *q = room, *grad = q + p->bq * p->d, *dq = grad + p->bq * p->dv_size, *s = dq + p->bq * p->d, *g = s + (int64_t)p->bq * p->bk;
    float *dk = p->dk + kv * p->k_pad * p->d, *dv = p->dv + kv * p->k_pad * p->dv_size;
    for (int h = kv % kv_heads * p->group, last = h + p->group; h < last; h++) {
        const int64_t n = (int64_t)b * p->heads + h, at = n * p->q_len;
        int32_t *starts = queries_of_blocks(p, b, h), *chosen = starts + 2 * blocks + 2;
        if (!starts) { p->failed = 1; return; }
        memset(p->dq + at * p->d, 0, sizeof(float) * (size_t)p->q_len * p->d);
        for (int block = 0; block < blocks; block++) {
            const int32_t from = starts[block], to = starts[block + 1];
            for (int32_t start = from; start < to; start += p->bq) {
                const int rows = start + p->bq < to ? p->bq : to - start, whole = (rows + GR - 1) / GR * GR;
                for (int m = 0; m < rows; m++) {
                    memcpy(q + m * p->d, p->q + (at + chosen[start + m]) * p->d, sizeof(float) * p->d);
                    memcpy(grad + m * p->dv_size, p->grad_out + (at + chosen[start + m]) * p->dv_size, sizeof(float) * p->dv_size);
                }
                memset(dq, 0, sizeof(float) * (size_t)whole * p->d);
                backward_tile(p, b, h, 0, chosen + start, 0, rows, 2 * block, NULL, q, grad, dq, s, g, dk, dv, kv);
                for (int m = 0; m < rows; m++)
                    for (int t = 0; t < p->d; t++) p->dq[(at + chosen[start + m]) * p->d + t] += dq[m * p->d + t];
            }
        }
        free(starts);
    }
}
#endif

/* A block of keys or values turned into panels of NR keys, in each channels first, zeros beyond the end; 16 x 16 at a time, which caches like. */
static void turn(Call *p, int64_t unit, float *room) {
    (void)room;
    const int64_t blocks = p->k_pad / p->bk, half = blocks * p->batch * (p->heads / p->group);
    const int width = unit < half ? p->d : p->dv_size, j0 = (int)(unit % half % blocks) * p->bk;
    const int64_t kv = unit % half / blocks;
    const float *from = (unit < half ? p->k : p->v) + (kv * p->k_len + j0) * width;
    float *to = (unit < half ? p->kt : p->vt) + (kv * p->k_pad + j0) * width;
    const int count = j0 + p->bk < p->k_len ? p->bk : p->k_len - j0;
    for (int j = 0; j < p->bk; j += 16)
        for (int d = 0; d < width; d += 16)
            for (int e = d; e < d + 16; e++)
                for (int at = j; at < j + 16; at++) to[((int64_t)at / NR * width + e) * NR + at % NR] = at < count ? from[(int64_t)at * width + e] : 0.0f;
}

static void *worker(void *call) {
    Call *p = call;
    float *room = NULL;
    if (posix_memalign((void **)&room, 64, sizeof(float) * (size_t)p->room)) return (void *)1;
    memset(room, 0, sizeof(float) * (size_t)p->room);
    for (int64_t unit; (unit = __atomic_fetch_add(&p->next, 1, __ATOMIC_RELAXED)) < p->units;) p->work(p, unit, room);
    free(room);
    return NULL;
}

/* 0, or 1 when a thread had no memory. */
static int run(Call *p) {
    pthread_t threads[256];
    int count = p->threads < 256 ? p->threads : 256, started = 0;
    if (count > p->units) count = (int)p->units;
    p->next = p->failed = 0;
    while (started < count - 1 && !pthread_create(threads + started, NULL, worker, p)) started++;
    int failed = worker(p) != NULL;
    for (int t = 0; t < started; t++) {
        void *result = NULL;
        pthread_join(threads[t], &result);
        failed |= result != NULL;
    }
    return failed || p->failed;
}

static int turned(Call *p, int both) {
    p->work = turn, p->room = 1;
    p->units = (1 + both) * (p->k_pad / p->bk) * (int64_t)p->batch * (p->heads / p->group);
    return run(p);
}

int forward(Call *p) {
    if (turned(p, 0)) return 1;
    const int64_t head = (int64_t)p->bq * (p->d + p->dv_size + 2), blocks = (p->q_len + p->bq - 1) / p->bq;
    p->work = forward_rows;
    p->units = blocks * p->batch * p->heads;
    p->room = head + (ROOT ? (int64_t)(p->bq + 1) * p->k_pad : (int64_t)p->bq * p->bk);
#if !ROOT
    if (p->keep) p->work = forward_columns, p->units = (int64_t)p->batch * p->heads;
#endif
    return run(p);
}

int backward(Call *p) {
    if (turned(p, 1)) return 1;
    const int64_t kv = (int64_t)p->batch * (p->heads / p->group);
    p->work = backward_rows;
    p->units = kv * p->slots;
    p->room = (int64_t)p->bq * (2 * p->d + p->dv_size + 1 + 2 * p->bk);
#if !ROOT
    if (p->keep) p->work = backward_columns, p->units = kv;
#endif
    return run(p);
}
