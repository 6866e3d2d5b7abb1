// Many batch rows: weights are laid out in pairs, strip by strip of 16 columns, x and dy are read as they lie, and y is
// computed row by row: sums of eight rows and three strips are in registers from the first feature to the last arena
// row. Included by fused_vectors.h alone.
#pragma once

#include "fused_rows.h"

namespace {

constexpr int64_t ABREAST = 2;  // times STRIPS in a task: whole cache lines of y, so that no two threads share one
constexpr int64_t DEEP = 4096;  // features of STRIPS of W that are laid out together: they are to stay in the L2 cache
constexpr int64_t AHEAD = 32;   // features that are fetched ahead of being laid out
constexpr int64_t PAGES = 256;  // that a thread keeps
constexpr int64_t HEIGHT = 8;   // tiles of batch rows at least for which weights are laid out anew

Shape strips_of(const Call& call, const Work& work) {
    int64_t width = call.features * ABREAST <= DEEP ? ABREAST * WIDE : WIDE, height = work.tiles;
    while (height > HEIGHT && call.columns / width * ((work.tiles + height - 1) / height) < 4 * call.threads)
        height = (height + 1) / 2;
    return {width, height};
}

// An output's features, cut into stretches and these into lots whose weights are laid out together.
struct Cutter {
    const Part *part, *end;
    int64_t k = 0;

    // The next lot; false: there is none.
    bool next(std::vector<Stretch>& lot, int64_t strips, std::vector<bf16>& room) {
        lot.clear();
        int64_t size = 0;
        for (int64_t left = DEEP; part < end && left;) {
            int64_t features = std::min(left, part->x.features - k);
            lot.push_back({part, k, features, nullptr});
            size += features, left -= features, k += features;
            if (k == part->x.features) part++, k = 0;
        }
        bf16* matrix = lined(room, size * strips * SIDE);
        for (Stretch& stretch : lot) stretch.matrix = matrix, matrix += stretch.features * strips * SIDE;
        return !lot.empty();
    }
};

// W for a stretch, `strips` of 16 columns from n on; the next columns are fetched meanwhile.
void lay_out(const Stretch& stretch, int64_t n, int64_t strips) {
    const Part& part = *stretch.part;
    int64_t K = part.x.features;
    bf16* to = stretch.matrix;
    for (int64_t s = 0; s < strips; s++, n += SIDE)
        for (int64_t k = stretch.k; k < stretch.k + stretch.features; k += DEPTH, to += BF16S) {
            const bf16* from = part.W + n * K + k;
            for (int64_t i = SIDE; i < std::min<int64_t>(2 * SIDE, part.columns - n); i++)
                __builtin_prefetch(from + i * K);
            tile::pair(from, K, part.columns - n, to);
        }
}

// The same of W [features, columns]; the next features are fetched meanwhile.
void lay_out_turned(const Stretch& stretch, int64_t n, int64_t strips) {
    const Part& part = *stretch.part;
    int64_t N = part.columns;
    bf16* to = stretch.matrix;
    for (int64_t k = stretch.k; k < stretch.k + stretch.features; k += 2, to += DEPTH) {
        const bf16* even = part.W + k * N + n;
        if (k + AHEAD < part.x.features)
            for (int64_t i = 0; i < 2; i++)
                for (int64_t s = 0; s < strips; s += 2) __builtin_prefetch(even + (AHEAD + i) * N + s * SIDE);
        for (int64_t s = 0; s < strips; s++) {
            Pairs pairs = block::zipped(even + s * SIDE, even + N + s * SIDE, N - n - s * SIDE);
            std::memcpy(to + s * stretch.features * SIDE, &pairs, sizeof pairs);
        }
    }
}

// TOGETHER rows of a tile, the last again where there are fewer.
struct Eight {
    int rows[TOGETHER];
    Eight(int64_t first, int64_t left) {
        for (int i = 0; i < TOGETHER; i++) rows[i] = std::min<int>(first + i, left - 1);
    }
};

// Whether all rows of a tile are of one group, and what is added to them needs no dropout.
bool alike(const Call& call, const Work& work, const Pieces& pieces, int64_t t) {
    uint16_t all = (1 << std::min<int64_t>(SIDE, work.rows - t * SIDE)) - 1;
    return !call.dropped.bits &&
           std::all_of(pieces.begin, pieces.end, [&](const Piece& piece) { return piece.mine == all; });
}

// What there is to do with a tile of rows for a lot.
struct Round {
    const std::vector<Stretch>& lot;
    bool first, last;
    const std::vector<Term>* terms;  // to add before y is written; null: only sums are
};

// TOGETHER rows of a tile and STRIPS of a task, from `strip` on: += x W^T of a lot, or = that, in `rows`; or, with
// terms added, to y. A function of its own, without calls, so that sums stay in registers.
template <int STRIPS>
__attribute__((noinline)) void compute_rows(const Work& work, const Task& task, int64_t t, const Round& round,
                                            const Eight& eight, int64_t strip, float* rows) {
    bool more = t * SIDE + eight.rows[0] + 2 * TOGETHER <= work.rows;
    Sums<TOGETHER, STRIPS> sums;
    if (round.first) sums.clear();
    else sums.load(rows, WIDE, eight.rows);
    for (const Stretch& stretch : round.lot) {
        int64_t K = stretch.part->x.features, apart = stretch.features * SIDE;
        const bf16 *x = stretch.part->x.x + (work.first + t * SIDE) * K + stretch.k, *at[TOGETHER];
        EACH(i, TOGETHER) at[i] = x + eight.rows[i] * K;
        sums.multiply(at, stretch.matrix + strip * apart, apart, stretch.features, more ? TOGETHER * K : 0);
    }
    if (!round.terms) return sums.store(rows, WIDE, eight.rows);
    for (const Term& term : *round.terms) add(term, eight.rows, strip, sums);
    write(*task.output, sums, work.first + t * SIDE, eight.rows, task.begin + strip * SIDE);
}

// A tile of rows and STRIPS of a task, from `strip` on.
template <int STRIPS, class Page>
void compute_tile(const Call& call, const Work& work, const Task& task, int64_t t, const Round& round, int64_t strip,
                   Page page, float* rows, Desk& desk) {
    int64_t left = std::min<int64_t>(SIDE, work.rows - t * SIDE);
    for (int64_t m = 0; m < left; m += TOGETHER) compute_rows<STRIPS>(work, task, t, round, {m, left}, strip, rows);
    auto part = [&](const Piece& piece) { return page(piece) + strip * ZIPPED; };
    if (round.last && !round.terms)
        finish<STRIPS>(call, work, task, t, task.begin + strip * SIDE, part, rows, desk.added);
}

void compute_many(const Call& call, const Work& work, const Task& task, Desk& desk) {
    constexpr int64_t tile = SIDE * WIDE * ABREAST;  // of sums
    int64_t strips = (task.end - task.begin + SIDE - 1) / SIDE;
    bool alone = call.features <= DEEP;  // there is one lot: sums need no memory
    float* kept = lined(desk.row_room, (alone ? 1 : task.last - task.first) * tile);
    desk.pages.begin(work, strips * ZIPPED, PAGES);
    auto page = [&](const Piece& piece) {
        return desk.pages.of(piece, [&](bf16* to) { zip(piece, task.begin, strips, to); });
    };
    Cutter cutter = {task.output->begin, task.output->end};
    for (bool first = true; cutter.next(desk.lot, strips, desk.weight_room); first = false) {
        for (const Stretch& stretch : desk.lot)
            call.turned ? lay_out_turned(stretch, task.begin, strips) : lay_out(stretch, task.begin, strips);
        for (int64_t t = task.first; t < task.last; t++) {
            Round round = {desk.lot, first, cutter.part == cutter.end, nullptr};
            Pieces pieces = pieces_of(work, task, t);
            if (round.last && desk.pages.all(work) && alike(call, work, pieces, t)) {
                round.terms = &desk.terms;
                desk.terms.clear();
                for (const Piece* piece = pieces.begin; piece < pieces.end; piece++)
                    desk.terms.push_back({(const bf16*)piece->S, page(*piece), piece->count});
            }
            float* rows = kept + (alone ? 0 : t - task.first) * tile;
            for (int64_t s = 0; s < strips; s += STRIPS, rows += SIDE * WIDE)
                if (strips - s >= 3) compute_tile<3>(call, work, task, t, round, s, page, rows, desk);
                else if (strips - s == 2) compute_tile<2>(call, work, task, t, round, s, page, rows, desk);
                else compute_tile<1>(call, work, task, t, round, s, page, rows, desk);
        }
    }
}

}  // namespace
