// Many batch rows: weights are laid out in pairs, strip by strip of 16 columns, and x and dy are read as they lie.
// Included by fused_vectors.h alone.
#pragma once

#include "fused_rows.h"

namespace {

constexpr int64_t DEEP = 4096;  // features of weights that are laid out together: they are to stay in the L2 cache
constexpr int64_t AHEAD = 32;   // features that are fetched ahead of being laid out
constexpr int64_t PAGES = 256;  // that a thread keeps
constexpr int64_t HEIGHT = 8;   // tiles of batch rows at least for which they are laid out anew

Shape strips_of(const Call& call, const Work& work) {
    int64_t height = work.tiles;
    while (height > HEIGHT && call.columns / WIDE * ((work.tiles + height - 1) / height) < 4 * call.threads)
        height = (height + 1) / 2;
    return {WIDE, height};
}

// An output's features, cut into stretches and these into lots whose weights are laid out together.
struct Cutter {
    const Part *part, *end;
    int64_t k = 0;

    // The next lot; false: there is none.
    bool next(std::vector<Stretch>& lot, int strips, std::vector<bf16>& room) {
        bf16* matrix = lined(room, DEEP * strips * SIDE);
        lot.clear();
        for (int64_t left = DEEP; part < end && left;) {
            int64_t features = std::min(left, part->x.features - k);
            lot.push_back({part, k, features, matrix});
            matrix += features * strips * SIDE, left -= features, k += features;
            if (k == part->x.features) part++, k = 0;
        }
        return !lot.empty();
    }
};

// W for a stretch, `STRIPS` of 16 columns from n on; the next columns are fetched meanwhile.
template <int STRIPS> void lay_out(const Stretch& stretch, int64_t n) {
    const Part& part = *stretch.part;
    int64_t K = part.x.features;
    bf16* to = stretch.matrix;
    for (int s = 0; s < STRIPS; s++, n += SIDE)
        for (int64_t k = stretch.k; k < stretch.k + stretch.features; k += DEPTH, to += BF16S) {
            const bf16* from = part.W + n * K + k;
            for (int64_t i = SIDE; i < std::min<int64_t>(2 * SIDE, part.columns - n); i++)
                __builtin_prefetch(from + i * K);
            tile::pair(from, K, part.columns - n, to);
        }
}

// The same of W [features, columns]; the next features are fetched meanwhile.
template <int STRIPS> void lay_out_turned(const Stretch& stretch, int64_t n) {
    const Part& part = *stretch.part;
    int64_t N = part.columns;
    bf16* to = stretch.matrix;
    for (int64_t k = stretch.k; k < stretch.k + stretch.features; k += 2, to += DEPTH) {
        const bf16* even = part.W + k * N + n;
        if (k + AHEAD < part.x.features)
            for (int i = 0; i < 2; i++)
                for (int s = 0; s < STRIPS; s += 2) __builtin_prefetch(even + (AHEAD + i) * N + s * SIDE);
        for (int s = 0; s < STRIPS; s++) {
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

// What there is to do with the columns of a task for a lot.
struct Round {
    const std::vector<Stretch>& lot;
    bool first, last;
};

// Rows of a tile, += x W^T of a lot, or = that, in `rows`; or, with terms added, to y. A function of its own, without
// calls, so that sums stay in registers.
template <int STRIPS>
__attribute__((noinline)) void compute_rows(const Work& work, const Task& task, int64_t t, const Round& round,
                                            const Eight& eight, const std::vector<Term>* terms, float* rows) {
    bool more = t * SIDE + eight.rows[0] + 2 * TOGETHER <= work.rows;
    Sums<TOGETHER, STRIPS> sums;
    if (round.first) sums.clear();
    else sums.load(rows, WIDE, eight.rows);
    for (const Stretch& stretch : round.lot) {
        int64_t K = stretch.part->x.features;
        const bf16 *x = stretch.part->x.x + (work.first + t * SIDE) * K + stretch.k, *at[TOGETHER];
        EACH(i, TOGETHER) at[i] = x + eight.rows[i] * K;
        sums.multiply(at, stretch.matrix, stretch.features * SIDE, stretch.features, more ? TOGETHER * K : 0);
    }
    if (!terms) return sums.store(rows, WIDE, eight.rows);
    for (const Term& term : *terms) add(term, eight.rows, sums);
    write(*task.output, sums, work.first + t * SIDE, eight.rows, task.begin);
}

// The columns of a task, `STRIPS` of 16.
template <int STRIPS> void columns(const Call& call, const Work& work, const Task& task, Desk& desk) {
    Cutter cutter = {task.output->begin, task.output->end};
    bool first = true, alone = call.features <= DEEP;  // alone: one lot
    float* kept = lined(desk.row_room, (alone ? 1 : task.last - task.first) * SIDE * WIDE);
    auto page = [&](const Piece& piece) {
        return desk.pages.of(piece, [&](bf16* to) { zip(piece, task.begin, STRIPS, to); });
    };
    for (; cutter.next(desk.lot, STRIPS, desk.weight_room); first = false) {
        Round round = {desk.lot, first, cutter.part == cutter.end};
        for (const Stretch& stretch : desk.lot)
            call.turned ? lay_out_turned<STRIPS>(stretch, task.begin) : lay_out<STRIPS>(stretch, task.begin);
        for (int64_t t = task.first; t < task.last; t++) {
            float* rows = kept + (alone ? 0 : t - task.first) * SIDE * WIDE;
            Pieces pieces = pieces_of(work, task, t);
            bool at_once = round.last && desk.pages.all(work) && alike(call, work, pieces, t);
            desk.terms.clear();
            for (const Piece* piece = pieces.begin; at_once && piece < pieces.end; piece++)
                desk.terms.push_back({(const bf16*)piece->S, page(*piece), piece->count});
            int64_t left = std::min<int64_t>(SIDE, work.rows - t * SIDE);
            for (int64_t m = 0; m < left; m += TOGETHER)
                compute_rows<STRIPS>(work, task, t, round, {m, left}, at_once ? &desk.terms : nullptr, rows);
            if (round.last && !at_once) finish<STRIPS>(call, work, task, t, task.begin, page, rows, desk.added);
        }
    }
}

void compute_many(const Call& call, const Work& work, const Task& task, Desk& desk) {
    desk.pages.begin(work, STRIPS * ZIPPED, PAGES);
    int64_t strips = (task.end - task.begin + SIDE - 1) / SIDE;
    if (strips == 1) columns<1>(call, work, task, desk);
    else if (strips == 2) columns<2>(call, work, task, desk);
    else columns<STRIPS>(call, work, task, desk);
}

}  // namespace
