// Sums over batch rows in bf16 on AMX or AVX-512: out = S^T x, [ranks, columns], which is what the gradients of an adapter's
// factors are. For several S over the same x, rows of which are paired up once.
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

// S^T [16, padded] times the paired rows of 32 columns: sums [2, 16, 16].
void multiply(const bf16* S, int64_t padded, const Span& span, const bf16* zipped, float* sums) {
#if HUBKIT_BY_TILES
    tile::zero<0>(), tile::zero<1>();
    for (int64_t block = span.first; block < span.last; block++) {
        tile::load<4>(S + block * DEPTH, 2 * padded);
        tile::load<6>(zipped + block * 2 * BF16S, tile::ROW);
        tile::dot<0, 4, 6>();
        tile::load<7>(zipped + block * 2 * BF16S + BF16S, tile::ROW);
        tile::dot<1, 4, 7>();
    }
    tile::store<0>(sums), tile::store<1>(sums + FLOATS);
#else
    const bf16 *rows = S + span.first * DEPTH, *pairs = zipped + span.first * 2 * BF16S;
    for (int j = 0; j < SIDE; j += block::ROWS)
        block::multiply<2>({rows + j * padded, padded, DEPTH, 0}, {pairs, 2 * BF16S, BF16S},
                           (span.last - span.first) * DEPTH, sums + j * SIDE, 1, true);
#endif
}

// The same to `count` of 16 rows of `out`, `width` columns of them.
void columns(const bf16* S, int64_t padded, const Span& span, const bf16* zipped, bf16* out, int64_t stride,
             int64_t count, int64_t width) {
    alignas(64) float sums[2 * FLOATS];
    multiply(S, padded, span, zipped, sums);
    for (int64_t j = 0; j < count; j++)
        for (int64_t n = 0; n < width; n += SIDE) {
            bf16 row[SIDE];
            tile::narrow(sums + n / SIDE * FLOATS + j * SIDE, 1.0f, 0xffff, row);
            std::memcpy(out + j * stride + n, row, 2 * std::min<int64_t>(SIDE, width - n));
        }
}

}  // namespace

// bf16 x [M, N]; for each of `count` factors S^T [ranks up to a multiple of 16, padded], zero beyond ranks and M, and
// out [ranks, N]; padded is a multiple of 32. spans: of each factor a span for every 16 of its ranks, or null: all rows.
extern "C" __attribute__((visibility("default"))) void hubkit_outer(
    const bf16* const* S, bf16* const* out, const int64_t* ranks, const Span* const* spans, int64_t count,
    const bf16* x, int64_t M, int64_t N, int64_t padded) {
#pragma omp parallel
    {
        thread_local std::vector<bf16> room;
#if HUBKIT_BY_TILES
        [[maybe_unused]] tile::Registers registers;
#endif
        room.resize(padded * DEPTH + DEPTH);
        bf16* zipped = (bf16*)((uintptr_t(room.data()) + 63) / 64 * 64);
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < N; n += DEPTH) {
            int64_t width = std::min<int64_t>(DEPTH, N - n);
            for (int64_t m = 0; m < padded; m += DEPTH)
                tile::zip(x + m * N + n, N, M - m, width, zipped + m / DEPTH * 2 * BF16S);
            for (int64_t i = 0; i < count; i++)
                for (int64_t j = 0; j < ranks[i]; j += SIDE)
                    columns(S[i] + j * padded, padded, spans[i] ? spans[i][j / SIDE] : Span{0, padded / DEPTH}, zipped,
                            out[i] + j * N + n, N, std::min<int64_t>(SIDE, ranks[i] - j), width);
        }
    }
}
