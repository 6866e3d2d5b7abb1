// Shrink, base product and expand of a fused call on vectors. Included by fused.cpp alone.
//
// A tile of batch rows that several groups share would be multiplied by the factors of each. So S is computed for a
// group's own rows alone, along features, and expanded into rows of y that the base product's sums were turned into;
// where a tile is one group's, before they are turned, as more features. The sums are the same either way: S is the
// same pair of bf16 numbers, and what is added to an element is added in the same order.
#pragma once

#include "block.h"
#include "pages.h"

namespace {

using block::Floats, block::Pairs, block::read;

inline bool allowed() { return HUBKIT_AVX512; }
constexpr bool SHRINKS_PAIRS = false;
struct Registers {};

constexpr int TOGETHER = 8;     // rows of y that are expanded together
constexpr int64_t LONG = 4;     // tiles of batch rows in a task for which pages are turned
constexpr int64_t CHUNK = 384;  // features of x that stay in the L1 cache for a panel, of two tiles of rows

// A thread's own room.
struct Desk {
    std::vector<bf16> weight_room;
    Pages pages;
    alignas(64) float sums[4 * FLOATS];
    alignas(64) float rows[SIDE * PANEL], added[SIDE * PANEL];
};

// The batch rows of a piece, numbered within their tile.
struct Mine {
    int rows[SIDE], count = 0;
    explicit Mine(uint16_t mask) {
        for (; mask; mask &= mask - 1) rows[count++] = __builtin_ctz(mask);
    }
};

// ---- shrink --------------------------------------------------------------------------------------------------

// Sums over features of two rows of x times eight of A: [2, 8].
Floats products(const bf16* const* x, const bf16* const* A, int64_t features) {
    Floats held[2 * block::ROWS] = {};
    for (int64_t k = 0; k < features; k += DEPTH) {
        Pairs even = read<Pairs>(x[0] + k), odd = read<Pairs>(x[1] + k);
        for (int j = 0; j < block::ROWS; j++) {
            Pairs a = read<Pairs>(A[j] + k);
            held[j] = block::dot(held[j], a, even);
            held[j + block::ROWS] = block::dot(held[j + block::ROWS], a, odd);
        }
    }
    return block::sums(held);
}

// Two batch rows of S for a piece, or one, computed twice; as `tile::split` lays them out.
void shrink_rows(const Work& work, const Piece& piece, const int* rows, int count) {
    int64_t K = piece.part->seen.features;
    int row[2] = {rows[0], rows[count - 1]};
    const bf16 *x[2], *A[SIDE];
    for (int i = 0; i < 2; i++) x[i] = piece.part->seen.x + (work.first + piece.tile * SIDE + row[i]) * K;
    for (int64_t j = 0; j < SIDE; j++) A[j] = piece.part->A + piece.cols[std::min(j, piece.count - 1)] * K;
    for (int64_t j = 0; j < SIDE; j += block::ROWS) {
        Floats found{}, coef{};
        int64_t left = std::min<int64_t>(block::ROWS, piece.count - j);
        for (int64_t i = 0; i < left; i++) coef[i] = coef[i + block::ROWS] = piece.coef[j + i];
        if (left > 0) found = block::those(((1 << left) - 1) * 0x101, products(x, A + j, K)) * coef;
        bf16 halves[2][SIDE];
        block::split(found, halves[0], halves[1]);
        for (int64_t p = 0; p < block::ROWS; p += 2)
            for (int h = 0; h < 2; h++)
                for (int r = 0; r < 2; r++)
                    std::memcpy((bf16*)piece.S + (j + p + h) * DEPTH + 2 * row[r], halves[h] + r * block::ROWS + p, 4);
    }
}

void shrink(const Call& call, const Work& work, const Piece& piece) {
    Mine mine(piece.mine);
    for (int i = 0; i < mine.count; i += 2) shrink_rows(work, piece, mine.rows + i, std::min(2, mine.count - i));
    if (!piece.part->S) return;
    const bf16* S = (const bf16*)piece.S;
    bf16* at = piece.part->S + (piece.cols - piece.part->route->cols) * call.padded + work.first + piece.tile * SIDE;
    for (int64_t j = 0; j < piece.count; j++)
        for (int i = 0; i < mine.count; i++)
            at[j * call.padded + mine.rows[i]] = S[j / 2 * 2 * DEPTH + 2 * mine.rows[i] + j % 2];
}

void shrink(const Call& call, const Work& work, const Shrink& task, Desk&) {
    for (int64_t i = 0; i < task.count; i++) shrink(call, work, *task.pieces[i]);
}

// ---- base and expand -----------------------------------------------------------------------------------------

// sums [ROWS tiles of rows, 2, 16, 16], y^T of a panel, += W x^T, or, for the first part, = that.
template <int ROWS>
void product(const Weights& W, const bf16* x, int64_t row, int64_t features, bool fetch, bool first, float* sums) {
    int64_t stride = W.stride / 2, ahead = fetch ? block::ROWS * stride : 0;
    const int64_t chunk = ROWS == 1 ? features : CHUNK;
    for (int64_t k = 0; k < features; k += chunk)
        for (int n = 0; n < PANEL; n += block::ROWS)
            block::multiply<ROWS>(
                {W.at + k * W.step + n / SIDE * W.half + n % SIDE * stride, stride, W.step * DEPTH, ahead},
                {x + k * SIDE, BF16S, row}, std::min(chunk, features - k), sums + n * SIDE, 2, first && k == 0);
}

// Rows of y, as far as a panel goes, += S Bt of a piece.
template <int COUNT> void expand(const Piece& piece, const int* mine, int64_t n, float* rows) {
    int64_t N = piece.part->columns;
    Floats held[COUNT][2];
    for (int i = 0; i < COUNT; i++)
        for (int h = 0; h < 2; h++) held[i][h] = read<Floats>(rows + mine[i] * PANEL + h * SIDE);
    for (int64_t j = 0; j < piece.count; j += 2) {
        const bf16* even = piece.part->Bt + piece.cols[j] * N + n;
        const bf16* odd = j + 1 < piece.count ? piece.part->Bt + piece.cols[j + 1] * N + n : nullptr;
        Pairs Bt[2] = {block::zipped(even, odd, N - n), {}};
        if (N - n > SIDE) Bt[1] = block::zipped(even + SIDE, odd ? odd + SIDE : nullptr, N - n - SIDE);
        for (int i = 0; i < COUNT; i++) {
            const bf16* S = (const bf16*)piece.S + j * DEPTH + 2 * mine[i];
            Pairs high = Pairs{} + read<uint32_t>(S), low = Pairs{} + read<uint32_t>(S + DEPTH);
            for (int h = 0; h < 2; h++) held[i][h] = block::dot(block::dot(held[i][h], Bt[h], high), Bt[h], low);
        }
    }
    for (int i = 0; i < COUNT; i++)
        for (int h = 0; h < 2; h++) std::memcpy(rows + mine[i] * PANEL + h * SIDE, &held[i][h], sizeof(Floats));
}

void expand(const Piece& piece, int64_t n, float* rows) {
    Mine mine(piece.mine);
    int i = 0;
    for (; i + TOGETHER <= mine.count; i += TOGETHER) expand<TOGETHER>(piece, mine.rows + i, n, rows);
    for (; i + 2 <= mine.count; i += 2) expand<2>(piece, mine.rows + i, n, rows);
    if (i < mine.count) expand<1>(piece, mine.rows + i, n, rows);
}

struct Pieces {
    const Piece *begin, *end;
};

Pieces pieces_of(const Work& work, const Task& task, int64_t t) {
    const int64_t* starts = work.starts.data() + task.number * work.tiles + t;
    return {work.pieces.data() + starts[0], work.pieces.data() + starts[1]};
}

void expand(const Pieces& pieces, int64_t n, float* rows) {
    for (const Piece* piece = pieces.begin; piece < pieces.end; piece++) expand(*piece, n, rows);
}

// Whether all rows of a tile are of one group, whose pages are worth turning.
bool alone(const Work& work, const Task& task, int64_t t) {
    int64_t left = std::min<int64_t>(SIDE, work.rows - t * SIDE);
    for (auto [piece, end] = pieces_of(work, task, t); piece < end; piece++)
        if (piece->mine != (1 << left) - 1) return false;
    return task.last - task.first >= LONG;
}

// sums [ROWS tiles of rows, 2, 16, 16] += (S Bt)^T of a panel, for tiles of the same group.
template <int ROWS>
void expand_turned(const Pieces& first, const Pieces& second, const Task& task, int64_t n, Pages& pages, float* sums) {
    for (int64_t i = 0; i < first.end - first.begin; i++) {
        const Piece& piece = first.begin[i];
        const bf16 *Bt = pages.turned(piece, task, n), *S = (const bf16*)piece.S;
        int64_t apart = (const bf16*)second.begin[i].S - S;
        for (int m = 0; m < PANEL; m += block::ROWS)
            block::multiply<ROWS>({Bt + m * DEPTH, DEPTH, 0, 0}, {S, 0, apart}, DEPTH, sums + m * SIDE, 2);
    }
}

bool same_pages(const Pieces& a, const Pieces& b) {
    return std::equal(a.begin, a.end, b.begin, b.end, [](auto& one, auto& other) { return one.page == other.page; });
}

// rows += what dropout lets through of what is added.
void add(const Dropped& dropped, int64_t first, int64_t count, int64_t n, int64_t columns, const float* added,
         float* rows) {
    for (int64_t m = 0; m < count; m++) {
        uint32_t bits = dropped.bits[((first + m) * columns + n) / DEPTH];
        for (int h = 0; h < 2; h++) {
            float* at = rows + m * PANEL + h * SIDE;
            Floats kept = block::those(uint16_t(bits >> h * SIDE), read<Floats>(added + m * PANEL + h * SIDE));
            kept = read<Floats>(at) + kept * dropped.scale;
            std::memcpy(at, &kept, sizeof kept);
        }
    }
}

// Rows of y of a tile of batch rows from the base product's sums, in desk.rows.
void turn_back(const float* sums, float* rows) {
    for (int h = 0; h < 2; h++) {
        Floats v[SIDE];
        for (int n = 0; n < SIDE; n++) v[n] = read<Floats>(sums + h * FLOATS + n * SIDE);
        block::transpose(v);
        for (int m = 0; m < SIDE; m++) std::memcpy(rows + m * PANEL + h * SIDE, &v[m], sizeof(Floats));
    }
}

// y of a tile of batch rows; pieces: what is still to be expanded.
void finish(const Call& call, const Work& work, const Task& task, int64_t t, int64_t n, const float* sums,
            const Pieces& pieces, Desk& desk) {
    const Output& output = *task.output;
    int64_t first = work.first + t * SIDE, count = std::min<int64_t>(SIDE, work.rows - t * SIDE);
    float* rows = desk.rows;
    turn_back(sums, rows);
    if (call.dropped.bits) {
        std::memset(desk.added, 0, sizeof desk.added);
        expand(pieces, n, desk.added);
        add(call.dropped, first, count, n, output.columns, desk.added, rows);
    } else {
        expand(pieces, n, rows);
    }
    for (int64_t m = 0; m < count; m++)
        for (int64_t at = n; at < std::min(n + PANEL, output.columns); at += SIDE) {
            Floats y = read<Floats>(rows + m * PANEL + at - n);
            if (output.bias) y += block::widen(output.bias + at, output.columns - at);
            block::narrow(y, output.y + (first + m) * output.columns + at, output.columns - at);
        }
}

template <int ROWS>
void panel(const Call& call, const Work& work, const Task& task, int64_t t, int64_t n, Desk& desk) {
    int64_t row = call.features * SIDE;
    for (const Part* part = task.output->begin; part < task.output->end; part++)
        product<ROWS>(weights(call, *part, task, n, desk.weight_room), work.x + t * row + part->x.offset * SIDE, row,
                      part->x.features, !call.turned && t == task.first, part == task.output->begin, desk.sums);
    Pieces pieces[2] = {pieces_of(work, task, t), pieces_of(work, task, t + ROWS - 1)}, none = {};
    bool turned = !call.dropped.bits && same_pages(pieces[0], pieces[1]) && alone(work, task, t) &&
                  alone(work, task, t + ROWS - 1);
    if (turned) expand_turned<ROWS>(pieces[0], pieces[1], task, n, desk.pages, desk.sums);
    for (int i = 0; i < ROWS; i++)
        finish(call, work, task, t + i, n, desk.sums + 2 * i * FLOATS, turned ? none : pieces[i], desk);
}

void compute(const Call& call, const Work& work, const Task& task, Desk& desk) {
    desk.pages.begin(work, task);
    if (call.turned) turn(call, task, desk.weight_room);
    for (int64_t t = task.first; t < task.last; t += 2)
        for (int64_t n = task.begin; n < task.end; n += PANEL)
            if (t + 1 < task.last) panel<2>(call, work, task, t, n, desk);
            else panel<1>(call, work, task, t, n, desk);
}

}  // namespace
