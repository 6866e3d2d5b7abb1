// Dropout as hubkit/ops/dropout.py says it in torch: Philox-4x32-10 (Salmon et al., SC 2011), whose block k / 4 of row m
// says by its four words which of four columns are kept.

#include "vector.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t COLUMNS = 32;  // of a word of the mask: column k is bit k % 32 of word k / 32 of its row

constexpr int BLOCKS = LANES / 2;

using Wide = uint64_t __attribute__((vector_size(LANES * 4)));  // of each number only the lower word counts

// The whole products of words.
Wide times(Wide a, uint32_t b) {
#if defined(__AVX512F__) && LANES == 16
    return (Wide)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__) && LANES == 8
    return (Wide)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#else
    return (a & 0xffffffff) * b;
#endif
}

// Bit 4 i of the result: whether word i is below the limit.
uint32_t below(Wide words, uint64_t limit) {
    words &= 0xffffffff;
#if defined(__AVX512F__) && defined(__BMI2__) && LANES == 16
    return _pdep_u32(_mm512_cmplt_epu64_mask((__m512i)words, _mm512_set1_epi64(limit)), 0x11111111);
#else
    uint32_t bits = 0;
    for (int i = 0; i < BLOCKS; i++) bits |= uint32_t(words[i] < limit) << 4 * i;
    return bits;
#endif
}

// Which columns of a vector of blocks are kept; limit: twice the threshold that 31 bits are compared with.
uint32_t mask(uint64_t seed, uint64_t limit, uint32_t block, uint32_t row) {
    Wide c[4] = {Wide{} + block, Wide{} + row, {}, {}};
    for (int i = 0; i < BLOCKS; i++) c[0][i] += i;
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
        Wide a = times(c[0], 0xD2511F53u), b = times(c[2], 0xCD9E8D57u);
        c[0] = (b >> 32) ^ c[1] ^ k0, c[1] = b;
        c[2] = (a >> 32) ^ c[3] ^ k1, c[3] = a;
    }
    uint32_t bits = 0;
    for (int i = 0; i < 4; i++) bits |= below(c[i], limit) << i;
    return bits;
}

// The same of 32 columns.
uint32_t word(uint64_t seed, uint64_t limit, uint32_t block, uint32_t row) {
    uint32_t bits = 0;
    for (int b = 0; b < COLUMNS / 4; b += BLOCKS) bits |= mask(seed, limit, block + b, row) << 4 * b;
    return bits;
}

template <class T> void drop(const uint32_t* bits, const T* x, T* out, int64_t columns, float scale) {
    Bits places;
    for (int i = 0; i < LANES; i++) places[i] = 1u << i;
    for (int64_t k = 0; k < columns; k += LANES) {
        int64_t n = std::min<int64_t>(LANES, columns - k);
        Bits kept = (Bits{} + (bits[k / COLUMNS] >> k % COLUMNS)) & places;
        keep(out + k, kept != 0 ? some(x + k, n) * scale : Vec{}, n);
    }
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default"))) void

// bits [rows, columns / 32 and one for what is left]
EXPORTED hubkit_dropout_mask(uint32_t* bits, int64_t rows, int64_t columns, uint64_t seed, int64_t threshold) {
    int64_t words = (columns + COLUMNS - 1) / COLUMNS;
#pragma omp parallel for if (rows * columns > 1 << 14)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t w = 0; w < words; w++)
            bits[row * words + w] = word(seed, 2 * threshold, uint32_t(w * COLUMNS / 4), uint32_t(row));
}

// out = x * scale, rounded once, where bits say so, else 0; x, out [rows, columns]
EXPORTED hubkit_drop(
    const uint32_t* bits, const void* x, void* out, int64_t rows, int64_t columns, float scale, int64_t dtype) {
    int64_t words = (columns + COLUMNS - 1) / COLUMNS;
    typed(dtype, [=](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
#pragma omp parallel for if (rows * columns > 1 << 14)
        for (int64_t row = 0; row < rows; row++)
            drop(bits + row * words, (const T*)x + row * columns, (T*)out + row * columns, columns, scale);
    });
}
