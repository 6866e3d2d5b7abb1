// Shrink, base product and expand of a fused call on tile registers. Included by fused.cpp alone.
//
// S keeps 16 bits, as two bf16 numbers, so that one `dot` of depth 32 expands 16 arena rows.
#pragma once

#include <cstring>

#include "pages.h"
#include "tile.h"

namespace {

using tile::allowed, tile::Registers;
constexpr bool SHRINKS_PAIRS = true;
constexpr int64_t TOO_DEEP = 3072;
constexpr int64_t PAGES = 64;

// A thread's own room.
struct Desk {
    std::vector<bf16> arena_room, weight_room;
    Pages pages;
    alignas(64) float sums[4 * FLOATS], added[4 * FLOATS];
};

struct Rows {
    const bf16* at;
    int64_t stride;  // bytes
};

// A piece's rows of A: where they lie, if that is 16 in a row, else copied together.
Rows arena_rows(const Piece& piece, bf16* room) {
    int64_t K = piece.part->x.features;
    bool whole = piece.count == SIDE;
    for (int64_t j = 1; j < piece.count; j++) whole &= piece.cols[j] == piece.cols[0] + j;
    if (whole) return {piece.part->A + piece.cols[0] * K, 2 * K};
    for (int64_t j = 0; j < SIDE; j++)
        if (j < piece.count) std::memcpy(room + j * K, piece.part->A + piece.cols[j] * K, 2 * K);
        else std::memset(room + j * K, 0, 2 * K);
    return {room, 2 * K};
}

template <int I> void shrink_step(const Rows& a, const bf16* x, int64_t k) {
    tile::load<4 + I % 2>(a.at + k, a.stride);
    tile::load<6 + I % 2>(x + k * SIDE, tile::ROW);
    tile::dot<I, 4 + I % 2, 6 + I % 2>();
}

void finish_shrink(const Call& call, const Work& work, const Piece& piece, const float* sums) {
    tile::split(sums, piece.coef, piece.count, piece.mine, (bf16*)piece.S);
    if (!piece.part->S) return;
    bf16* at = piece.part->S + (piece.cols - piece.part->route->cols) * call.padded + work.first + piece.tile * SIDE;
    for (int64_t j = 0; j < piece.count; j++)
        tile::narrow(sums + j * SIDE, piece.coef[j], piece.mine, at + j * call.padded);
}

// S of four pieces at a time: a `dot` waits for the one before it in the same register.
void shrink(const Call& call, const Work& work, const Shrink& task, Desk& desk) {
    int64_t count = task.count, K = task.features;
    bf16* room = lined(desk.arena_room, 4 * SIDE * K);
    Rows a[4];
    const bf16* x[4];
    for (int64_t i = 0; i < 4; i++) {
        const Piece& piece = *task.pieces[std::min(i, count - 1)];
        a[i] = i < count ? arena_rows(piece, room + i * SIDE * K) : a[i - 1];
        x[i] = work.x + (piece.tile * call.features + piece.part->seen.offset) * SIDE;
    }
    tile::zero<0>(), tile::zero<1>(), tile::zero<2>(), tile::zero<3>();
    for (int64_t k = 0; k < K; k += DEPTH) {
        shrink_step<0>(a[0], x[0], k);
        shrink_step<1>(a[1], x[1], k);
        shrink_step<2>(a[2], x[2], k);
        shrink_step<3>(a[3], x[3], k);
    }
    float* sums = desk.sums;
    tile::store<0>(sums), tile::store<1>(sums + FLOATS), tile::store<2>(sums + 2 * FLOATS);
    tile::store<3>(sums + 3 * FLOATS);
    for (int64_t i = 0; i < count; i++) finish_shrink(call, work, *task.pieces[i], sums + i * FLOATS);
}

template <int ROWS> void zero() {
    tile::zero<0>(), tile::zero<1>();
    if (ROWS == 2) tile::zero<2>(), tile::zero<3>();
}

template <int ROWS> void store(float* sums) {
    tile::store<0>(sums), tile::store<1>(sums + FLOATS);
    if (ROWS == 2) tile::store<2>(sums + 2 * FLOATS), tile::store<3>(sums + 3 * FLOATS);
}

// Registers 0 to 3: columns n and n + 16 of y for a tile of rows, and for the next one if there are two.
template <int ROWS> void product(const Weights& W, const bf16* x, int64_t row, int64_t features) {
    for (int64_t k = 0; k < features; k += DEPTH) {
        const bf16* w = W.at + k * W.step;
        tile::stream<4>(w, W.stride);
        tile::load<6>(x + k * SIDE, tile::ROW);
        tile::dot<0, 4, 6>();
        tile::stream<5>(w + W.half, W.stride);
        tile::dot<1, 5, 6>();
        if (ROWS == 2) {
            tile::load<7>(x + row + k * SIDE, tile::ROW);
            tile::dot<2, 4, 7>();
            tile::dot<3, 5, 7>();
        }
    }
}

// A piece's rows of Bt for the panel at column n, turned, each number twice: two tiles.
const bf16* turned(const Piece& piece, const Task& task, int64_t n, Pages& pages) {
    int64_t N = piece.part->columns;
    const bf16* page = pages.of(piece, [&](bf16* to) {
        const bf16* rows[SIDE];
        for (int64_t j = 0; j < piece.count; j++) rows[j] = piece.part->Bt + piece.cols[j] * N;
        for (int64_t i = 0; i < 2 * panels(task); i++)
            tile::twice(rows, piece.count, task.begin + i * SIDE, N, to + i * BF16S);
    });
    return page + (n - task.begin) / SIDE * BF16S;
}

template <int D> void expand(const Piece* piece, const Piece* end, const Task& task, int64_t n, Desk& desk) {
    for (; piece < end; piece++) {
        const bf16* Bt = turned(*piece, task, n, desk.pages);
        tile::load<6>(piece->S, tile::ROW);
        tile::load<4>(Bt, tile::ROW);
        tile::dot<D, 4, 6>();
        tile::load<5>(Bt + BF16S, tile::ROW);
        tile::dot<D + 1, 5, 6>();
    }
}

template <int ROWS>
void panel(const Call& call, const Work& work, const Task& task, int64_t t, int64_t n, Desk& desk) {
    const Output& output = *task.output;
    const Piece* pieces = work.pieces.data();
    const int64_t* starts = work.starts.data() + task.number * work.tiles + t;
    int64_t row = call.features * SIDE;
    zero<ROWS>();
    for (const Part* part = output.begin; part < output.end; part++)
        product<ROWS>(weights(call, *part, task, n, desk.weight_room), work.x + t * row + part->x.offset * SIDE, row,
                      part->x.features);
    if (call.dropped.bits) store<ROWS>(desk.sums), zero<ROWS>();
    expand<0>(pieces + starts[0], pieces + starts[1], task, n, desk);
    if (ROWS == 2) expand<2>(pieces + starts[1], pieces + starts[2], task, n, desk);
    store<ROWS>(call.dropped.bits ? desk.added : desk.sums);
    int64_t N = output.columns;
    for (int64_t i = 0; i < ROWS; i++) {
        int64_t m = (t + i) * SIDE, count = std::min<int64_t>(SIDE, work.rows - m);
        float* sums = desk.sums + 2 * i * FLOATS;
        if (call.dropped.bits)
            tile::add(sums, desk.added + 2 * i * FLOATS, call.dropped.bits + ((work.first + m) * N + n) / DEPTH,
                      N / DEPTH, count, call.dropped.scale);
        tile::finish(sums, output.bias ? output.bias + n : nullptr, output.y + (work.first + m) * N + n, N, count,
                     N - n);
    }
}

bool pairs_up(const Call&, const Work&) { return true; }
Shape shape(const Call& call, const Work& work) { return panels_of(call, work); }

void compute(const Call& call, const Work& work, const Task& task, Desk& desk) {
    desk.pages.begin(work, panels(task) * 2 * BF16S, PAGES);
    if (call.turned) turn(call, task, desk.weight_room);
    by_twos(task, [&](auto rows, int64_t t, int64_t n) { panel<decltype(rows)::value>(call, work, task, t, n, desk); });
}

}  // namespace
