// What a call of the fused linear consists of, and how it is cut into pieces and tasks. Included by fused.cpp alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "arrange.h"
#include "route.h"

namespace {

using tile::bf16, tile::BF16S, tile::DEPTH, tile::FLOATS, tile::SIDE;

constexpr int64_t SLAB = 1024;        // batch rows at a time; bounds what is kept between calls
constexpr int64_t PANEL = 2 * SIDE;   // columns of y that are computed together
constexpr int64_t WEIGHTS = 1 << 18;  // of a task at most, if they are turned: they are to stay in the L2 cache
constexpr int64_t PANELS = 8;         // of a task at most
constexpr int64_t TILES = 32;         // of batch rows in a task
constexpr int64_t FEW = 2;            // panels of a task that has a single tile of batch rows
constexpr int64_t SMALL = 1 << 20;    // multiplications that are not worth waking other threads for

// A matrix of batch rows. offset: of its features among those of all inputs
struct Input {
    const bf16* x;
    int64_t features, offset;
};

// What one linear adds to an output: x W^T + ((seen A^T) * C) Bt, or with W turned; seen: x, or what dropout leaves of it.
struct Part {
    Input x, seen;
    const bf16 *W, *A, *Bt;
    int64_t columns;
    const Route* route;
    bf16* S;  // [entries of the route, padded rows] to keep, zero where a row is not of an entry's group; or null
};

struct Output {
    bf16* y;
    const bf16* bias;
    int64_t columns;
    const Part *begin, *end;
};

// Dropout of what is added to an output: what bits [M, columns / 32] (null: none) let through, times scale.
struct Dropped {
    const uint32_t* bits;
    float scale;
};

struct Call {
    std::vector<Input> inputs;  // those that are read in pairs, by their offsets
    std::vector<Part> parts;
    std::vector<Output> outputs;
    int64_t features, columns, M, padded, threads;  // features: of all inputs; columns: of all outputs
    bool turned;                                    // W [features, columns]
    Dropped dropped;
};

// Up to 16 arena rows of one group, for a tile of batch rows.
struct Piece {
    const Part* part;
    const int64_t* cols;
    const float* coef;
    int64_t count, page;  // page: a number for these arena rows, the same in every tile of rows
    int64_t tile;
    uint16_t mine;  // which batch rows of the tile are the group's
    void* S;        // 1 KiB, which a kernel's shrink fills for its expand
};

struct Shrink {  // pieces of parts that have as many features
    const Piece* pieces[4];
    int64_t count, features;
};

struct Task {  // columns [begin, end) of an output, for the tiles of batch rows [first, last)
    const Output* output;
    int64_t number, begin, end, first, last;
};

struct Shape {  // of tasks
    int64_t width, height;  // columns, tiles of batch rows
};

// f(how many tiles of batch rows, the first of them, column) for every panel of a task and every two tiles.
template <class F> void by_twos(const Task& task, F f) {
    for (int64_t t = task.first; t < task.last; t += 2)
        for (int64_t n = task.begin; n < task.end; n += PANEL)
            if (t + 1 < task.last) f(std::integral_constant<int, 2>(), t, n);
            else f(std::integral_constant<int, 1>(), t, n);
}

int64_t panels(const Task& task) { return (task.end - task.begin + PANEL - 1) / PANEL; }

template <class T> T* lined(std::vector<T>& room, int64_t size) {  // at a cache line
    constexpr int64_t line = 64 / sizeof(T);
    if (int64_t(room.size()) < size + line) room.resize(size + line);
    return (T*)((uintptr_t(room.data()) + 63) / 64 * 64);
}

// What a slab of rows needs; kept between calls of a thread, so that a decode step allocates nothing.
struct Work {
    std::vector<bf16> x_room, S_room;
    std::vector<int32_t> groups;  // of each part of an output, for each row
    std::vector<Piece> pieces;
    std::vector<int64_t> starts;  // pieces of output i and tile t: [starts[i * tiles + t], starts[i * tiles + t + 1])
    std::vector<Shrink> shrinks;
    std::vector<Task> tasks;
    bf16* x = nullptr;  // [tiles, features / 32] tiles
    int64_t first = 0, rows = 0, tiles = 0, pages = 0;

    void plan(const Call& call, int64_t begin) {
        first = begin, rows = std::min(SLAB, call.M - begin), tiles = (rows + SIDE - 1) / SIDE, pages = 0;
        x = lined(x_room, tiles * SIDE * call.features);
        pieces.clear(), starts.clear();
        for (const Output& output : call.outputs) cut(output);
        starts.push_back(pieces.size());
        bf16* S = lined(S_room, pieces.size() * BF16S);
        for (Piece& piece : pieces) piece.S = S, S += BF16S;
        share_out_shrinks();
    }

    // The pieces of an output, tile of rows by tile.
    void cut(const Output& output) {
        groups.resize((output.end - output.begin) * rows);
        for (int64_t t = 0; t < tiles; t++) {
            starts.push_back(pieces.size());
            int64_t base = pages;
            for (const Part* part = output.begin; part < output.end; part++) {
                int32_t* group = groups.data() + (part - output.begin) * rows;
                if (part->route->rows && t == 0) find_groups(*part->route, group);
                cut_tile(*part, group, t, base);
                // j / SIDE grows by one at least in a group of more than one page, g by one from group to group
                base += part->route->groups + part->route->col_start[part->route->groups] / SIDE + 1;
            }
            if (t + 1 == tiles) pages = base;
        }
    }

    void find_groups(const Route& route, int32_t* group) {
        std::fill(group, group + rows, 0);
        for (int64_t g = 0; g < route.groups; g++)
            for (int64_t r = route.row_start[g]; r < route.row_start[g + 1]; r++)
                if (route.rows[r] >= first && route.rows[r] < first + rows) group[route.rows[r] - first] = g;
    }

    void cut_tile(const Part& part, const int32_t* group, int64_t t, int64_t base) {
        const Route& route = *part.route;
        int64_t left = std::min<int64_t>(SIDE, rows - t * SIDE);
        for (uint32_t open = (1u << left) - 1; open;) {
            int64_t g = route.rows ? group[t * SIDE + __builtin_ctz(open)] : 0;
            uint16_t mine = open;
            if (route.rows)
                for (int64_t m = mine = 0; m < left; m++) mine |= uint16_t(group[t * SIDE + m] == g) << m;
            open &= ~uint32_t(mine);
            for (int64_t j = route.col_start[g]; j < route.col_start[g + 1]; j += SIDE)
                pieces.push_back({&part, route.cols + j, route.coef + j,
                                  std::min<int64_t>(SIDE, route.col_start[g + 1] - j), base + g + j / SIDE, t, mine,
                                  nullptr});
        }
    }

    void share_out_shrinks() {
        shrinks.clear();
        for (const Piece& piece : pieces) {
            int64_t features = piece.part->x.features, i = int64_t(shrinks.size()) - 1;
            // the parts of an output follow each other in every tile of rows
            for (int64_t seen = 0; i >= 0 && seen < 4; i--, seen++)
                if (shrinks[i].features == features && shrinks[i].count < 4) break;
            if (i < 0 || shrinks[i].features != features || shrinks[i].count == 4) {
                i = shrinks.size();
                shrinks.push_back({{}, 0, features});
            }
            shrinks[i].pieces[shrinks[i].count++] = &piece;
        }
    }

    void share_out(const Call& call, const Shape& shape) {
        tasks.clear();
        for (size_t i = 0; i < call.outputs.size(); i++) {
            const Output& output = call.outputs[i];
            for (int64_t n = 0; output.y && n < output.columns; n += shape.width)
                for (int64_t t = 0; t < tiles; t += shape.height)
                    tasks.push_back({&output, int64_t(i), n, std::min(output.columns, n + shape.width), t,
                                     std::min(tiles, t + shape.height)});
        }
    }
};

// Tasks of weights that are read as they lie, or turned.
Shape panels_of(const Call& call, const Work& work) {
    int64_t width = work.tiles == 1 ? FEW * PANEL : PANELS * PANEL, height = std::min(TILES, work.tiles);
    while (width > PANEL && call.columns / width * (work.tiles / height) < 4 * call.threads) width /= 2;
    while (call.turned && width > PANEL && width * call.features > WEIGHTS) width /= 2;
    return {width, height};
}

// ---- weights -------------------------------------------------------------------------------------------------

// A panel of a weight matrix: tiles of columns 0 to 15 and 16 to 31 for features k are at `at + k * step` and `half`
// further on, their rows `stride` bytes apart.
struct Weights {
    const bf16* at;
    int64_t step, half, stride;
};

// The last rows of W, with zeros below.
const bf16* padded(const bf16* W, int64_t count, int64_t K, std::vector<bf16>& kept) {
    bf16* room = lined(kept, PANEL * K);
    std::memcpy(room, W, 2 * count * K);
    std::memset(room + count * K, 0, 2 * (PANEL - count) * K);
    return room;
}

// The panels of a task, turned: for each panel and each 32 features of all parts two tiles.
void turn(const Call& call, const Task& task, std::vector<bf16>& kept) {
    bf16* to = lined(kept, panels(task) * PANEL * call.features);
    for (int64_t n = task.begin; n < task.end; n += PANEL)
        for (const Part& part : call.parts)
            for (int64_t k = 0; k < part.x.features; k += DEPTH, to += 2 * BF16S) {
                tile::turn(part.W + k * part.columns + n, part.columns, to);
                tile::turn(part.W + k * part.columns + n + SIDE, part.columns, to + BF16S);
            }
}

Weights weights(const Call& call, const Part& part, const Task& task, int64_t n, std::vector<bf16>& kept) {
    if (call.turned) {
        bf16* panel = lined(kept, 0) + (n - task.begin) * call.features;
        return {panel + part.x.offset * PANEL, PANEL, BF16S, tile::ROW};
    }
    int64_t K = part.x.features, left = part.columns - n;
    return {left < PANEL ? padded(part.W + n * K, left, K, kept) : part.W + n * K, 1, SIDE * K, 2 * K};
}

}  // namespace
