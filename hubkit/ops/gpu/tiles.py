"""Device functions that the kernels share: products, operand tiles, the shrink unit, the expansion.

One tile of rows (BM consecutive rows of the batch) uses the arena rows that its list names (`routes.py`). Its
shrunk values lie densely in S, column i for the i-th listed arena row, so neither page boundaries nor a maximal
rank cost anything. Free arena rows hold NaN and are on no list, so they are never read.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(a, b, acc, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a b, fp32. UPCAST multiplies in fp32, for the interpreter, which cannot multiply bf16."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def member(items, index, MEMBERS: tl.constexpr):
    """items[index] of a tuple, for an index known at run time only."""
    chosen = items[0]
    for i in tl.static_range(1, MEMBERS):
        if index == i:
            chosen = items[i]
    return chosen


@triton.jit
def listed(rows, tile, i, count, stride_rows):
    """(arena rows, which of them are live) of places i in the tile's list; a place may be empty (-1)."""
    r = tl.load(rows + tile.to(tl.int64) * stride_rows + i, mask=i < count, other=-1)
    return tl.maximum(r, 0), r >= 0


@triton.jit
def input_tile(x, m, k, M, K, stride_x, EVEN_K: tl.constexpr):
    """x [BM, BK]; rows and columns outside are zero."""
    at = x + m.to(tl.int64)[:, None] * stride_x + k[None, :]
    if EVEN_K:
        return tl.load(at, mask=m[:, None] < M, other=0.0)
    return tl.load(at, mask=(m[:, None] < M) & (k[None, :] < K), other=0.0)


@triton.jit
def kept(m, k, seed, threshold):
    """[BM, BK] whether dropout lets elements (m, k) through: `hubkit.ops.dropout`."""
    column = (m * 0)[:, None] + k[None, :]
    row = m[:, None] + (k * 0)[None, :]
    w0, w1, w2, w3 = tl.philox(seed, column // 4, row, column * 0, column * 0)
    which = column % 4
    word = tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3))
    return (word >> 1).to(tl.int32) < threshold


@triton.jit
def dropped(tile, m, k, seed, threshold, scale):
    """tile [BM, BK] of elements (m, k) after dropout, in its own dtype."""
    return tl.where(kept(m, k, seed, threshold), tile.to(tl.float32) * scale, 0.0).to(tile.dtype)


@triton.jit
def weight_tile(W, n, k, N, K, EVEN_K: tl.constexpr):
    """Wᵀ [BK, BN] of the base. The one place that knows how a base weight is stored: a quantised base
    dequantises here."""
    at = W + n.to(tl.int64)[None, :] * K + k[:, None]
    if EVEN_K:
        return tl.load(at, mask=n[None, :] < N, other=0.0)
    return tl.load(at, mask=(n[None, :] < N) & (k[:, None] < K), other=0.0)


@triton.jit
def factor_tile(A, r, live, k, K, EVEN_K: tl.constexpr):
    """Aᵀ [BK, BR] of the arena rows r [BR] that are live; zero for the others, which are not read."""
    at = A + r.to(tl.int64)[None, :] * K + k[:, None]
    if EVEN_K:
        return tl.load(at, mask=live[None, :], other=0.0)
    return tl.load(at, mask=live[None, :] & (k[:, None] < K), other=0.0)


@triton.jit
def scaled(shrunk, C, g, r, live, valid, stride_c):
    """shrunk ⊙ C[g][:, r], [BM, BR] fp32; exactly zero where the coefficient is, whatever was shrunk."""
    mask = valid[:, None] & live[None, :]
    c = tl.load(C + g.to(tl.int64)[:, None] * stride_c + r[None, :], mask=mask, other=0.0)
    return tl.where(c != 0, shrunk * c, 0.0)


@triton.jit
def shrink_unit(
    x, A, S, planes, arrivals,
    rows, C, group,
    tile, which, chunk, split, count,
    M, K, K_SPLIT, stride_x, stride_c, stride_g, stride_rows, CAP, CHUNKS, seed, threshold, scale,
    BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, EVEN_K: tl.constexpr,
    DROP: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile's (x Aᵀ) ⊙ C for BR of its arena rows and one of SPLIT parts of K, into S [members, M, CAP].

    With SPLIT > 1 each part leaves an fp32 plane [BM, BR]; the last to arrive sums them in the order of K, which
    depends on K alone, so the sum is the same in every run and whatever else is in the batch.
    """
    m = tile * BM + tl.arange(0, BM)
    valid = m < M
    i = chunk * BR + tl.arange(0, BR)
    r, live = listed(rows, tile, i, count, stride_rows)
    acc = tl.zeros((BM, BR), tl.float32)
    for start in range(split * K_SPLIT, tl.minimum((split + 1) * K_SPLIT, K), BK):
        k = start + tl.arange(0, BK)
        xt = input_tile(x, m, k, M, K, stride_x, EVEN_K)
        if DROP:
            xt = dropped(xt, m, k, seed, threshold, scale)
        acc = product(xt, factor_tile(A, r, live, k, K, EVEN_K), acc, UPCAST, PRECISION)
    unit = (which * tl.cdiv(M, BM) + tile).to(tl.int64) * CHUNKS + chunk
    last = True
    if SPLIT > 1:
        inside = tl.arange(0, BM)[:, None] * BR + tl.arange(0, BR)[None, :]
        tl.store(planes + (unit * SPLIT + split) * (BM * BR) + inside, acc)
        tl.debug_barrier()  # every thread's part of the plane is written before one thread says so
        last = tl.atomic_add(arrivals + unit, 1, sem="acq_rel") == SPLIT - 1
        if last:
            tl.store(arrivals + unit, 0)  # ready for the next launch, a graph's replay included
            acc = tl.zeros((BM, BR), tl.float32)
            for part in range(SPLIT):
                acc += tl.load(planes + (unit * SPLIT + part) * (BM * BR) + inside, cache_modifier=".cg")
    if last:
        g = tl.load(group + m * stride_g, mask=valid, other=0)
        s = scaled(acc, C, g, r, live, valid, stride_c)
        at = S + (which * M + m).to(tl.int64)[:, None] * CAP + i[None, :]
        tl.store(at, s.to(S.dtype.element_ty), mask=valid[:, None] & live[None, :])
    return last


@triton.jit
def expand(
    acc, S, Bt, rows,
    tile, which, m, n, count,
    M, N, stride_rows, CAP,
    BR: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc [BM, BN] + S Bt over the arena rows of the tile."""
    for start in range(0, count, BR):
        i = start + tl.arange(0, BR)
        r, live = listed(rows, tile, i, count, stride_rows)
        at = S + (which * M + m).to(tl.int64)[:, None] * CAP + i[None, :]
        # not through L1: in one launch with its producers it could hold what lay there before
        s = tl.load(at, mask=(m[:, None] < M) & live[None, :], other=0.0, cache_modifier=".cg")
        b = tl.load(Bt + r.to(tl.int64)[:, None] * N + n[None, :], mask=live[:, None] & (n[None, :] < N), other=0.0)
        acc = product(s, b, acc, UPCAST, PRECISION)
    return acc


@triton.jit
def place(index, tiles, blocks, GROUP: tl.constexpr):
    """(tile, block) of the index-th program: GROUP tiles of rows share a block of weights while it is in L2."""
    width = GROUP * blocks
    first = (index // width) * GROUP
    height = tl.minimum(tiles - first, GROUP)
    inside = index % width
    return first + inside % height, inside // height


@triton.jit
def block_of(block, Ns, BN: tl.constexpr, MEMBERS: tl.constexpr):
    """(which member, its columns n [BN]) of the block-th block of output columns."""
    which = 0
    first = 0
    end = tl.cdiv(Ns[0], BN)
    for i in tl.static_range(1, MEMBERS):
        if block >= end:
            which = i
            first = end
        end += tl.cdiv(Ns[i], BN)
    return which, (block - first) * BN + tl.arange(0, BN)


@triton.jit
def finish(acc, bias, Y, m, n, M, N, HAS_BIAS: tl.constexpr):
    """Add the bias and round once into Y [M, N]."""
    inside = n < N
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    at = Y + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(at, acc.to(Y.dtype.element_ty), mask=(m[:, None] < M) & inside[None, :])
