// Attention of one new token: softmax(scale * q K^T + mask) V for every row of the batch, in fp32, rounded once.
// The query heads of a group share the keys and values that they read, a vector's worth of keys at a time.

#include <algorithm>
#include <cmath>
#include <vector>

#include "vector.h"

namespace {

constexpr int64_t SMALL = 1 << 14;  // elements of K that are not worth waking other threads for

struct Strides { int64_t b, h, t; };  // in elements

struct Shape { int64_t B, H, groups, length, D; };  // query heads, heads of keys and values, keys, features

float* scratch(int64_t floats) {
    thread_local std::vector<float> buffer;
    if (int64_t(buffer.size()) < floats) buffer.resize(floats);
    return buffer.data();
}

// n rows as floats [n, padded(D)], filled up with zeros
template <class T> void widen_rows(const T* from, int64_t stride, float* to, int64_t n, int64_t D) {
    int64_t width = padded(D), whole = D / LANES * LANES;
    for (int64_t row = 0; row < n; row++, from += stride, to += width) {
        for (int64_t d = 0; d < whole; d += LANES) store(to + d, load(from + d));
        if (whole < D) store(to + whole, load(from + whole, D - whole));
    }
}

// The sums of neighbours of a, then of b.
Vec pairs(Vec a, Vec b) {
#if defined(__GNUC__) && !defined(__clang__)
    Ints even;
    for (int i = 0; i < LANES; i++) even[i] = 2 * i;
    return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, even + 1);
#else
    Vec sums;
    for (int i = 0; i < LANES / 2; i++) {
        sums[i] = a[2 * i] + a[2 * i + 1];
        sums[LANES / 2 + i] = b[2 * i] + b[2 * i + 1];
    }
    return sums;
#endif
}

// Whether each of n <= LANES keys is seen, all of them without `seen`.
Ints flags(const bool* seen, int64_t n) {
    using Bytes = uint8_t __attribute__((vector_size(LANES)));
    uint8_t bytes[LANES] = {};
    seen ? std::memcpy(bytes, seen, n) : std::memset(bytes, 1, n);
    return __builtin_convertvector(read<Bytes>(bytes), Ints) != 0;
}

// q [width] by each of LANES keys [LANES, width]
Vec dots(const float* q, const float* keys, int64_t width) {
    Vec products[LANES];
    for (int j = 0; j < LANES; j++) {
        Vec total = {};
        for (int64_t d = 0; d < width; d += LANES) total += load(q + d) * load(keys + j * width + d);
        products[j] = total;
    }
    for (int n = LANES; n > 1; n /= 2)
        for (int j = 0; j < n / 2; j++) products[j] = pairs(products[2 * j], products[2 * j + 1]);
    return products[0];
}

// sums [width] += weights [n] by rows [n, width]
void add_rows(float* sums, const float* weights, const float* rows, int64_t n, int64_t width) {
    for (int64_t d = 0; d < width; d += LANES) {
        Vec total = load(sums + d);
        for (int64_t j = 0; j < n; j++) total += weights[j] * load(rows + j * width + d);
        store(sums + d, total);
    }
}

// The query heads of one group of one row: q and y [members, D].
template <class T>
void attend(const T* q, int64_t q_stride, const T* k, const T* v, int64_t k_stride, int64_t v_stride,
            const bool* seen, T* y, int64_t members, int64_t length, int64_t D, float scale) {
    int64_t width = padded(D), keys = padded(length);
    float* wide = scratch((2 * members + LANES) * width + members * keys);
    float *sums = wide + members * width, *block = sums + members * width, *scores = block + LANES * width;
    widen_rows(q, q_stride, wide, members, D);
    for (int64_t t = 0; t < keys; t += LANES) {
        int64_t n = std::min<int64_t>(LANES, length - t);
        widen_rows(k + t * k_stride, k_stride, block, n, D);
        Ints visible = flags(seen ? seen + t : nullptr, n);
        for (int64_t m = 0; m < members; m++) {
            Vec score = scale * dots(wide + m * width, block, width);
            store(scores + m * keys + t, visible ? score : Vec{} - INFINITY);
        }
    }
    for (int64_t m = 0; m < members; m++) {
        float total = softmax(scores + m * keys, keys);
        for (int64_t t = 0; t < keys; t += LANES) {
            float* at = scores + m * keys + t;
            store(at, load(at) / total);
        }
    }
    std::fill(sums, sums + members * width, 0.0f);
    for (int64_t t = 0; t < length; t += LANES) {
        int64_t n = std::min<int64_t>(LANES, length - t);
        widen_rows(v + t * v_stride, v_stride, block, n, D);
        for (int64_t m = 0; m < members; m++) add_rows(sums + m * width, scores + m * keys + t, block, n, width);
    }
    for (int64_t m = 0; m < members; m++)
        for (int64_t d = 0; d < D; d += LANES)
            keep(y + m * D + d, load(sums + m * width + d), std::min<int64_t>(LANES, D - d));
}

template <class T>
void attend_all(const T* q, const T* k, const T* v, const bool* seen, T* y, Shape s, Strides qs, Strides ks,
                Strides vs, float scale) {
    int64_t members = s.H / s.groups;
#pragma omp parallel for collapse(2) if (s.B * s.groups * s.length * s.D > SMALL)
    for (int64_t b = 0; b < s.B; b++)
        for (int64_t g = 0; g < s.groups; g++)
            attend(q + b * qs.b + g * members * qs.h, qs.h, k + b * ks.b + g * ks.h, v + b * vs.b + g * vs.h, ks.t,
                   vs.t, seen ? seen + b * s.length : nullptr, y + (b * s.H + g * members) * s.D, members, s.length,
                   s.D, scale);
}

}  // namespace

// q [B, H, 1, D], k and v [B, groups, length, D] with strides in elements, features dense; seen [B, length] or null;
// y [B, 1, H, D]; dtype: 0 fp32, 1 bf16, 2 fp16.
extern "C" __attribute__((visibility("default"))) void hubkit_attend(
    const void* q, const void* k, const void* v, const bool* seen, void* y, int64_t B, int64_t H, int64_t groups,
    int64_t length, int64_t D, int64_t qb, int64_t qh, int64_t kb, int64_t kh, int64_t kt, int64_t vb, int64_t vh,
    int64_t vt, float scale, int64_t dtype) {
    auto run = [=](auto* type) {
        using P = decltype(type);
        attend_all((P)q, (P)k, (P)v, seen, (P)y, Shape{B, H, groups, length, D}, {qb, qh, 0}, {kb, kh, kt},
                   {vb, vh, vt}, scale);
    };
    typed(dtype, run);
}
