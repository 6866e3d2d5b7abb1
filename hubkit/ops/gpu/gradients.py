"""The kernels of the backward pass that the forward pass has no use for. Sums over batch rows run in a fixed order.

dZ = (dY Btᵀ) ⊙ C is a shrink of dY through Bt, so `shrink_kernel` computes it; here are

place        the inverse of a route's lists: which column of S holds an arena row
input        dX += Σ dZ A over the linears that read x
factor       dA = dZᵀ x, and dBt = Sᵀ dY, for every arena row
coefficient  dC[g] = Σ over the rows of g of (x Aᵀ) ⊙ (dY Btᵀ)
"""

from __future__ import annotations

import triton
import triton.language as tl

from hubkit.ops.gpu.tiles import dropped, expand, input_tile, kept, listed, place, product


@triton.jit
def place_kernel(rows, counts, places, stride_rows, BR: tl.constexpr):
    """places[tile, rows[tile, i]] = i, where -1 was before. Grid: tiles."""
    tile = tl.program_id(0)
    count = tl.load(counts + tile)
    for start in range(0, count, BR):
        i = start + tl.arange(0, BR)
        r, live = listed(rows, tile, i, count, stride_rows)
        tl.store(places + tile.to(tl.int64) * stride_rows + r, i, mask=live)


@triton.jit
def input_kernel(
    As, dX, dZ, rows, counts,
    M, K, stride_rows, stride_counts, CAP, seed, threshold, scale,
    MEMBERS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
    DROP: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dX [M, K] += Σ over members of dZ A, rounded once; what dropout kept from the branches gets nothing back."""
    tiles = tl.cdiv(M, BM)
    tile, block = place(tl.program_id(0), tiles, tl.num_programs(0) // tiles, GROUP)
    count = tl.load(counts + tile * stride_counts)
    if count > 0:
        m = tile * BM + tl.arange(0, BM)
        k = block * BN + tl.arange(0, BN)
        acc = tl.zeros((BM, BN), tl.float32)
        for i in tl.static_range(MEMBERS):
            acc = expand(
                acc, dZ, As[i], rows, tile, i, m, k, count, M, K, stride_rows, CAP, BR, UPCAST, PRECISION
            )  # fmt: skip
        if DROP:
            acc = tl.where(kept(m, k, seed, threshold), acc * scale, 0.0)
        at = dX + m.to(tl.int64)[:, None] * K + k[None, :]
        inside = (m[:, None] < M) & (k[None, :] < K)
        acc += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        tl.store(at, acc.to(dX.dtype.element_ty), mask=inside)


@triton.jit
def factor_kernel(
    S, z, out, places,
    M, R, W, TILES_EACH, stride_z, stride_places, CAP, seed, threshold, scale,
    TILE: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BW: tl.constexpr,
    DROP: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[part, r] = Σ over the batch rows of a part of S[:, place of r] z, z [M, W]. Grid (chunks of BR arena rows,
    blocks of BW columns, parts of TILES_EACH tiles); a tile that lists none of a chunk's arena rows is skipped."""
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    w = tl.program_id(1) * BW + tl.arange(0, BW)
    part = tl.program_id(2)
    acc = tl.zeros((BR, BW), tl.float32)
    for tile in range(part * TILES_EACH, tl.minimum((part + 1) * TILES_EACH, tl.cdiv(M, TILE))):
        at = places + tl.cast(tile, tl.int64) * stride_places + r
        i = tl.load(at, mask=r < R, other=-1)
        if tl.max(i, 0) >= 0:
            for start in range(tile * TILE, tl.minimum((tile + 1) * TILE, M), BM):
                m = start + tl.arange(0, BM)
                s = tl.load(
                    S + m.to(tl.int64)[None, :] * CAP + tl.maximum(i, 0)[:, None],
                    mask=(m < M)[None, :] & (i >= 0)[:, None],
                    other=0.0,
                )
                zt = input_tile(z, m, w, M, W, stride_z, False)
                if DROP:
                    zt = dropped(zt, m, w, seed, threshold, scale)
                acc = product(s, zt, acc, UPCAST, PRECISION)
    at = out + (part.to(tl.int64) * R + r)[:, None] * W + w[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=(r < R)[:, None] & (w < W)[None, :])


@triton.jit
def coefficient_kernel(
    Z, dS, dC, places, reads, order, starts,
    M, R, stride_places, stride_reads, CAP,
    MEMBERS: tl.constexpr, TILE: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """dC[g, r] = Σ over members and over the rows of g of Z ⊙ dS, both [members, M, CAP] fp32, in the order of the
    rows. order[starts[g] : starts[g + 1]] are the rows of g. Grid (groups, chunks of BR arena rows)."""
    g = tl.program_id(0)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    read = tl.load(reads + g.to(tl.int64) * stride_reads + r, mask=r < R, other=0.0) != 0
    acc = tl.zeros((BR,), tl.float32)
    end = tl.load(starts + g + 1)
    for start in range(tl.load(starts + g), end, BM):
        at = start + tl.arange(0, BM)
        m = tl.load(order + at, mask=at < end, other=0)
        mask = (at < end)[:, None] & read[None, :]
        i = tl.load(places + (m // TILE).to(tl.int64)[:, None] * stride_places + r[None, :], mask=mask, other=0)
        for which in tl.static_range(MEMBERS):
            cell = (which * M + m).to(tl.int64)[:, None] * CAP + i
            z = tl.load(Z + cell, mask=mask, other=0.0)
            d = tl.load(dS + cell, mask=mask, other=0.0)
            acc += tl.sum(z * d, 0)
    tl.store(dC + g.to(tl.int64) * R + r, acc, mask=r < R)
