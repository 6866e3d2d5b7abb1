// Sums over batch rows in bf16 on AMX or AVX-512: S^T x, [ranks, columns], which is what the gradients of an adapter's
// factors are: dA from x, dBt from dy. All of a backward pass in one call; rows of x are paired up once for all
// factors that read it.
//
// Every element is one chain of additions in the order of the rows, whatever the number of threads.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "arrange.h"
#if HUBKIT_BY_TILES
#include "tile.h"
#else
#include "block.h"
#endif

namespace {

using tile::bf16, tile::BF16S, tile::DEPTH, tile::FLOATS, tile::SIDE;

// Blocks of 32 rows, outside of which all of S^T [16, .] is zero.
struct Span {
    int64_t first, last;
};

struct Matrix {  // [M, N]
    const bf16* x;
    int64_t N;
};

struct Factor {
    const bf16* S;  // [ranks up to a multiple of 16, padded], zero beyond ranks and M
    bf16* out;      // [ranks, N]
    int64_t ranks;
    const Span* spans;  // for every 16 of the ranks, or null: all rows
};

// Columns n and on of a matrix, paired up along rows, strip by strip of 16: [strips, padded / 2, 16, 2].
struct Zipped {
    const bf16* at;
    int64_t padded, n, width, N;
};

#if HUBKIT_BY_TILES

constexpr int64_t WIDTH = DEPTH;  // columns of a task

// 16 ranks of a factor, from j on.
void sum(const Factor& factor, int64_t j, const Span& span, const Zipped& x) {
    alignas(64) float sums[2 * FLOATS];
    const bf16 *S = factor.S + j * x.padded, *second = x.at + x.padded * SIDE;
    tile::zero<0>(), tile::zero<1>();
    for (int64_t block = span.first; block < span.last; block++) {
        tile::load<4>(S + block * DEPTH, 2 * x.padded);
        tile::load<6>(x.at + block * BF16S, tile::ROW);
        tile::dot<0, 4, 6>();
        tile::load<7>(second + block * BF16S, tile::ROW);
        tile::dot<1, 4, 7>();
    }
    tile::store<0>(sums), tile::store<1>(sums + FLOATS);
    for (int64_t i = 0; i < std::min<int64_t>(SIDE, factor.ranks - j); i++)
        for (int64_t n = 0; n < x.width; n += SIDE) {
            bf16 row[SIDE];
            tile::narrow(sums + n / SIDE * FLOATS + i * SIDE, 1.0f, 0xffff, row);
            std::memcpy(factor.out + (j + i) * x.N + x.n + n, row, 2 * std::min<int64_t>(SIDE, x.width - n));
        }
}

#else

constexpr int TOGETHER = 8, STRIPS = 3;       // ranks, and strips of 16 columns, whose sums are in registers
constexpr int64_t WIDTH = 2 * STRIPS * SIDE;  // columns of a task

template <int STRIPS> void sum_strips(const Factor& factor, int64_t j, const Span& span, const Zipped& x, int64_t s) {
    block::Sums<TOGETHER, STRIPS> sums;
    const bf16* S[TOGETHER];
    EACH(i, TOGETHER) S[i] = factor.S + (j + i) * x.padded + span.first * DEPTH;
    sums.clear();
    sums.multiply(S, x.at + s * x.padded * SIDE + span.first * BF16S, x.padded * SIDE,
                  (span.last - span.first) * DEPTH, 0);
    for (int i = 0; i < TOGETHER && j + i < factor.ranks; i++)
        for (int n = 0; n < STRIPS; n++) {
            int64_t at = (s + n) * SIDE;
            block::narrow(sums.held[i][n], factor.out + (j + i) * x.N + x.n + at, x.width - at);
        }
}

// 16 ranks of a factor, from j on.
void sum(const Factor& factor, int64_t j, const Span& span, const Zipped& x) {
    int64_t strips = (x.width + SIDE - 1) / SIDE;
    for (int64_t end = std::min(j + SIDE, factor.ranks); j < end; j += TOGETHER)
        for (int64_t s = 0; s < strips; s += STRIPS)
            if (strips - s >= 3) sum_strips<3>(factor, j, span, x, s);
            else if (strips - s == 2) sum_strips<2>(factor, j, span, x, s);
            else sum_strips<1>(factor, j, span, x, s);
}

#endif

void zip(const Matrix& matrix, int64_t M, const Zipped& x, bf16* to) {
    for (int64_t n = 0; n < x.width; n += DEPTH)
        for (int64_t m = 0; m < x.padded; m += DEPTH)
            tile::zip(matrix.x + m * x.N + x.n + n, x.N, M - m, std::min<int64_t>(DEPTH, x.width - n),
                      to + n * x.padded + m * SIDE, x.padded * SIDE);
}

}  // namespace

// `count` linears of one input: factors i and count + i are dA and dBt of linear i; without S: not wanted. Matrix 0 is
// what all dA are of, 1 + i what dBt of linear i is. padded is a multiple of 32.
extern "C" __attribute__((visibility("default"))) void hubkit_outer(
    const bf16* const* S, bf16* const* out, const int64_t* ranks, const Span* const* spans, int64_t count,
    const bf16* const* x, const int64_t* N, int64_t M, int64_t padded) {
    struct Task {
        int64_t matrix, n;
    };
    thread_local std::vector<Task> kept;
    std::vector<Task>& tasks = kept;  // the threads below would each see their own
    tasks.clear();
    for (int64_t i = 0; i <= count; i++)
        for (int64_t n = 0; x[i] && n < N[i]; n += WIDTH) tasks.push_back({i, n});
#pragma omp parallel
    {
        thread_local std::vector<bf16> room;
#if HUBKIT_BY_TILES
        [[maybe_unused]] tile::Registers registers;
#endif
        room.resize((padded + 1) * WIDTH);
        bf16* zipped = (bf16*)((uintptr_t(room.data()) + 63) / 64 * 64);
#pragma omp for schedule(dynamic)
        for (size_t i = 0; i < tasks.size(); i++) {
            auto [matrix, n] = tasks[i];
            Zipped strips = {zipped, padded, n, std::min(WIDTH, N[matrix] - n), N[matrix]};
            zip({x[matrix], N[matrix]}, M, strips, zipped);
            for (int64_t f = matrix ? count + matrix - 1 : 0; f < (matrix ? count + matrix : count); f++)
                for (int64_t j = 0; S[f] && j < ranks[f % count]; j += SIDE)
                    sum({S[f], out[f], ranks[f % count], spans[f % count]}, j,
                        spans[f % count] ? spans[f % count][j / SIDE] : Span{0, padded / DEPTH}, strips);
        }
    }
}
