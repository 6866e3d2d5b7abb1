// The multi-LoRA delta on a CPU: y += ((x A^T) * C[group]) Bt for linears that read the same x.
//
// Rows of one group are cut into blocks, and a block reads the arena rows of its own group alone. Two phases
// with a barrier between: shrink (S = x A^T * C, in fp32) over blocks x chunks of arena rows, expand (y += S Bt)
// over blocks x panels of columns. Every element of S and y is one chain of additions whose order depends on
// K and on the group's arena rows only: the result is the same for any number of threads, and a row's does not
// depend on the other rows. Products are fp32 whatever the tensors hold; y is rounded once.
//
// A plain C interface, so that it compiles in seconds without torch's headers; native/__init__.py mirrors the
// structs. OpenMP's symbols stay undefined in the library: they are those of the runtime that torch has loaded,
// since a second one in the process would bring a second set of threads.

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "route.h"
#include "vector.h"

namespace {

// Accumulators live in registers only if all loops over a tile are unrolled.
#define UNROLL _Pragma("GCC unroll 8")

// Register tiles: ROWS * COLS accumulators and the operands fit the 16 registers of AVX2, the 32 of AVX-512.
constexpr int ROWS = LANES == 16 ? 6 : 3;
constexpr int COLS = 4;
constexpr int64_t STRIP = COLS * LANES;  // columns of y that one tile of expand covers
constexpr int64_t BLOCK = 48;            // rows: what one conversion of a chunk or panel is shared by
constexpr int64_t CHUNK = 16;            // arena rows of a shrink task
constexpr int64_t DEPTH = 1024;          // of K: a chunk of A to that depth stays in the L2 cache
constexpr int64_t PANEL = 8192;          // floats of Bt in an expand task, which stay in the L1 cache
constexpr int64_t SMALL = 1 << 16;       // multiplications that are not worth waking other threads for

// ---- the two tiles -------------------------------------------------------------------------------------------

// out[r][c] = x[r] . a[c] over k elements.
template <int R>
void dots(const float* const* x, const float* const* a, int64_t k, float out[R][COLS]) {
    Vec acc[R][COLS] = {};
    auto step = [&](auto get) {
        Vec wide[COLS];
        UNROLL for (int c = 0; c < COLS; c++) hold(wide[c] = get(a[c]));
        UNROLL for (int r = 0; r < R; r++) {
            Vec row = get(x[r]);
            UNROLL for (int c = 0; c < COLS; c++) acc[r][c] += row * wide[c];
        }
    };
    int64_t i = 0;
    for (; i + LANES <= k; i += LANES) step([i](const float* p) { return load(p + i); });
    if (i < k) step([i, k](const float* p) { return load(p + i, k - i); });
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int c = 0; c < COLS; c++) out[r][c] = sum(acc[r][c]);
}

// y[r][0:width] += s[r] . panel over j arena rows; panel [j, STRIP].
template <int R, class T>
void axpys(const float* const* s, const float* panel, int64_t j, T* const* y, int64_t width) {
    Vec acc[R][COLS] = {};
    for (int64_t i = 0; i < j; i++) {
        Vec b[COLS];
        UNROLL for (int c = 0; c < COLS; c++) b[c] = load(panel + i * STRIP + c * LANES);
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int c = 0; c < COLS; c++) acc[r][c] += s[r][i] * b[c];
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int c = 0; c < COLS; c++) {
            T* p = y[r] + c * LANES;
            int64_t left = width - c * LANES;
            if (left >= LANES) store(p, load(p) + acc[r][c]);
            else if (left > 0) store(p, load(p, left) + acc[r][c], left);
        }
}

// f(integral constant) for a number of rows from 1 to ROWS.
template <int R = ROWS, class F> void with_rows(int64_t rows, F f) {
    if constexpr (R > 1) {
        if (rows < R) return with_rows<R - 1>(rows, f);
    }
    f(std::integral_constant<int, R>());
}

// ---- blocks and tasks ----------------------------------------------------------------------------------------

struct Block {  // up to BLOCK rows of one group in one linear
    const Member* member;
    void* y;              // [M, N] of the member
    const int64_t* rows;  // null: counted from `first`
    int64_t first, count, J;
    const int64_t* cols;
    const float* coef;
    float* S;  // [count, J]
    int64_t row(int64_t i) const { return rows ? rows[i] : first + i; }
};

struct Task {
    const Block* block;
    int64_t begin, end;
};

float* scratch(int64_t floats) {
    constexpr uintptr_t line = 64;  // a vector register's load should not touch two cache lines
    thread_local std::vector<float> buffer;
    if (buffer.size() < floats + line) buffer.resize(floats + line);
    return (float*)(uintptr_t(buffer.data() + line / sizeof(float)) / line * line);
}

template <class T> void shrink(const Task& task, const T* x, int64_t K) {
    const Block& b = *task.block;
    constexpr bool copies = !std::is_same_v<T, float>;
    float* room = copies ? scratch((BLOCK + CHUNK) * DEPTH) : nullptr;
    const float *rows[BLOCK + ROWS], *cols[CHUNK + COLS];
    for (int64_t k = 0; k < K; k += DEPTH) {
        int64_t depth = std::min(DEPTH, K - k);
        auto wide = [&](const T* p, int64_t slot) -> const float* {
            if constexpr (!copies) return p;
            else {
                widen(p, room + slot * DEPTH, depth);
                return room + slot * DEPTH;
            }
        };
        for (int64_t i = 0; i < b.count; i++) rows[i] = wide(x + b.row(i) * K + k, i);
        for (int64_t j = task.begin; j < task.end; j++)
            cols[j - task.begin] = wide((const T*)b.member->A + b.cols[j] * K + k, BLOCK + j - task.begin);
        int64_t n = task.end - task.begin;
        for (int64_t j = n; j % COLS; j++) cols[j] = cols[n - 1];  // fills the tile; the results are dropped
        for (int64_t i = 0; i < b.count; i += ROWS)
            with_rows(std::min<int64_t>(ROWS, b.count - i), [&](auto R) {
                for (int64_t j = 0; j < n; j += COLS) {
                    float out[R][COLS];
                    dots<R>(rows + i, cols + j, depth, out);
                    for (int r = 0; r < R; r++)
                        for (int c = 0; c < COLS && j + c < n; c++) {
                            int64_t at = task.begin + j + c;
                            float& s = b.S[(i + r) * b.J + at];
                            s = (k ? s : 0) + out[r][c];
                            if (k + depth == K) s *= b.coef[at];
                        }
                }
            });
    }
}

template <class T> void expand(const Task& task) {
    const Block& b = *task.block;
    int64_t N = b.member->N;
    float* panel = scratch((task.end - task.begin + STRIP) * b.J);  // [strip, J, STRIP]
    for (int64_t j = 0; j < b.J; j++) {
        const T* row = (const T*)b.member->Bt + b.cols[j] * N;
        for (int64_t n = task.begin; n < task.end; n += STRIP)
            widen(row + n, panel + (n - task.begin) * b.J + j * STRIP, std::min(STRIP, task.end - n));
    }
    for (int64_t i = 0; i < b.count; i += ROWS)
        with_rows(std::min<int64_t>(ROWS, b.count - i), [&](auto R) {
            const float* s[R];
            for (int r = 0; r < R; r++) s[r] = b.S + (i + r) * b.J;
            for (int64_t n = task.begin; n < task.end; n += STRIP) {
                T* y[R];
                for (int r = 0; r < R; r++) y[r] = (T*)b.y + b.row(i + r) * N + n;
                axpys<R>(s, panel + (n - task.begin) * b.J, b.J, y, std::min(STRIP, task.end - n));
            }
        });
}

// Tasks of a call; kept between calls of a thread, so that a decode step allocates nothing.
struct Work {
    std::vector<Block> blocks;
    std::vector<Task> shrinks, expands;
    std::vector<float> S;
    int64_t products = 0;

    void plan(const Member* members, void* const* y, int64_t count, int64_t M, int64_t K) {
        blocks.clear(), shrinks.clear(), expands.clear();
        products = 0;
        int64_t floats = 0;
        for (const Member* m = members; m < members + count; m++) {
            const Route& route = m->route;
            for (int64_t g = 0; g < route.groups; g++) {
                int64_t first = route.rows ? route.row_start[g] : 0, last = route.rows ? route.row_start[g + 1] : M;
                int64_t col = route.col_start[g], J = route.col_start[g + 1] - col;
                if (!J) continue;
                products += (last - first) * J * (K + m->N);
                for (; first < last; first += BLOCK) {
                    int64_t rows = std::min(BLOCK, last - first);
                    blocks.push_back({m, y[m - members], route.rows ? route.rows + first : nullptr, first, rows, J,
                                      route.cols + col, route.coef + col, nullptr});
                    floats += rows * J;
                }
            }
        }
        if (int64_t(S.size()) < floats) S.resize(floats);
        float* at = S.data();
        for (Block& b : blocks) {
            b.S = at;
            at += b.count * b.J;
            for (int64_t j = 0; j < b.J; j += CHUNK) shrinks.push_back({&b, j, std::min(b.J, j + CHUNK)});
            int64_t width = std::max<int64_t>(1, PANEL / b.J / STRIP) * STRIP;
            for (int64_t n = 0; n < b.member->N; n += width)
                expands.push_back({&b, n, std::min(b.member->N, n + width)});
        }
    }
};

template <class T> void run(const Member* members, void* const* y, int64_t count, const T* x, int64_t M, int64_t K) {
    thread_local Work kept;
    Work& work = kept;  // the threads below would each see their own
    work.plan(members, y, count, M, K);
#pragma omp parallel if (work.products > SMALL)
    {
#pragma omp for schedule(dynamic)
        for (size_t i = 0; i < work.shrinks.size(); i++) shrink(work.shrinks[i], x, K);
#pragma omp for schedule(dynamic)
        for (size_t i = 0; i < work.expands.size(); i++) expand<T>(work.expands[i]);
    }
}

}  // namespace

// x [M, K] and each y [M, N], contiguous; dtype of x, y and all factors: 0 fp32, 1 bf16, 2 fp16.
extern "C" __attribute__((visibility("default"))) void hubkit_delta(
    const Member* members, void* const* y, int64_t count, const void* x, int64_t M, int64_t K, int64_t dtype) {
    typed(dtype, [=](auto* t) { run(members, y, count, (decltype(t))x, M, K); });
}
