"""The kernels. Each is a few calls of the shared device functions in `tiles.py`; `docs/kernel.md` has the picture.

shrink       S = (x Aᵀ) ⊙ C, rounded once                            first half of chained and separate
chained      base product, then + S Bt in its epilogue               F1: launched while the shrink still runs
ticketed     both in one launch: producers of S, then consumers      F2
recomputed   every block of outputs shrinks for itself on its way    F3: no workspace, for few ranks
separate     y += S Bt                                               F4: for a base product made elsewhere
"""

from __future__ import annotations

import triton
import triton.language as tl

from hubkit.ops.gpu.tiles import (
    block_of,
    expand,
    factor_tile,
    finish,
    input_tile,
    listed,
    member,
    place,
    product,
    scaled,
    shrink_unit,
    weight_tile,
)


@triton.jit
def shrink_kernel(
    x, As, S, planes, arrivals, rows, counts, C, group,
    M, K, K_SPLIT, stride_x, stride_c, stride_g, stride_rows, stride_counts, CAP, CHUNKS, seed, threshold, scale,
    MEMBERS: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr, DROP: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (tiles · members, columns of programs that share a tile's chunks of BR arena rows, SPLIT)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()  # let the base product start; it waits for S only at its end
    tile = tl.program_id(0) // MEMBERS
    which = tl.program_id(0) % MEMBERS
    count = tl.load(counts + tile * stride_counts)
    A = member(As, which, MEMBERS)
    for chunk in range(tl.program_id(1), tl.cdiv(count, BR), tl.num_programs(1)):
        shrink_unit(
            x, A, S, planes, arrivals, rows, C, group, tile, which, chunk, tl.program_id(2), count,
            M, K, K_SPLIT, stride_x, stride_c, stride_g, stride_rows, CAP, CHUNKS, seed, threshold, scale,
            BM, BR, BK, SPLIT, EVEN_K, DROP, UPCAST, PRECISION,
        )  # fmt: skip


@triton.jit
def base_tile(
    x, W, m, n, M, N, K, stride_x,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x Wᵀ [BM, BN], fp32."""
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        acc = product(
            input_tile(x, m, k, M, K, stride_x, EVEN_K), weight_tile(W, n, k, N, K, EVEN_K), acc, UPCAST, PRECISION
        )
    return acc


@triton.jit
def chained_kernel(
    x, Ws, biases, Bts, Ys, S, rows, counts, Ns,
    M, K, stride_x, stride_rows, stride_counts, CAP,
    MEMBERS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
    GROUP: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of rows times blocks of columns of all members."""
    tiles = tl.cdiv(M, BM)
    tile, block = place(tl.program_id(0), tiles, tl.num_programs(0) // tiles, GROUP)
    which, n = block_of(block, Ns, BN, MEMBERS)
    m = tile * BM + tl.arange(0, BM)
    N = member(Ns, which, MEMBERS)
    acc = base_tile(
        x, member(Ws, which, MEMBERS), m, n, M, N, K, stride_x, BM, BN, BK, EVEN_K, UPCAST, PRECISION
    )  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
    count = tl.load(counts + tile * stride_counts)
    acc = expand(
        acc, S, member(Bts, which, MEMBERS), rows, tile, which, m, n, count, M, N, stride_rows, CAP,
        BR, UPCAST, PRECISION,
    )  # fmt: skip
    finish(acc, member(biases, which, MEMBERS), member(Ys, which, MEMBERS), m, n, M, N, HAS_BIAS)


@triton.jit
def recomputed_kernel(
    x, Ws, biases, As, Bts, Ys, rows, counts, C, group, Ns,
    M, K, stride_x, stride_c, stride_g, stride_rows, stride_counts,
    MEMBERS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, RANKS: tl.constexpr,
    GROUP: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """As `chained_kernel`, for tiles that list at most RANKS arena rows: x is in registers for the base anyway."""
    tiles = tl.cdiv(M, BM)
    tile, block = place(tl.program_id(0), tiles, tl.num_programs(0) // tiles, GROUP)
    which, n = block_of(block, Ns, BN, MEMBERS)
    m = tile * BM + tl.arange(0, BM)
    N = member(Ns, which, MEMBERS)
    W = member(Ws, which, MEMBERS)
    A = member(As, which, MEMBERS)
    count = tl.load(counts + tile * stride_counts)
    i = tl.arange(0, RANKS)
    r, live = listed(rows, tile, i, count, stride_rows)
    acc = tl.zeros((BM, BN), tl.float32)
    shrunk = tl.zeros((BM, RANKS), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        xt = input_tile(x, m, k, M, K, stride_x, EVEN_K)
        acc = product(xt, weight_tile(W, n, k, N, K, EVEN_K), acc, UPCAST, PRECISION)
        shrunk = product(xt, factor_tile(A, r, live, k, K, EVEN_K), shrunk, UPCAST, PRECISION)
    valid = m < M
    g = tl.load(group + m * stride_g, mask=valid, other=0)
    s = scaled(shrunk, C, g, r, live, valid, stride_c).to(x.dtype.element_ty)
    Bt = member(Bts, which, MEMBERS)
    at = Bt + r.to(tl.int64)[:, None] * N + n[None, :]
    b = tl.load(at, mask=live[:, None] & (n[None, :] < N), other=0.0)
    acc = product(s, b, acc, UPCAST, PRECISION)
    finish(acc, member(biases, which, MEMBERS), member(Ys, which, MEMBERS), m, n, M, N, HAS_BIAS)


@triton.jit
def separate_kernel(
    Bts, Ys, S, rows, counts, Ns,
    M, stride_rows, stride_counts, CAP,
    MEMBERS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y += S Bt in place; a tile that lists no arena rows is not touched."""
    tiles = tl.cdiv(M, BM)
    tile, block = place(tl.program_id(0), tiles, tl.num_programs(0) // tiles, GROUP)
    count = tl.load(counts + tile * stride_counts)
    if count > 0:
        which, n = block_of(block, Ns, BN, MEMBERS)
        m = tile * BM + tl.arange(0, BM)
        N = member(Ns, which, MEMBERS)
        Y = member(Ys, which, MEMBERS)
        at = Y + m.to(tl.int64)[:, None] * N + n[None, :]
        if PDL:
            tl.extra.cuda.gdc_wait()
        acc = tl.load(at, mask=(m[:, None] < M) & (n[None, :] < N), other=0.0).to(tl.float32)
        acc = expand(
            acc, S, member(Bts, which, MEMBERS), rows, tile, which, m, n, count, M, N, stride_rows, CAP,
            BR, UPCAST, PRECISION,
        )  # fmt: skip
        finish(acc, Y, Y, m, n, M, N, False)


@triton.jit
def produce(
    ticket, x, As, S, planes, arrivals, ready, rows, counts, C, group,
    M, K, K_SPLIT, stride_x, stride_c, stride_g, stride_rows, stride_counts, CAP, CHUNKS, COLUMNS,
    MEMBERS: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a program of the shrink's grid does, and then the news that a chunk of S is whole."""
    split = ticket % SPLIT
    column = (ticket // SPLIT) % COLUMNS
    unit = ticket // (SPLIT * COLUMNS)
    tile = unit // MEMBERS
    which = unit % MEMBERS
    count = tl.load(counts + tile * stride_counts)
    A = member(As, which, MEMBERS)
    for chunk in range(column, tl.cdiv(count, BR), COLUMNS):
        last = shrink_unit(
            x, A, S, planes, arrivals, rows, C, group, tile, which, chunk, split, count,
            M, K, K_SPLIT, stride_x, stride_c, stride_g, stride_rows, CAP, CHUNKS, 0, 0, 1.0,
            BM, BR, BK, SPLIT, EVEN_K, False, UPCAST, PRECISION,
        )  # fmt: skip
        if last:
            tl.debug_barrier()  # all threads have written their part of S
            tl.atomic_add(ready + unit, 1, sem="release")


@triton.jit
def consume(
    index, x, Ws, biases, Bts, Ys, S, ready, rows, counts, Ns,
    M, K, stride_x, stride_rows, stride_counts, CAP, BLOCKS,
    MEMBERS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
    CHUNK: tl.constexpr, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a program of `chained_kernel` does, waiting for S by its chunks of CHUNK arena rows."""
    tile, block = place(index, tl.cdiv(M, BM), BLOCKS, GROUP)
    which, n = block_of(block, Ns, BN, MEMBERS)
    m = tile * BM + tl.arange(0, BM)
    N = member(Ns, which, MEMBERS)
    acc = base_tile(
        x, member(Ws, which, MEMBERS), m, n, M, N, K, stride_x, BM, BN, BK, EVEN_K, UPCAST, PRECISION
    )  # fmt: skip
    count = tl.load(counts + tile * stride_counts)
    awaited = tl.cdiv(count, CHUNK)
    if awaited > 0:
        while tl.atomic_add(ready + tile * MEMBERS + which, 0, sem="acquire") < awaited:
            pass
    acc = expand(
        acc, S, member(Bts, which, MEMBERS), rows, tile, which, m, n, count, M, N, stride_rows, CAP,
        BR, UPCAST, PRECISION,
    )  # fmt: skip
    finish(acc, member(biases, which, MEMBERS), member(Ys, which, MEMBERS), m, n, M, N, HAS_BIAS)


@triton.jit
def ticketed_kernel(
    x, Ws, biases, As, Bts, Ys, S, planes, arrivals, ready, tickets, rows, counts, C, group, Ns,
    M, K, K_SPLIT, stride_x, stride_c, stride_g, stride_rows, stride_counts, CAP, CHUNKS, COLUMNS, BLOCKS,
    MEMBERS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
    SHRINK_BR: tl.constexpr, SHRINK_BK: tl.constexpr, SPLIT: tl.constexpr, GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, SHRINK_EVEN_K: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Shrink and base product in one launch. Roles go by ticket, in the order in which programs start: whoever
    consumes started after all producers, and producers never wait, so no co-residency is assumed."""
    ticket = tl.atomic_add(tickets, 1, sem="relaxed")
    tiles = tl.cdiv(M, BM)
    producers = tiles * MEMBERS * COLUMNS * SPLIT
    if ticket < producers:
        produce(
            ticket, x, As, S, planes, arrivals, ready, rows, counts, C, group,
            M, K, K_SPLIT, stride_x, stride_c, stride_g, stride_rows, stride_counts, CAP, CHUNKS, COLUMNS,
            MEMBERS, BM, SHRINK_BR, SHRINK_BK, SPLIT, SHRINK_EVEN_K, UPCAST, PRECISION,
        )  # fmt: skip
    else:
        consume(
            ticket - producers, x, Ws, biases, Bts, Ys, S, ready, rows, counts, Ns,
            M, K, stride_x, stride_rows, stride_counts, CAP, BLOCKS,
            MEMBERS, BM, BN, BK, BR, SHRINK_BR, GROUP, HAS_BIAS, EVEN_K, UPCAST, PRECISION,
        )  # fmt: skip
    tl.debug_barrier()
    if tl.atomic_add(tickets + 1, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(tickets + tl.arange(0, 2), tl.zeros((2,), tl.int32))  # the last one out resets, for a graph's replay
        for unit in range(tiles * MEMBERS):
            tl.store(ready + unit, 0)
