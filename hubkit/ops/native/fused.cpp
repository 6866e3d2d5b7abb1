// The multi-LoRA linear in bf16 on AMX, base product and deltas in one pass: y = x W^T + b + ((x A^T) * C[group]) Bt
// for linears that read the same x; and its gradient, dx = sum of dy W + ((dy Bt^T) * C[group]) A over these linears,
// which is the same with other parts.
//
// Everything is computed transposed, y^T = W x^T: then W, A and x are read as they lie, and only x has to be paired
// up, once for all linears. A tile of y^T (16 columns of y, 16 batch rows) stays in its register through the whole sum
// over features and through the expansion, and is rounded once. Batch rows need no order: a tile of rows takes the
// arena rows of each of its groups in turn, and S is zero in the rows of others. S keeps 16 bits, as two bf16 numbers,
// so that one `dot` of depth 32 expands 16 arena rows.
//
// An element of y is one chain of additions whose order depends on K and its own group alone, whatever the number of
// threads and the other rows are.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "route.h"
#include "tile.h"

namespace {

using tile::bf16, tile::BF16S, tile::DEPTH, tile::FLOATS, tile::SIDE;

constexpr int64_t SLAB = 1024;        // batch rows at a time; bounds what is kept between calls
constexpr int64_t PANEL = 2 * SIDE;   // columns of y that are computed together
constexpr int64_t WEIGHTS = 1 << 18;  // of a task at most, if they are turned: they are to stay in the L2 cache
constexpr int64_t PANELS = 8;         // of a task at most
constexpr int64_t TILES = 32;         // of batch rows in a task
constexpr int64_t FEW = 2;            // panels of a task that has a single tile of batch rows
constexpr int64_t PAGES = 64;         // of arena rows that a thread keeps transposed
constexpr int64_t SMALL = 1 << 20;    // multiplications that are not worth waking other threads for

// What one linear adds to an output: x W^T + ((x A^T) * C) Bt, or with W turned.
struct Part {
    const bf16 *x, *W, *A, *Bt;
    int64_t features, columns, offset;  // offset: of its features among those of all inputs
    const Route* route;
    bf16* S;  // [ranks, padded rows] to keep, of a lone group, or null
};

struct Output {
    bf16* y;
    const bf16* bias;
    int64_t columns;
    const Part *begin, *end;
};

struct Call {
    std::vector<Part> parts;
    std::vector<Output> outputs;
    int64_t inputs, features, M, padded, threads;  // the first `inputs` parts read different ones; padded: of kept S
    bool turned;                                   // W [features, columns]
};

// Up to 16 arena rows of one group, for a tile of batch rows.
struct Piece {
    const Part* part;
    const int64_t* cols;
    const float* coef;
    int64_t count, page;  // page: a number for these arena rows, the same in every tile of rows
    int64_t tile;
    uint16_t mine;  // which batch rows of the tile are the group's
    bf16* S;        // [16, 16, 2]
};

struct Shrink {  // pieces of parts that have as many features
    const Piece* pieces[4];
    int64_t count, features;
};

struct Task {  // columns [begin, end) of an output, for the tiles of batch rows [first, last)
    const Output* output;
    int64_t number, begin, end, first, last;
};

int64_t panels(const Task& task) { return (task.end - task.begin + PANEL - 1) / PANEL; }

template <class T> T* lined(std::vector<T>& room, int64_t size) {  // at a cache line
    constexpr int64_t line = 64 / sizeof(T);
    if (int64_t(room.size()) < size + line) room.resize(size + line);
    return (T*)((uintptr_t(room.data()) + 63) / 64 * 64);
}

// What a slab of rows needs; kept between calls of a thread, so that a decode step allocates nothing.
struct Work {
    std::vector<bf16> x_room, S_room;
    std::vector<int32_t> group;
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
        share_out(call);
    }

    // The pieces of an output, tile of rows by tile.
    void cut(const Output& output) {
        for (int64_t t = 0; t < tiles; t++) {
            starts.push_back(pieces.size());
            int64_t base = pages;
            for (const Part* part = output.begin; part < output.end; part++) {
                if (part->route->rows && (t == 0 || output.end - output.begin > 1)) find_groups(*part->route);
                cut_tile(*part, t, base);
                // j / SIDE grows by one at least in a group of more than one page, g by one from group to group
                base += part->route->groups + part->route->col_start[part->route->groups] / SIDE + 1;
            }
            if (t + 1 == tiles) pages = base;
        }
    }

    void find_groups(const Route& route) {
        group.assign(rows, 0);
        for (int64_t g = 0; g < route.groups; g++)
            for (int64_t r = route.row_start[g]; r < route.row_start[g + 1]; r++)
                if (route.rows[r] >= first && route.rows[r] < first + rows) group[route.rows[r] - first] = g;
    }

    void cut_tile(const Part& part, int64_t t, int64_t base) {
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
            int64_t features = piece.part->features, i = int64_t(shrinks.size()) - 1;
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

    void share_out(const Call& call) {
        tasks.clear();
        int64_t columns = 0, width = PANELS * PANEL, height = std::min(TILES, tiles);
        for (const Output& output : call.outputs) columns += output.columns;
        if (tiles == 1) width = FEW * PANEL;
        while (width > PANEL && columns / width * (tiles / height) < 4 * call.threads) width /= 2;
        while (call.turned && width > PANEL && width * call.features > WEIGHTS) width /= 2;
        for (size_t i = 0; i < call.outputs.size(); i++) {
            const Output& output = call.outputs[i];
            for (int64_t n = 0; output.y && n < output.columns; n += width)
                for (int64_t t = 0; t < tiles; t += height)
                    tasks.push_back({&output, int64_t(i), n, std::min(output.columns, n + width), t,
                                     std::min(tiles, t + height)});
        }
    }
};

// A thread's own room.
struct Desk {
    std::vector<bf16> arena_room, page_room, weight_room;
    bf16* slots = nullptr;      // transposed pages, for the columns of a task
    std::vector<int64_t> tags;  // which page lies in each slot
    alignas(64) float sums[4 * FLOATS];
};

// ---- shrink --------------------------------------------------------------------------------------------------

struct Rows {
    const bf16* at;
    int64_t stride;  // bytes
};

// A piece's rows of A: where they lie, if that is 16 in a row, else copied together.
Rows arena_rows(const Piece& piece, bf16* room) {
    int64_t K = piece.part->features;
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
    tile::split(sums, piece.coef, piece.count, piece.mine, piece.S);
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
        x[i] = work.x + (piece.tile * call.features + piece.part->offset) * SIDE;
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

// ---- base and expand -----------------------------------------------------------------------------------------

// A panel of a weight matrix: tiles of columns 0 to 15 and 16 to 31 for features k are at `at + k * step` and `half`
// further on, their rows `stride` bytes apart.
struct Weights {
    const bf16* at;
    int64_t step, half, stride;
};

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

// A piece's rows of Bt for the columns of a task, transposed: two tiles for every panel.
const bf16* transposed(const Piece& piece, const Task& task, Desk& desk) {
    int64_t slot = piece.page % desk.tags.size(), N = piece.part->columns;
    bf16* page = desk.slots + slot * panels(task) * 2 * BF16S;
    if (desk.tags[slot] != piece.page) {
        desk.tags[slot] = piece.page;
        const bf16* rows[SIDE];
        for (int64_t j = 0; j < piece.count; j++) rows[j] = piece.part->Bt + piece.cols[j] * N;
        for (int64_t i = 0; i < 2 * panels(task); i++)
            tile::twice(rows, piece.count, task.begin + i * SIDE, N, page + i * BF16S);
    }
    return page;
}

template <int D> void expand(const Piece* piece, const Piece* end, const Task& task, int64_t n, Desk& desk) {
    for (; piece < end; piece++) {
        const bf16* Bt = transposed(*piece, task, desk) + (n - task.begin) / SIDE * BF16S;
        tile::load<6>(piece->S, tile::ROW);
        tile::load<4>(Bt, tile::ROW);
        tile::dot<D, 4, 6>();
        tile::load<5>(Bt + BF16S, tile::ROW);
        tile::dot<D + 1, 5, 6>();
    }
}

// The last rows of W, with zeros below.
const bf16* padded(const bf16* W, int64_t count, int64_t K, Desk& desk) {
    bf16* room = lined(desk.weight_room, PANEL * K);
    std::memcpy(room, W, 2 * count * K);
    std::memset(room + count * K, 0, 2 * (PANEL - count) * K);
    return room;
}

// The panels of a task, turned: for each panel and each 32 features of all parts two tiles.
void turn(const Call& call, const Task& task, Desk& desk) {
    bf16* to = lined(desk.weight_room, panels(task) * PANEL * call.features);
    for (int64_t n = task.begin; n < task.end; n += PANEL)
        for (const Part& part : call.parts)
            for (int64_t k = 0; k < part.features; k += DEPTH, to += 2 * BF16S) {
                tile::turn(part.W + k * part.columns + n, part.columns, to);
                tile::turn(part.W + k * part.columns + n + SIDE, part.columns, to + BF16S);
            }
}

Weights weights(const Call& call, const Part& part, const Task& task, int64_t n, Desk& desk) {
    if (call.turned) {
        bf16* panel = lined(desk.weight_room, 0) + (n - task.begin) * call.features;
        return {panel + part.offset * PANEL, PANEL, BF16S, tile::ROW};
    }
    int64_t K = part.features, left = part.columns - n;
    return {left < PANEL ? padded(part.W + n * K, left, K, desk) : part.W + n * K, 1, SIDE * K, 2 * K};
}

template <int ROWS>
void panel(const Call& call, const Work& work, const Task& task, int64_t t, int64_t n, Desk& desk) {
    const Output& output = *task.output;
    const Piece* pieces = work.pieces.data();
    const int64_t* starts = work.starts.data() + task.number * work.tiles + t;
    int64_t row = call.features * SIDE;
    tile::zero<0>(), tile::zero<1>();
    if (ROWS == 2) tile::zero<2>(), tile::zero<3>();
    for (const Part* part = output.begin; part < output.end; part++)
        product<ROWS>(weights(call, *part, task, n, desk), work.x + t * row + part->offset * SIDE, row, part->features);
    expand<0>(pieces + starts[0], pieces + starts[1], task, n, desk);
    if (ROWS == 2) expand<2>(pieces + starts[1], pieces + starts[2], task, n, desk);
    float* sums = desk.sums;
    tile::store<0>(sums), tile::store<1>(sums + FLOATS);
    if (ROWS == 2) tile::store<2>(sums + 2 * FLOATS), tile::store<3>(sums + 3 * FLOATS);
    int64_t N = output.columns;
    for (int64_t i = 0; i < ROWS; i++) {
        int64_t m = (t + i) * SIDE;
        tile::finish(sums + 2 * i * FLOATS, output.bias ? output.bias + n : nullptr,
                     output.y + (work.first + m) * N + n, N, std::min<int64_t>(SIDE, work.rows - m), N - n);
    }
}

void compute(const Call& call, const Work& work, const Task& task, Desk& desk) {
    int64_t slots = std::max<int64_t>(1, std::min(PAGES, work.pages));
    desk.tags.assign(slots, -1);
    desk.slots = lined(desk.page_room, slots * panels(task) * 2 * BF16S);
    if (call.turned) turn(call, task, desk);
    for (int64_t t = task.first; t < task.last; t += 2)
        for (int64_t n = task.begin; n < task.end; n += PANEL)
            if (t + 1 < task.last) panel<2>(call, work, task, t, n, desk);
            else panel<1>(call, work, task, t, n, desk);
}

// ---- a call --------------------------------------------------------------------------------------------------

void pair_up(const Call& call, const Work& work, int64_t t) {
    bf16* to = work.x + t * SIDE * call.features;
    for (int64_t i = 0; i < call.inputs; i++) {
        const Part& part = call.parts[i];
        const bf16* from = part.x + (work.first + t * SIDE) * part.features;
        for (int64_t k = 0; k < part.features; k += DEPTH, to += BF16S)
            tile::pair(from + k, part.features, work.rows - t * SIDE, to);
    }
}

void run(const Call& call) {
    thread_local Work kept;
    Work& work = kept;  // the threads below would each see their own
    int64_t columns = 0;
    for (const Output& output : call.outputs) columns += output.columns;
    for (int64_t first = 0; first < call.M; first += SLAB) {
        work.plan(call, first);
#pragma omp parallel if (call.M * call.features * columns > SMALL)
        {
            thread_local Desk desk;
            [[maybe_unused]] tile::Registers registers;
#pragma omp for schedule(static)
            for (int64_t t = 0; t < work.tiles; t++) pair_up(call, work, t);
#pragma omp for schedule(dynamic)
            for (size_t i = 0; i < work.shrinks.size(); i++) shrink(call, work, work.shrinks[i], desk);
#pragma omp for schedule(dynamic)
            for (size_t i = 0; i < work.tasks.size(); i++) compute(call, work, work.tasks[i], desk);
        }
    }
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Whether this process may use the tile registers.
EXPORTED int64_t hubkit_fused_allowed() { return tile::allowed(); }

// bf16 x [M, K], weights [N, K], biases [N] or null, y [M, N], contiguous; K a multiple of 32. S: null, or for each
// linear where to put S^T [ranks, padded], if its route is of one group.
EXPORTED void hubkit_fused(const Member* members, const bf16* const* weights, const bf16* const* biases,
                           bf16* const* y, bf16* const* S, int64_t padded, int64_t count, const bf16* x, int64_t M,
                           int64_t K, int64_t threads) {
    thread_local Call call;
    call.parts.clear(), call.outputs.clear();
    for (int64_t i = 0; i < count; i++)
        call.parts.push_back({x, weights[i], (const bf16*)members[i].A, (const bf16*)members[i].Bt, K, members[i].N, 0,
                              &members[i].route, S ? S[i] : nullptr});
    for (int64_t i = 0; i < count; i++)
        call.outputs.push_back({y[i], biases[i], members[i].N, &call.parts[i], &call.parts[i] + 1});
    call.inputs = 1, call.features = K, call.M = M, call.padded = padded, call.threads = threads, call.turned = false;
    run(call);
}

// dx [M, K] (null: only Z) from dy [M, N] of each linear; K and every N a multiple of 32. Z: for each linear where to
// put Z^T [ranks, padded], Z = (dy Bt^T) * C, its route being of one group.
EXPORTED void hubkit_fused_gradient(const Member* members, const bf16* const* weights, const bf16* const* dy,
                                    bf16* const* Z, int64_t padded, int64_t count, bf16* dx, int64_t M, int64_t K,
                                    int64_t threads) {
    thread_local Call call;
    call.parts.clear(), call.outputs.clear();
    int64_t features = 0;
    for (int64_t i = 0; i < count; i++) {
        int64_t N = members[i].N;
        call.parts.push_back({dy[i], weights[i], (const bf16*)members[i].Bt, (const bf16*)members[i].A, N, K, features,
                              &members[i].route, Z[i]});
        features += N;
    }
    call.outputs.push_back({dx, nullptr, K, call.parts.data(), call.parts.data() + count});
    call.inputs = count, call.features = features, call.M = M, call.padded = padded, call.threads = threads;
    call.turned = true;
    run(call);
}
