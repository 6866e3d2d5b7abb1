// What few and many batch rows have in common on vectors: how S is computed, expanded and added to rows of y.
// Included by the two ways of a fused call on vectors alone.
//
// A tile of batch rows that several groups share would be multiplied by the factors of each. So S is computed and
// expanded for a group's own rows alone.
#pragma once

#include "block.h"
#include "pages.h"

namespace {

using block::Floats, block::Pairs, block::read, block::Sums;

constexpr int TOGETHER = 8;                   // rows of y that are computed together
constexpr int STRIPS = 3;                     // of 16 columns of y that are computed together, at most
constexpr int64_t WIDE = STRIPS * SIDE;       // columns of a tile's rows of y
constexpr int64_t ZIPPED = SIDE / 2 * DEPTH;  // numbers of 16 arena rows in pairs, for 16 columns

// Features from k on of what an output's part reads, and W for them, laid out: [strips, features / 2, 16, 2].
struct Stretch {
    const Part* part;
    int64_t k, features;
    bf16* matrix;
};

// What rows of a tile get of a piece: S [16, 2, 16], Bt in pairs.
struct Term {
    const bf16 *S, *page;
    int64_t count;
};

// A thread's own room.
struct Desk {
    std::vector<Stretch> lot;
    std::vector<Term> terms;
    std::vector<bf16> weight_room;
    std::vector<float> row_room;
    Pages pages;
    alignas(64) float sums[4 * FLOATS];
    alignas(64) float rows[SIDE * WIDE], added[SIDE * WIDE];
    alignas(64) bf16 page[STRIPS * ZIPPED];
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
INLINED Floats products(const bf16* const (&x)[2], const bf16* const* A, int64_t features) {
    Floats held[2 * block::ROWS] = {};
    for (int64_t k = 0; k < features; k += DEPTH) {
        Pairs even = read<Pairs>(x[0] + k), odd = read<Pairs>(x[1] + k);
        EACH(j, block::ROWS) {
            Pairs a = read<Pairs>(A[j] + k);
            held[j] = block::dot(held[j], a, even);
            held[j + block::ROWS] = block::dot(held[j + block::ROWS], a, odd);
        }
    }
    return block::sums(held);
}

// S of a piece. A row: 16 numbers, and what rounding left of them. A lone row is computed twice.
void shrink_rows(const Work& work, const Piece& piece) {
    int64_t K = piece.part->seen.features;
    const bf16 *first = piece.part->seen.x + (work.first + piece.tile * SIDE) * K, *A[SIDE];
    alignas(64) float coef[2][SIDE] = {};  // of eight arena rows, twice
    for (int64_t j = 0; j < SIDE; j++) A[j] = piece.part->A + piece.cols[std::min(j, piece.count - 1)] * K;
    for (int64_t j = 0; j < piece.count; j++) {
        float* at = coef[j / block::ROWS] + j % block::ROWS;
        at[0] = at[block::ROWS] = piece.coef[j];
    }
    Mine mine(piece.mine);
    for (int i = 0; i < mine.count; i += 2) {
        int rows[2] = {mine.rows[i], mine.rows[std::min(i + 1, mine.count - 1)]};
        const bf16* x[2] = {first + rows[0] * K, first + rows[1] * K};
        for (int64_t h = 0, j = 0; h < 2; h++, j += block::ROWS) {
            uint16_t used = (1 << std::clamp<int64_t>(piece.count - j, 0, block::ROWS)) - 1;
            Floats S = used ? products(x, A + j, K) * read<Floats>(coef[h]) : Floats{};
            bf16 high[SIDE], low[SIDE];
            block::split(block::those(used * 0x101, S), high, low);
            for (int r = 0; r < 2; r++) {
                bf16* to = (bf16*)piece.S + rows[r] * DEPTH + j;
                std::memcpy(to, high + r * block::ROWS, block::ROWS * sizeof(bf16));
                std::memcpy(to + SIDE, low + r * block::ROWS, block::ROWS * sizeof(bf16));
            }
        }
    }
}

// S^T of a piece to where it is kept, zero for rows of others.
void keep(const Call& call, const Work& work, const Piece& piece) {
    bf16* at = piece.part->S + (piece.cols - piece.part->route->cols) * call.padded + work.first + piece.tile * SIDE;
    Floats columns[SIDE];
    for (int m = 0; m < SIDE; m++)
        columns[m] = piece.mine >> m & 1 ? block::widen((const bf16*)piece.S + m * DEPTH, SIDE) : Floats{};
    block::transpose(columns);
    for (int64_t j = 0; j < piece.count; j++) block::narrow(columns[j], at + j * call.padded, SIDE);
}

void shrink(const Call& call, const Work& work, const Piece& piece) {
    shrink_rows(work, piece);
    if (piece.part->S) keep(call, work, piece);
}

// ---- expand --------------------------------------------------------------------------------------------------

// A piece's rows of Bt in pairs, `strips` of 16 columns from n on: [strips, 8, 16, 2].
void zip(const Piece& piece, int64_t n, int64_t strips, bf16* to) {
    int64_t N = piece.part->columns;
    for (int64_t s = 0; s < strips; s++, n += SIDE)
        for (int64_t j = 0; j < piece.count; j += 2) {
            const bf16* even = piece.part->Bt + piece.cols[j] * N + n;
            const bf16* odd = j + 1 < piece.count ? piece.part->Bt + piece.cols[j + 1] * N + n : nullptr;
            Pairs pairs = block::zipped(even, odd, N - n);
            std::memcpy(to + s * ZIPPED + j / 2 * DEPTH, &pairs, sizeof pairs);
        }
}

// sums of rows of a tile += S Bt, from a strip of the page on.
template <int ROWS, int STRIPS>
INLINED void add(const Term& term, const int* rows, int64_t strip, Sums<ROWS, STRIPS>& sums) {
    const bf16* S[ROWS];
    EACH(i, ROWS) S[i] = term.S + rows[i] * DEPTH;
    sums.expand(S, term.page + strip * ZIPPED, term.count);
}

template <int ROWS, int STRIPS> void expand(const Piece& piece, const int* mine, const bf16* page, float* rows) {
    Sums<ROWS, STRIPS> sums;
    sums.load(rows, WIDE, mine);
    add({(const bf16*)piece.S, page, piece.count}, mine, 0, sums);
    sums.store(rows, WIDE, mine);
}

// A piece's rows of y, `STRIPS` of 16 columns, += S Bt.
template <int STRIPS> void expand(const Piece& piece, const bf16* page, float* rows) {
    Mine mine(piece.mine);
    int i = 0;
    for (; i + TOGETHER <= mine.count; i += TOGETHER) expand<TOGETHER, STRIPS>(piece, mine.rows + i, page, rows);
    for (; i + 2 <= mine.count; i += 2) expand<2, STRIPS>(piece, mine.rows + i, page, rows);
    if (i < mine.count) expand<1, STRIPS>(piece, mine.rows + i, page, rows);
}

struct Pieces {
    const Piece *begin, *end;
};

Pieces pieces_of(const Work& work, const Task& task, int64_t t) {
    const int64_t* starts = work.starts.data() + task.number * work.tiles + t;
    return {work.pieces.data() + starts[0], work.pieces.data() + starts[1]};
}

// ---- to y ----------------------------------------------------------------------------------------------------

// rows += what dropout lets through of what is added.
void add(const Dropped& dropped, int64_t first, int64_t count, int64_t n, int strips, int64_t columns,
         const float* added, float* rows) {
    for (int64_t m = 0; m < count; m++)
        for (int s = 0; s < strips; s++) {
            int64_t bit = n + s * SIDE;
            uint16_t bits = dropped.bits[((first + m) * columns + bit) / DEPTH] >> bit % DEPTH;
            float* at = rows + m * WIDE + s * SIDE;
            Floats kept = block::those(bits, read<Floats>(added + m * WIDE + s * SIDE));
            kept = read<Floats>(at) + kept * dropped.scale;
            std::memcpy(at, &kept, sizeof kept);
        }
}

// Rows of y from n on, which `rows` numbers from `first` on.
template <int ROWS, int STRIPS>
INLINED void write(const Output& output, const Sums<ROWS, STRIPS>& sums, int64_t first, const int* rows, int64_t n) {
    int64_t N = output.columns;
    EACH(s, STRIPS) {
        int64_t at = n + s * SIDE;
        Floats bias = output.bias ? block::widen(output.bias + at, N - at) : Floats{};
        EACH(i, ROWS) {
            Floats y = output.bias ? sums.held[i][s] + bias : sums.held[i][s];
            block::narrow(y, output.y + (first + rows[i]) * N + at, N - at);
        }
    }
}

// y of a tile of batch rows from `rows`, to which its pieces are still to be added; page: where their Bt is zipped.
template <int STRIPS, class Page>
void finish(const Call& call, const Work& work, const Task& task, int64_t t, int64_t n, Page page, float* rows,
            float* added) {
    const Output& output = *task.output;
    int64_t first = work.first + t * SIDE, count = std::min<int64_t>(SIDE, work.rows - t * SIDE), N = output.columns;
    auto [piece, end] = pieces_of(work, task, t);
    float* to = call.dropped.bits ? added : rows;
    if (call.dropped.bits) std::memset(added, 0, SIDE * WIDE * sizeof(float));
    for (; piece < end; piece++) expand<STRIPS>(*piece, page(*piece), to);
    if (call.dropped.bits) add(call.dropped, first, count, n, STRIPS, N, added, rows);
    for (int m = 0; m < count; m++) {
        Sums<1, STRIPS> sums;
        sums.load(rows, WIDE, &m);
        write(output, sums, first, &m, n);
    }
}

}  // namespace
