// Numbers as `tile.h` and `block.h` multiply them, in tiles of 16 rows of 64 bytes, and the way there and back; with
// AVX-512, or in plain C++.
#pragma once

#include <cstdint>
#include <cstring>

// HUBKIT_PLAIN and HUBKIT_BY_TILES may be given: tests compile what another processor would.
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && !defined(HUBKIT_PLAIN)
#define HUBKIT_AVX512 1
#include <immintrin.h>
#else
#define HUBKIT_AVX512 0
#endif
#if defined(__AMX_BF16__) && HUBKIT_AVX512
#define HUBKIT_AMX 1
#else
#define HUBKIT_AMX 0
#endif
#ifndef HUBKIT_BY_TILES
#define HUBKIT_BY_TILES HUBKIT_AMX
#endif

namespace tile {

constexpr int SIDE = 16;              // rows of a tile, and fp32 numbers of a row
constexpr int DEPTH = 32;             // bf16 numbers of a row
constexpr int BF16S = SIDE * DEPTH;   // of a tile
constexpr int FLOATS = SIDE * SIDE;
constexpr int64_t ROW = 64;           // bytes

using bf16 = uint16_t;

inline float widen(bf16 b) {
    uint32_t bits = uint32_t(b) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

#if HUBKIT_AVX512

// 16 x 16 numbers of 32 bits: rows to columns.
inline void transpose(__m512i r[SIDE]) {
    __m512i t[SIDE];
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++)
        for (int h = 0; h < 2; h++) {
            r[4 * i + 2 * h] = _mm512_unpacklo_epi64(t[4 * i + h], t[4 * i + 2 + h]);
            r[4 * i + 2 * h + 1] = _mm512_unpackhi_epi64(t[4 * i + h], t[4 * i + 2 + h]);
        }
    for (int i = 0; i < 4; i++)
        for (int h = 0; h < 2; h++) {
            t[i + 8 * h] = _mm512_shuffle_i32x4(r[i + 8 * h], r[i + 4 + 8 * h], 0x88);
            t[i + 4 + 8 * h] = _mm512_shuffle_i32x4(r[i + 8 * h], r[i + 4 + 8 * h], 0xdd);
        }
    for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

// Rows of numbers [count <= 16, 32] to pairs [16, 16, 2] of columns; zeros for rows that are not there.
inline void pair(const bf16* from, int64_t stride, int64_t count, bf16* to) {
    __m512i r[SIDE];
    for (int i = 0; i < SIDE; i++) r[i] = i < count ? _mm512_loadu_si512(from + i * stride) : _mm512_setzero_si512();
    transpose(r);
    for (int i = 0; i < SIDE; i++) _mm512_store_si512(to + i * DEPTH, r[i]);
}

// Two rows of fp32 as one of bf16 pairs.
inline __m512i paired(__m512 even, __m512 odd) {
    __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
    return _mm512_or_si512(low, _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd)), 16));
}

// S^T [16, 16] fp32 to pairs along its rows in bf16: even tile rows the rounded numbers, odd ones what rounding left.
// Kept: the columns of `mask` in the first `count` rows, times coef.
inline void split(const float* from, const float* coef, int64_t count, uint16_t mask, bf16* to) {
    auto wide = [](__m512i pairs, int odd) {
        return (__m512)(odd ? _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000)) : _mm512_slli_epi32(pairs, 16));
    };
    for (int p = 0; p < 8; p++) {
        __m512 v[2];
        for (int h = 0; h < 2; h++) {
            int j = 2 * p + h;
            __m512 kept = _mm512_maskz_load_ps(mask, from + j * SIDE);
            v[h] = j < count ? _mm512_mul_ps(kept, _mm512_set1_ps(coef[j])) : _mm512_setzero_ps();
        }
        __m512i high = paired(v[0], v[1]);
        _mm512_store_si512(to + 2 * p * DEPTH, high);
        _mm512_store_si512(to + (2 * p + 1) * DEPTH,
                           paired(_mm512_sub_ps(v[0], wide(high, 0)), _mm512_sub_ps(v[1], wide(high, 1))));
    }
}

// Columns n to n + 16 of rows [count <= 16] to [16, 32]: row i holds column n + i in pairs, each twice; zeros for rows that are not
// there, and for columns from N on.
inline void twice(const bf16* const* rows, int64_t count, int64_t n, int64_t N, bf16* to) {
    __m512i r[SIDE];  // rows j and j + 1 as pairs: [8, 16, 2], each beside its copy
    __mmask16 there = N - n >= SIDE ? 0xffff : N > n ? (1 << (N - n)) - 1 : 0;
    for (int p = 0; p < 8; p++) {
        auto row = [&](int j) {
            return j < count ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, rows[j] + n))
                             : _mm512_setzero_si512();
        };
        r[2 * p] = r[2 * p + 1] = _mm512_or_si512(row(2 * p), _mm512_slli_epi32(row(2 * p + 1), 16));
    }
    transpose(r);
    for (int i = 0; i < SIDE; i++) _mm512_store_si512(to + i * DEPTH, r[i]);
}

// Two tiles y^T [32, 16] fp32, plus a bias a row, to `count` rows y [., columns <= 32] in bf16.
inline void finish(const float* from, const bf16* bias, bf16* y, int64_t stride, int64_t count, int64_t columns) {
    __m512i r[SIDE];
    for (int p = 0; p < SIDE; p++) {
        auto row = [&](int n) {
            __m512 sum = _mm512_load_ps(from + n * SIDE);
            return bias && n < columns ? _mm512_add_ps(sum, _mm512_set1_ps(widen(bias[n]))) : sum;
        };
        r[p] = paired(row(2 * p), row(2 * p + 1));
    }
    transpose(r);
    __mmask32 there = columns >= DEPTH ? 0xffffffff : (1u << columns) - 1;
    for (int m = 0; m < count; m++) _mm512_mask_storeu_epi16(y + m * stride, there, r[m]);
}

// Two tiles y^T [32, 16] += what dropout lets through of `added`, times scale: bit n of the word of each of `count` rows.
inline void add(float* to, const float* added, const uint32_t* words, int64_t stride, int64_t count, float scale) {
    uint32_t mine[SIDE] = {};
    for (int64_t m = 0; m < count; m++) mine[m] = words[m * stride];
    __m512i rows = _mm512_loadu_si512(mine);
    for (int n = 0; n < DEPTH; n++) {
        __mmask16 kept = _mm512_test_epi32_mask(rows, _mm512_set1_epi32(1u << n));
        __m512 more = _mm512_maskz_mul_ps(kept, _mm512_load_ps(added + n * SIDE), _mm512_set1_ps(scale));
        _mm512_store_ps(to + n * SIDE, _mm512_add_ps(_mm512_load_ps(to + n * SIDE), more));
    }
}

// W [32, 16] to [16, 32]: rows to columns.
inline void turn(const bf16* W, int64_t stride, bf16* to) {
    __m512i r[SIDE];
    for (int p = 0; p < SIDE; p++) {
        auto row = [&](int n) {
            return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(W + n * stride)));
        };
        r[p] = _mm512_or_si512(row(2 * p), _mm512_slli_epi32(row(2 * p + 1), 16));
    }
    transpose(r);
    for (int i = 0; i < SIDE; i++) _mm512_store_si512(to + i * DEPTH, r[i]);
}

// Rows [count <= 32, columns <= 32] to pairs along rows of columns 0 to 15 and of the others: twice [16, 16, 2], `apart`.
inline void zip(const bf16* from, int64_t stride, int64_t count, int64_t columns, bf16* to, int64_t apart) {
    alignas(64) static const struct Halves {
        uint16_t low[DEPTH], high[DEPTH];
        Halves() {
            for (int i = 0; i < DEPTH; i++) low[i] = i / 2 + i % 2 * DEPTH, high[i] = low[i] + SIDE;
        }
    } halves;
    __m512i low = _mm512_load_si512(halves.low), high = _mm512_load_si512(halves.high);
    __mmask32 there = columns >= DEPTH ? 0xffffffff : (1u << columns) - 1;
    for (int p = 0; p < SIDE; p++) {
        auto row = [&](int m) { return _mm512_maskz_loadu_epi16(m < count ? there : 0, from + m * stride); };
        __m512i even = row(2 * p), odd = row(2 * p + 1);
        _mm512_store_si512(to + p * DEPTH, _mm512_permutex2var_epi16(even, low, odd));
        _mm512_store_si512(to + apart + p * DEPTH, _mm512_permutex2var_epi16(even, high, odd));
    }
}

// 16 numbers times a factor, those of `mask`, the others zero.
inline void narrow(const float* from, float factor, uint16_t mask, bf16* to) {
    __m512 v = _mm512_mul_ps(_mm512_maskz_load_ps(mask, from), _mm512_set1_ps(factor));
    _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(v));
}

#else

inline bf16 narrow(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    if (f != f) return 0x7fc0;
    return bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline void pair(const bf16* from, int64_t stride, int64_t count, bf16* to) {
    for (int k = 0; k < DEPTH; k++)
        for (int i = 0; i < SIDE; i++) to[k / 2 * DEPTH + 2 * i + k % 2] = i < count ? from[i * stride + k] : 0;
}

inline void split(const float* from, const float* coef, int64_t count, uint16_t mask, bf16* to) {
    for (int j = 0; j < SIDE; j++)
        for (int m = 0; m < SIDE; m++) {
            float v = j < count && mask >> m & 1 ? from[j * SIDE + m] * coef[j] : 0.0f;
            bf16* at = to + j / 2 * 2 * DEPTH + 2 * m + j % 2;
            at[0] = narrow(v);
            at[DEPTH] = narrow(v - widen(at[0]));
        }
}

inline void twice(const bf16* const* rows, int64_t count, int64_t n, int64_t N, bf16* to) {
    for (int i = 0; i < SIDE; i++)
        for (int k = 0; k < DEPTH; k++) {
            int j = k / 4 * 2 + k % 2;
            to[i * DEPTH + k] = j < count && n + i < N ? rows[j][n + i] : 0;
        }
}

inline void finish(const float* from, const bf16* bias, bf16* y, int64_t stride, int64_t count, int64_t columns) {
    for (int m = 0; m < count; m++)
        for (int n = 0; n < DEPTH && n < columns; n++)
            y[m * stride + n] = narrow(from[n * SIDE + m] + (bias ? widen(bias[n]) : 0.0f));
}

inline void add(float* to, const float* added, const uint32_t* words, int64_t stride, int64_t count, float scale) {
    for (int n = 0; n < DEPTH; n++)
        for (int64_t m = 0; m < count; m++)
            if (words[m * stride] >> n & 1) to[n * SIDE + m] += added[n * SIDE + m] * scale;
}

inline void turn(const bf16* W, int64_t stride, bf16* to) {
    for (int i = 0; i < SIDE; i++)
        for (int n = 0; n < DEPTH; n++) to[i * DEPTH + n] = W[n * stride + i];
}

inline void zip(const bf16* from, int64_t stride, int64_t count, int64_t columns, bf16* to, int64_t apart) {
    for (int m = 0; m < DEPTH; m++)
        for (int n = 0; n < DEPTH; n++)
            to[n / SIDE * apart + m / 2 * DEPTH + 2 * (n % SIDE) + m % 2] =
                m < count && n < columns ? from[m * stride + n] : 0;
}

inline void narrow(const float* from, float factor, uint16_t mask, bf16* to) {
    for (int m = 0; m < SIDE; m++) to[m] = mask >> m & 1 ? narrow(from[m] * factor) : 0;
}

#endif

}  // namespace tile
