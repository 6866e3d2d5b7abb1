// The first word of Philox-4x32-10 (Salmon et al., SC 2011) under a key, at the counters (column, row, 0, 0):
// what hubkit/ops/dropout.py says in torch, a hundred times as fast.

#include <cstdint>

extern "C" __attribute__((visibility("default"))) void hubkit_philox(
    int64_t* out, int64_t rows, int64_t columns, uint64_t seed) {
#pragma omp parallel for if (rows * columns > 1 << 14)
    for (int64_t row = 0; row < rows; row++)
#pragma omp simd
        for (int64_t column = 0; column < columns; column++) {
            uint32_t c0 = uint32_t(column), c1 = uint32_t(row), c2 = 0, c3 = 0;
            uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
            for (int round = 0; round < 10; round++) {
                uint64_t a = uint64_t(c0) * 0xD2511F53u, b = uint64_t(c2) * 0xCD9E8D57u;
                c0 = uint32_t(b >> 32) ^ c1 ^ k0;
                c1 = uint32_t(b);
                c2 = uint32_t(a >> 32) ^ c3 ^ k1;
                c3 = uint32_t(a);
                k0 += 0x9E3779B9u;
                k1 += 0xBB67AE85u;
            }
            out[row * columns + column] = c0;
        }
}
