// A vector register of floats, what is loaded into it and stored from it (fp32, bf16, fp16), e^x and softmax.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#ifndef LANES  // tests compile the width of AVX-512 for narrower machines, too
#if defined(__AVX512F__)
#define LANES 16
#else
#define LANES 8
#endif
#endif

namespace {

using Vec = float __attribute__((vector_size(LANES * 4)));
using Ints = int32_t __attribute__((vector_size(LANES * 4)));
using Bits = uint32_t __attribute__((vector_size(LANES * 4)));
using Short = uint16_t __attribute__((vector_size(LANES * 2)));

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

template <class To, class From> To as(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

template <class V> V read(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// Makes the compiler load v once. It would rather fold the load into every multiplication, and then loads, of which
// a core does fewer per cycle than a tile wants, set the pace.
inline void hold(Vec& v) {
#if defined(__AVX__) && LANES == 8 || defined(__AVX512F__)
    asm("" : "+v"(v));
#else
    (void)v;
#endif
}

Vec load(const float* p) { return read<Vec>(p); }
void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

Vec load(const bfloat16* p) { return as<Vec>(__builtin_convertvector(read<Short>(p), Bits) << 16); }

void store(bfloat16* p, Vec v) {  // to nearest even; a NaN stays one
    Bits bits = as<Bits>(v);
    Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    Bits nan = as<Bits>(v != v);
    Short narrow = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), Short);
    std::memcpy(p, &narrow, sizeof narrow);
}

Vec load(const float16* p) {
#if defined(__F16C__) && LANES == 8
    return as<Vec>(_mm256_cvtph_ps(read<__m128i>(p)));
#elif defined(__AVX512F__) && LANES == 16
    return as<Vec>(_mm512_cvtph_ps(read<__m256i>(p)));
#else
    Vec v;
    for (int i = 0; i < LANES; i++) v[i] = float(read<_Float16>(p + i));
    return v;
#endif
}

void store(float16* p, Vec v) {
#if defined(__F16C__) && LANES == 8
    __m128i narrow = _mm256_cvtps_ph(as<__m256>(v), _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(p, &narrow, sizeof narrow);
#elif defined(__AVX512F__) && LANES == 16
    __m256i narrow = _mm512_cvtps_ph(as<__m512>(v), _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(p, &narrow, sizeof narrow);
#else
    for (int i = 0; i < LANES; i++) {
        _Float16 narrow = _Float16(v[i]);
        std::memcpy(p + i, &narrow, sizeof narrow);
    }
#endif
}

// The first n < LANES elements; zeros behind them.
template <class T> Vec load(const T* p, int64_t n) {
    T padded[LANES] = {};
    std::memcpy(padded, p, n * sizeof(T));
    return load(padded);
}

template <class T> void store(T* p, Vec v, int64_t n) {
    T padded[LANES];
    store(padded, v);
    std::memcpy(p, padded, n * sizeof(T));
}

template <class T> void widen(const T* from, float* to, int64_t n) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(to + i, load(from + i));
    if (i < n) store(to + i, load(from + i, n - i), n - i);
}

// LANES x LANES numbers, rows to columns: halves of rows change places, then quarters, and so on.
inline void transpose(Vec (&v)[LANES]) {
    for (int width = LANES / 2; width; width /= 2) {
        Ints low, high;  // where the numbers of a pair of rows come from, the second row's behind the first's
        for (int i = 0; i < LANES; i++) {
            low[i] = i & width ? LANES + i - width : i;
            high[i] = i & width ? LANES + i : i + width;
        }
        for (int i = 0; i < LANES; i++)
            if (!(i & width)) {
                Vec a = v[i], b = v[i + width];
                v[i] = __builtin_shuffle(a, b, low), v[i + width] = __builtin_shuffle(a, b, high);
            }
    }
}

float sum(Vec v) {  // halves onto halves
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) v[i] += v[i + width];
    return v[0];
}

// f(T*) for the type that dtype names: 0 fp32, 1 bf16, 2 fp16
template <class F> void typed(int64_t dtype, F f) {
    if (dtype == 0) f((float*)nullptr);
    if (dtype == 1) f((bfloat16*)nullptr);
    if (dtype == 2) f((float16*)nullptr);
}

// The first n <= LANES elements.
template <class T> Vec some(const T* p, int64_t n) { return n == LANES ? load(p) : load(p, n); }
template <class T> void keep(T* p, Vec v, int64_t n) { n == LANES ? store(p, v) : store(p, v, n); }

// e^x to about 2 units in the last place, Cody-Waite reduction and a Taylor polynomial on [-ln2/2, ln2/2].
Vec exponential(Vec x) {
    x = x > 88.0f ? Vec{} + 88.0f : x;
    x = x < -87.0f ? Vec{} - 87.0f : x;
    Vec n = x * 1.44269504088896341f;
    n = __builtin_convertvector(__builtin_convertvector(n + (n > 0 ? Vec{} + 0.5f : Vec{} - 0.5f), Ints), Vec);
    Vec r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    Vec p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
    return p * as<Vec>(power);
}

int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }  // to whole vectors

// scores [length], a multiple of LANES, to what is proportional to probabilities; returns their sum
float softmax(float* scores, int64_t length) {
    Vec largest = load(scores), total = {};
    for (int64_t t = LANES; t < length; t += LANES) {
        Vec more = load(scores + t);
        largest = more > largest ? more : largest;
    }
    float top = largest[0];
    for (int i = 1; i < LANES; i++) top = std::max(top, largest[i]);
    for (int64_t t = 0; t < length; t += LANES) {
        Vec below = load(scores + t) - top;
        Vec weight = below < -80.0f ? Vec{} : exponential(below);  // smaller ones end as denormals, which are slow
        store(scores + t, weight);
        total += weight;
    }
    return sum(total);
}

}  // namespace
