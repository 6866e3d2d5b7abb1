// Products of bf16 numbers in pairs on vectors of AVX-512, or on what the compiler makes of them: for tests elsewhere.
#pragma once

#include "arrange.h"

namespace block {

using tile::bf16, tile::DEPTH, tile::FLOATS, tile::SIDE;

using Floats = float __attribute__((vector_size(64)));
using Pairs = uint32_t __attribute__((vector_size(64)));

#define INLINED inline __attribute__((always_inline))  // what is to keep its sums in registers

constexpr int ROWS = 8;  // of the left operand: two vectors beside each of them leave registers for what is loaded

template <class V> V read(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// sum + a[odd] b[odd] + a[even] b[even], each pair's own
inline Floats dot(Floats sum, Pairs a, Pairs b) {
#if HUBKIT_AVX512
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    sum += (Floats)(a & 0xffff0000) * (Floats)(b & 0xffff0000);
    return sum + (Floats)(a << 16) * (Floats)(b << 16);
#endif
}

// Eight rows of bf16 `stride` apart; `step` from 32 numbers to the next 32.
struct Left {
    const bf16* at;
    int64_t stride, step;
    int64_t ahead;  // what is to be fetched meanwhile; 0: nothing
};

// Tiles of pairs [16, 16, 2], `step` from one to the next, beside each other `apart`.
struct Right {
    const bf16* at;
    int64_t step, apart;
};

// sums [RIGHT, 8, 16], the first two tiles apart, += left times right over `depth` numbers; fresh: = that.
template <int RIGHT>
void multiply(const Left& left, const Right& right, int64_t depth, float* sums, bool fresh) {
    Floats held[RIGHT][ROWS];
    for (int r = 0; r < RIGHT; r++)
        for (int i = 0; i < ROWS; i++)
            held[r][i] = fresh ? Floats{} : read<Floats>(sums + r * 2 * FLOATS + i * SIDE);
    const bf16 *a = left.at, *b = right.at;
    for (int64_t k = 0; k < depth; k += DEPTH, a += left.step, b += right.step) {
        if (left.ahead)
            for (int i = 0; i < ROWS; i++) __builtin_prefetch(a + left.ahead + i * left.stride);
        for (int p = 0; p < SIDE; p++) {
            Pairs pairs[RIGHT];
            for (int r = 0; r < RIGHT; r++) pairs[r] = read<Pairs>(b + r * right.apart + p * DEPTH);
            for (int i = 0; i < ROWS; i++) {
                Pairs both = Pairs{} + read<uint32_t>(a + i * left.stride + 2 * p);
                for (int r = 0; r < RIGHT; r++) held[r][i] = dot(held[r][i], both, pairs[r]);
            }
        }
    }
    for (int r = 0; r < RIGHT; r++)
        for (int i = 0; i < ROWS; i++) std::memcpy(sums + r * 2 * FLOATS + i * SIDE, &held[r][i], sizeof(Floats));
}

// ROWS rows of y, STRIPS of 16 columns each: in registers, which takes loops that are unrolled early.
#define EACH(i, count) _Pragma("GCC unroll 16") for (int i = 0; i < count; i++)
template <int ROWS, int STRIPS> struct Sums {
    Floats held[ROWS][STRIPS];

    INLINED void clear() {
        EACH(i, ROWS) EACH(s, STRIPS) held[i][s] = Floats{};
    }

    // From or to rows `stride` apart, those that `which` names.
    INLINED void load(const float* from, int64_t stride, const int* which) {
        EACH(i, ROWS) EACH(s, STRIPS) held[i][s] = read<Floats>(from + which[i] * stride + s * SIDE);
    }
    INLINED void store(float* to, int64_t stride, const int* which) const {
        EACH(i, ROWS) EACH(s, STRIPS) std::memcpy(to + which[i] * stride + s * SIDE, &held[i][s], sizeof(Floats));
    }

    // += rows of `depth` numbers, a multiple of 32, times a matrix in pairs, strip by strip: [STRIPS, depth / 2, 16, 2],
    // `apart` from one to the next. What lies `ahead` of the rows is fetched meanwhile.
    INLINED void multiply(const bf16* const (&rows)[ROWS], const bf16* matrix, int64_t apart, int64_t depth,
                          int64_t ahead) {
        for (int64_t k = 0; k < depth; k += 2) {
            if (k % DEPTH == 0) EACH(i, ROWS) __builtin_prefetch(rows[i] + k + ahead);
            Pairs pairs[STRIPS];
            EACH(s, STRIPS) pairs[s] = read<Pairs>(matrix + s * apart + k * SIDE);
            EACH(i, ROWS) {
                Pairs both = Pairs{} + read<uint32_t>(rows[i] + k);
                EACH(s, STRIPS) held[i][s] = dot(held[i][s], both, pairs[s]);
            }
        }
    }

    // The same for `depth` of 16 numbers, of which each row has what rounding left beside: [2, 16].
    INLINED void expand(const bf16* const (&rows)[ROWS], const bf16* matrix, int64_t depth) {
        for (int64_t k = 0; k < depth; k += 2) {
            Pairs pairs[STRIPS];
            EACH(s, STRIPS) pairs[s] = read<Pairs>(matrix + (s * SIDE + k) * SIDE);
            EACH(i, ROWS) {
                Pairs high = Pairs{} + read<uint32_t>(rows[i] + k), low = Pairs{} + read<uint32_t>(rows[i] + SIDE + k);
                EACH(s, STRIPS) held[i][s] = dot(dot(held[i][s], pairs[s], high), pairs[s], low);
            }
        }
    }
};

// 16 x 16 numbers, rows to columns.
inline void transpose(Floats v[SIDE]) {
#if HUBKIT_AVX512
    tile::transpose((__m512i*)v);
#else
    for (int i = 0; i < SIDE; i++)
        for (int j = 0; j < i; j++) {
            float held = v[i][j];
            v[i][j] = v[j][i], v[j][i] = held;
        }
#endif
}

// The sum of each of 16 vectors, halves onto halves.
inline Floats sums(const Floats (&v)[SIDE]) {
#if HUBKIT_AVX512
    __m512 eight[8], four[4], two[2];  // sums of as many numbers each, of several vectors beside each other
    EACH(i, 8) {
        __m512 a = (__m512)v[i], b = (__m512)v[i + 8];
        eight[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    }
    EACH(i, 4) {
        __m512 a = eight[i], b = eight[i + 4];
        four[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    EACH(i, 2) {
        __m512d a = (__m512d)four[i], b = (__m512d)four[i + 2];
        two[i] = _mm512_add_ps((__m512)_mm512_unpacklo_pd(a, b), (__m512)_mm512_unpackhi_pd(a, b));
    }
    __m512 all = _mm512_add_ps(_mm512_shuffle_ps(two[0], two[1], 0x88), _mm512_shuffle_ps(two[0], two[1], 0xdd));
    const __m512i order = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
    return (Floats)_mm512_permutexvar_ps(order, all);
#else
    Floats t[SIDE];
    std::memcpy(t, v, sizeof t);
    transpose(t);
    for (int width = SIDE / 2; width; width /= 2)
        for (int i = 0; i < width; i++) t[i] += t[i + width];
    return t[0];
#endif
}

#if HUBKIT_AVX512
inline __mmask16 first(int64_t count) { return count > 0 ? (1 << count) - 1 : 0; }
#endif

// Those of `mask`, the others zero.
inline Floats those(uint16_t mask, Floats v) {
#if HUBKIT_AVX512
    return (Floats)_mm512_maskz_mov_ps(mask, (__m512)v);
#else
    for (int i = 0; i < SIDE; i++) v[i] = mask >> i & 1 ? v[i] : 0.0f;
    return v;
#endif
}

// 16 numbers, those from `count` on zero.
inline Floats widen(const bf16* p, int64_t count) {
#if HUBKIT_AVX512
    __m256i v = count >= SIDE ? read<__m256i>(p) : _mm256_maskz_loadu_epi16(first(count), p);
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16);
#else
    Floats v{};
    for (int i = 0; i < SIDE && i < count; i++) v[i] = tile::widen(p[i]);
    return v;
#endif
}

// 16 numbers of two rows in pairs, those from `count` on zero; odd: null for a row of zeros.
inline Pairs zipped(const bf16* even, const bf16* odd, int64_t count) {
#if HUBKIT_AVX512
    auto row = [&](const bf16* p) { return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(count >= SIDE ? 0xffff : first(count), p)); };
    return (Pairs)(odd ? _mm512_or_si512(row(even), _mm512_slli_epi32(row(odd), 16)) : row(even));
#else
    Pairs v{};
    for (int i = 0; i < SIDE && i < count; i++) v[i] = even[i] | (odd ? uint32_t(odd[i]) << 16 : 0);
    return v;
#endif
}

// 16 numbers in bf16, and what rounding left of them.
inline void split(Floats v, bf16* high, bf16* low) {
#if HUBKIT_AVX512
    auto rounded = [](Floats f, bf16* to) {
        __m256i narrow = (__m256i)_mm512_cvtneps_pbh((__m512)f);
        std::memcpy(to, &narrow, sizeof narrow);
    };
    rounded(v, high);
    rounded(v - widen(high, SIDE), low);
#else
    for (int i = 0; i < SIDE; i++) high[i] = tile::narrow(v[i]), low[i] = tile::narrow(v[i] - tile::widen(high[i]));
#endif
}

// The first `count` of 16 numbers, rounded.
inline void narrow(Floats v, bf16* to, int64_t count) {
#if HUBKIT_AVX512
    __m256i rounded = (__m256i)_mm512_cvtneps_pbh((__m512)v);
    if (count >= SIDE) std::memcpy(to, &rounded, sizeof rounded);
    else _mm256_mask_storeu_epi16(to, first(count), rounded);
#else
    for (int i = 0; i < SIDE && i < count; i++) to[i] = tile::narrow(v[i]);
#endif
}

}  // namespace block
