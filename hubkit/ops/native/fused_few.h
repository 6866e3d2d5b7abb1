// Few batch rows: weights are read as they lie, once, and y^T is computed. Included by fused_vectors.h alone.
#pragma once

#include "fused_rows.h"

namespace {

constexpr int64_t CHUNK = 384;  // features of x that stay in the L1 cache for a panel, of two tiles of rows

// sums [ROWS tiles of rows, 2, 16, 16], y^T of a panel, += W x^T, or, for the first part, = that.
template <int ROWS>
void product(const Weights& W, const bf16* x, int64_t row, int64_t features, bool fetch, bool first, float* sums) {
    int64_t stride = W.stride / 2, ahead = fetch ? block::ROWS * stride : 0;
    const int64_t chunk = ROWS == 1 ? features : CHUNK;
    for (int64_t k = 0; k < features; k += chunk)
        for (int n = 0; n < PANEL; n += block::ROWS)
            block::multiply<ROWS>(
                {W.at + k * W.step + n / SIDE * W.half + n % SIDE * stride, stride, W.step * DEPTH, ahead},
                {x + k * SIDE, BF16S, row}, std::min(chunk, features - k), sums + n * SIDE, first && k == 0);
}

// Rows of y of a tile of batch rows from the product's sums.
void turn_back(const float* sums, float* rows) {
    for (int h = 0; h < 2; h++) {
        Floats v[SIDE];
        for (int n = 0; n < SIDE; n++) v[n] = read<Floats>(sums + h * FLOATS + n * SIDE);
        block::transpose(v);
        for (int m = 0; m < SIDE; m++) std::memcpy(rows + m * WIDE + h * SIDE, &v[m], sizeof(Floats));
    }
}

template <int ROWS>
void panel(const Call& call, const Work& work, const Task& task, int64_t t, int64_t n, Desk& desk) {
    int64_t row = call.features * SIDE;
    for (const Part* part = task.output->begin; part < task.output->end; part++)
        product<ROWS>(weights(call, *part, task, n, desk.weight_room), work.x + t * row + part->x.offset * SIDE, row,
                      part->x.features, !call.turned && t == task.first, part == task.output->begin, desk.sums);
    auto page = [&](const Piece& piece) { return zip(piece, n, 2, desk.page), desk.page; };
    for (int i = 0; i < ROWS; i++) {
        turn_back(desk.sums + 2 * i * FLOATS, desk.rows);
        finish<2>(call, work, task, t + i, n, page, desk.rows, desk.added);
    }
}

void compute_few(const Call& call, const Work& work, const Task& task, Desk& desk) {
    if (call.turned) turn(call, task, desk.weight_room);
    by_twos(task, [&](auto rows, int64_t t, int64_t n) { panel<decltype(rows)::value>(call, work, task, t, n, desk); });
}

}  // namespace
