// Causal attention over a tree of tokens, forward and backward: for training, where sequences that begin alike share
// the rows of their beginning. In fp32 from what is loaded to what is stored.
//
// The rows that a sequence has for itself follow each other: a segment. They see the rows that it shares, wherever
// those lie, and each other up to themselves. A task is a segment and a head of keys, with all query heads that read
// it; it keeps nothing for the backward pass, which computes the scores again. What a segment sends back to rows that
// it shares is kept apart and added up in the order of segments, so sums do not depend on threads.

#include <algorithm>
#include <cmath>
#include <vector>

#include "vector.h"

namespace {

constexpr int64_t BLOCK = 16;  // query rows at a time: what is computed above the diagonal is at most that wide
constexpr int64_t ROWS = 6;    // of a product at a time, by VECTORS columns: in registers
constexpr int64_t VECTORS = LANES == 16 ? 4 : 2;

struct Strides { int64_t head, row; };  // in elements; features are dense

// Segment i is rows [begin[i], end[i]), and sees shared[first[i]] to shared[first[i + 1] - 1] before them.
struct Tree {
    int64_t rows, segments;
    const int64_t *begin, *end, *first, *shared;
};

struct Shape { int64_t heads, groups, D; };

// ---- products ------------------------------------------------------------------------------------------------

struct Operand {  // element (m, k) of the left operand is at[m * row + k * column]
    const float* at;
    int64_t row, column;
};

template <int64_t M, int64_t N>
void block(Operand a, const float* b, int64_t stride, int64_t depth, float* c, int64_t c_stride, bool fresh) {
    Vec sums[M][N];
    for (int64_t m = 0; m < M; m++)
        for (int64_t n = 0; n < N; n++) sums[m][n] = fresh ? Vec{} : load(c + m * c_stride + n * LANES);
    for (int64_t k = 0; k < depth; k++, b += stride) {
        Vec row[N];
        for (int64_t n = 0; n < N; n++) hold(row[n] = load(b + n * LANES));
        for (int64_t m = 0; m < M; m++)
            for (int64_t n = 0; n < N; n++) sums[m][n] += a.at[m * a.row + k * a.column] * row[n];
    }
    for (int64_t m = 0; m < M; m++)
        for (int64_t n = 0; n < N; n++) store(c + m * c_stride + n * LANES, sums[m][n]);
}

template <int64_t M>
void strip(Operand a, const float* b, int64_t stride, int64_t depth, float* c, int64_t c_stride, int64_t columns,
           bool fresh) {
    int64_t n = 0;
    for (; n + VECTORS * LANES <= columns; n += VECTORS * LANES)
        block<M, VECTORS>(a, b + n, stride, depth, c + n, c_stride, fresh);
    switch ((columns - n) / LANES) {
        case 3: return block<M, 3>(a, b + n, stride, depth, c + n, c_stride, fresh);
        case 2: return block<M, 2>(a, b + n, stride, depth, c + n, c_stride, fresh);
        case 1: return block<M, 1>(a, b + n, stride, depth, c + n, c_stride, fresh);
    }
}

// c [rows, columns] += a b, or, if it is fresh, = that; columns a multiple of LANES
void multiply(Operand a, int64_t rows, const float* b, int64_t stride, int64_t depth, float* c, int64_t c_stride,
              int64_t columns, bool fresh = false) {
    int64_t m = 0;
    for (; m + ROWS <= rows; m += ROWS)
        strip<ROWS>({a.at + m * a.row, a.row, a.column}, b, stride, depth, c + m * c_stride, c_stride, columns, fresh);
    Operand rest{a.at + m * a.row, a.row, a.column};
    c += m * c_stride;
    switch (rows - m) {
        case 5: return strip<5>(rest, b, stride, depth, c, c_stride, columns, fresh);
        case 4: return strip<4>(rest, b, stride, depth, c, c_stride, columns, fresh);
        case 3: return strip<3>(rest, b, stride, depth, c, c_stride, columns, fresh);
        case 2: return strip<2>(rest, b, stride, depth, c, c_stride, columns, fresh);
        case 1: return strip<1>(rest, b, stride, depth, c, c_stride, columns, fresh);
    }
}

// ---- a task --------------------------------------------------------------------------------------------------

// What a segment and a head of keys need in fp32: rows are padded to whole vectors, with zeros.
struct Task {
    int64_t begin, own, seen, keys, wide, D, width;  // own rows; rows before them that are seen; keys = both
    const int64_t* rows;                             // those that are seen
    float *q, *o, *scores, *others;                  // [BLOCK, width] twice, [BLOCK, wide] twice
    float *k, *kt, *v, *vt, *dk, *dv;                // [keys, width], [width, wide]

    Task(const Tree& tree, int64_t segment, int64_t D) : D(D) {
        begin = tree.begin[segment], own = tree.end[segment] - begin;
        rows = tree.shared + tree.first[segment], seen = tree.first[segment + 1] - tree.first[segment];
        keys = seen + own, wide = padded(keys), width = padded(D);
        thread_local std::vector<float> room;
        int64_t needed = 2 * BLOCK * (width + wide) + 4 * keys * width + 2 * width * wide;
        if (int64_t(room.size()) < needed) room.resize(needed);
        float* at = room.data();
        auto take = [&](int64_t size) { return at += size, at - size; };
        q = take(BLOCK * width), o = take(BLOCK * width);
        scores = take(BLOCK * wide), others = take(BLOCK * wide);
        k = take(keys * width), v = take(keys * width), dk = take(keys * width), dv = take(keys * width);
        kt = take(width * wide), vt = take(width * wide);
    }

    int64_t row(int64_t key) const { return key < seen ? rows[key] : begin + key - seen; }

    template <class T> void widen_keys(const T* from, int64_t stride, float* to) const {
        for (int64_t j = 0; j < keys; j++) widen_row(from + row(j) * stride, to + j * width, 1.0f);
    }

    template <class T> void widen_row(const T* from, float* to, float factor) const {
        for (int64_t d = 0; d < D; d += LANES)
            store(to + d, some(from + d, std::min<int64_t>(LANES, D - d)) * factor);
    }

    void turn(const float* from, float* to) const {  // [keys, width] to [width, wide]
        for (int64_t j = 0; j < wide; j += LANES)
            for (int64_t d = 0; d < width; d += LANES) {
                Vec v[LANES];
                for (int64_t i = 0; i < LANES; i++) v[i] = j + i < keys ? load(from + (j + i) * width + d) : Vec{};
                transpose(v);
                for (int64_t i = 0; i < LANES; i++) store(to + (d + i) * wide + j, v[i]);
            }
    }

    // Scores of own rows [first, first + count), as probabilities of the keys that each sees, zero for others.
    // Returns how many columns there are.
    int64_t weigh(int64_t first, int64_t count) const {
        int64_t columns = padded(seen + first + count);
        multiply({q, width, 1}, count, kt, wide, D, scores, wide, columns, true);
        for (int64_t i = 0; i < count; i++) {
            float* at = scores + i * wide;
            for (int64_t j = seen + first + i + 1; j < columns; j++) at[j] = -INFINITY;
            float whole = 1.0f / softmax(at, columns);
            for (int64_t j = 0; j < columns; j += LANES) store(at + j, load(at + j) * whole);
        }
        return columns;
    }
};

// y [rows, heads, D] of a segment's rows and the query heads of a group
template <class T>
void attend(const Tree& tree, const Shape& s, int64_t segment, int64_t group, const T* q, Strides qs, const T* k,
            Strides ks, const T* v, Strides vs, float scale, T* y) {
    Task task(tree, segment, s.D);
    task.widen_keys(k + group * ks.head, ks.row, task.k);
    task.widen_keys(v + group * vs.head, vs.row, task.v);
    task.turn(task.k, task.kt);
    int64_t members = s.heads / s.groups;
    for (int64_t head = group * members; head < (group + 1) * members; head++)
        for (int64_t first = 0; first < task.own; first += BLOCK) {
            int64_t count = std::min(BLOCK, task.own - first), row = task.begin + first;
            for (int64_t i = 0; i < count; i++)
                task.widen_row(q + head * qs.head + (row + i) * qs.row, task.q + i * task.width, scale);
            task.weigh(first, count);
            multiply({task.scores, task.wide, 1}, count, task.v, task.width, task.seen + first + count, task.o,
                     task.width, task.width, true);
            for (int64_t i = 0; i < count; i++)
                for (int64_t d = 0; d < s.D; d += LANES)
                    keep(y + ((row + i) * s.heads + head) * s.D + d, load(task.o + i * task.width + d),
                         std::min<int64_t>(LANES, s.D - d));
        }
}

// dq of a segment's rows and the query heads of a group; task.dk and task.dv of all keys that they see
template <class T>
void attend_gradient(const Task& task, const Shape& s, int64_t group, const T* q, Strides qs, const T* k, Strides ks,
                     const T* v, Strides vs, const T* dy, Strides ds, float scale, T* dq) {
    int64_t members = s.heads / s.groups, width = task.width, wide = task.wide;
    task.widen_keys(k + group * ks.head, ks.row, task.k);
    task.widen_keys(v + group * vs.head, vs.row, task.v);
    task.turn(task.k, task.kt), task.turn(task.v, task.vt);
    std::fill(task.dk, task.dk + task.keys * width, 0.0f), std::fill(task.dv, task.dv + task.keys * width, 0.0f);
    for (int64_t head = group * members; head < (group + 1) * members; head++)
        for (int64_t first = 0; first < task.own; first += BLOCK) {
            int64_t count = std::min(BLOCK, task.own - first), row = task.begin + first;
            int64_t visible = task.seen + first + count;
            for (int64_t i = 0; i < count; i++) {
                task.widen_row(q + head * qs.head + (row + i) * qs.row, task.q + i * width, scale);
                task.widen_row(dy + head * ds.head + (row + i) * ds.row, task.o + i * width, 1.0f);
            }
            int64_t columns = task.weigh(first, count);
            multiply({task.scores, 1, wide}, visible, task.o, width, count, task.dv, width, width);
            multiply({task.o, width, 1}, count, task.vt, wide, s.D, task.others, wide, columns, true);
            for (int64_t i = 0; i < count; i++) {  // of softmax: P (dP - sum of P dP)
                float *p = task.scores + i * wide, *dp = task.others + i * wide;
                Vec total = {};
                for (int64_t j = 0; j < columns; j += LANES) total += load(p + j) * load(dp + j);
                float mean = sum(total);
                for (int64_t j = 0; j < columns; j += LANES) store(dp + j, load(p + j) * (load(dp + j) - mean));
            }
            multiply({task.others, 1, wide}, visible, task.q, width, count, task.dk, width, width);
            multiply({task.others, wide, 1}, count, task.k, width, visible, task.o, width, width, true);
            for (int64_t i = 0; i < count; i++)
                for (int64_t d = 0; d < s.D; d += LANES)
                    keep(dq + ((row + i) * s.heads + head) * s.D + d, load(task.o + i * width + d) * scale,
                         std::min<int64_t>(LANES, s.D - d));
        }
}

// ---- a call --------------------------------------------------------------------------------------------------

template <class T>
void forward(const Tree& tree, const Shape& s, const T* q, Strides qs, const T* k, Strides ks, const T* v, Strides vs,
             float scale, T* y) {
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int64_t i = 0; i < tree.segments; i++)
        for (int64_t g = 0; g < s.groups; g++) attend(tree, s, i, g, q, qs, k, ks, v, vs, scale, y);
}

// What tasks send back to keys: own[row, group, width] of the segment that has the row, sent[entry of shared, group,
// width] of the others.
struct Sent {
    std::vector<float> own, sent;  // kept between calls: memory from the system costs more than what is done in it
    void fit(const Tree& tree, int64_t size) {
        auto grow = [](std::vector<float>& room, int64_t n) {
            if (int64_t(room.size()) < n) room.resize(n);
        };
        grow(own, tree.rows * size), grow(sent, tree.first[tree.segments] * size);
    }
};

void hand_in(const Tree& tree, const Task& task, int64_t segment, int64_t group, int64_t groups, const float* from,
             Sent& to) {
    int64_t size = groups * task.width, at = group * task.width;
    for (int64_t j = 0; j < task.keys; j++) {
        float* target = j < task.seen ? to.sent.data() + (tree.first[segment] + j) * size
                                      : to.own.data() + (task.begin + j - task.seen) * size;
        std::copy(from + j * task.width, from + (j + 1) * task.width, target + at);
    }
}

template <class T> void add_up(const Tree& tree, const Shape& s, int64_t group, Sent& all, T* to) {
    int64_t width = padded(s.D), size = s.groups * width, at = group * width;
    for (int64_t e = 0; e < tree.first[tree.segments]; e++)
        for (int64_t d = at; d < at + width; d += LANES) {
            float* total = all.own.data() + tree.shared[e] * size + d;
            store(total, load(total) + load(all.sent.data() + e * size + d));
        }
    for (int64_t row = 0; row < tree.rows; row++)
        for (int64_t d = 0; d < s.D; d += LANES)
            keep(to + (row * s.groups + group) * s.D + d, load(all.own.data() + row * size + at + d),
                 std::min<int64_t>(LANES, s.D - d));
}

template <class T>
void backward(const Tree& tree, const Shape& s, const T* q, Strides qs, const T* k, Strides ks, const T* v, Strides vs,
              const T* dy, Strides ds, float scale, T* dq, T* dk, T* dv) {
    thread_local Sent kept[2];
    Sent &keys = kept[0], &values = kept[1];  // the threads below would each see their own
    keys.fit(tree, s.groups * padded(s.D)), values.fit(tree, s.groups * padded(s.D));
#pragma omp parallel
    {
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t i = 0; i < tree.segments; i++)
            for (int64_t g = 0; g < s.groups; g++) {
                Task task(tree, i, s.D);
                attend_gradient(task, s, g, q, qs, k, ks, v, vs, dy, ds, scale, dq);
                hand_in(tree, task, i, g, s.groups, task.dk, keys);
                hand_in(tree, task, i, g, s.groups, task.dv, values);
            }
#pragma omp for schedule(dynamic)
        for (int64_t g = 0; g < 2 * s.groups; g++)
            g % 2 ? add_up(tree, s, g / 2, values, dv) : add_up(tree, s, g / 2, keys, dk);
    }
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

// q [rows, heads, D], k and v [rows, groups, D] by their strides; y [rows, heads, D]; dtype: 0 fp32, 1 bf16, 2 fp16.
EXPORTED void hubkit_tree(const Tree* tree, const void* q, const void* k, const void* v, void* y, int64_t heads,
                          int64_t groups, int64_t D, const Strides* strides, float scale, int64_t dtype) {
    auto run = [=](auto* type) {
        using P = decltype(type);
        forward(*tree, {heads, groups, D}, (P)q, strides[0], (P)k, strides[1], (P)v, strides[2], scale, (P)y);
    };
    typed(dtype, run);
}

// Their gradients from dy [rows, heads, D]: dq [rows, heads, D], dk and dv [rows, groups, D].
EXPORTED void hubkit_tree_gradient(const Tree* tree, const void* q, const void* k, const void* v, const void* dy,
                                   void* dq, void* dk, void* dv, int64_t heads, int64_t groups, int64_t D,
                                   const Strides* strides, float scale, int64_t dtype) {
    auto run = [=](auto* type) {
        using P = decltype(type);
        backward(*tree, {heads, groups, D}, (P)q, strides[0], (P)k, strides[1], (P)v, strides[2], (P)dy, strides[3],
                 scale, (P)dq, (P)dk, (P)dv);
    };
    typed(dtype, run);
}
