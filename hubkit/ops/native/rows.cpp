// What a model computes row by row between its linears, each in one pass over memory where torch takes four:
// the gated activation silu(g) * u, RMSNorm with a frozen weight, rotary embedding, with their gradients.
// Arithmetic is fp32, rounded once; hubkit/lean says the same in torch.

#include <cmath>
#include <type_traits>

#include "vector.h"

namespace {

constexpr int64_t SMALL = 1 << 15;  // elements that are not worth waking other threads for
constexpr int64_t PIECE = 1 << 12;  // elements of a task

Vec sigmoid(Vec x) { return 1.0f / (1.0f + exponential(-x)); }

// f(begin of LANES elements, or how many are left of them) over n elements.
template <class F> void sweep(int64_t n, F f) {
    int64_t pieces = (n + PIECE - 1) / PIECE;
#pragma omp parallel for if (n > SMALL)
    for (int64_t piece = 0; piece < pieces; piece++) {
        int64_t i = piece * PIECE, end = i + PIECE < n ? i + PIECE : n;
        for (; i + LANES <= end; i += LANES) f(i, int64_t(LANES));
        if (i < end) f(i, end - i);
    }
}

template <class T> void gate(const T* g, const T* u, T* out, int64_t n) {
    sweep(n, [=](int64_t i, int64_t k) {
        Vec a = some(g + i, k);
        keep(out + i, a * sigmoid(a) * some(u + i, k), k);
    });
}

template <class T> void gate_gradients(const T* g, const T* u, const T* d, T* dg, T* du, int64_t n) {
    sweep(n, [=](int64_t i, int64_t k) {
        Vec a = some(g + i, k), b = some(u + i, k), e = some(d + i, k), s = sigmoid(a);
        keep(du + i, e * a * s, k);
        keep(dg + i, e * b * s * (1.0f + a * (1.0f - s)), k);
    });
}

// y = weight * round(x * inverse), inverse = 1 / sqrt(mean(x^2) + eps) a row
template <class T>
void norm(const T* x, const T* weight, T* y, float* inverse, int64_t rows, int64_t K, float eps) {
#pragma omp parallel for if (rows * K > SMALL)
    for (int64_t row = 0; row < rows; row++) {
        const T* p = x + row * K;
        Vec squares[4] = {};
        int64_t i = 0;
        for (; i + 4 * LANES <= K; i += 4 * LANES)
            for (int c = 0; c < 4; c++) {
                Vec v = load(p + i + c * LANES);
                squares[c] += v * v;
            }
        for (; i < K; i += LANES) {
            Vec v = some(p + i, K - i < LANES ? K - i : LANES);
            squares[0] += v * v;
        }
        float scale = 1 / std::sqrt(sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / K + eps);
        if (inverse) inverse[row] = scale;
        for (i = 0; i < K; i += LANES) {
            int64_t k = K - i < LANES ? K - i : LANES;
            T rounded[LANES];
            store(rounded, some(p + i, k) * scale);
            keep(y + row * K + i, load(rounded) * some(weight + i, k), k);
        }
    }
}

// dx = (dy * weight - n * mean(dy * weight * n)) * inverse, n = x * inverse
template <class T>
void norm_gradient(
    const T* x, const T* weight, const float* inverse, const T* dy, T* dx, int64_t rows, int64_t K) {
#pragma omp parallel for if (rows * K > SMALL)
    for (int64_t row = 0; row < rows; row++) {
        const T *p = x + row * K, *d = dy + row * K;
        Vec products[2] = {};
        for (int64_t i = 0; i < K; i += LANES) {
            int64_t k = K - i < LANES ? K - i : LANES;
            products[i / LANES % 2] += some(d + i, k) * some(weight + i, k) * some(p + i, k);
        }
        float scale = inverse[row], mean = sum(products[0] + products[1]) * scale * scale / K;
        for (int64_t i = 0; i < K; i += LANES) {
            int64_t k = K - i < LANES ? K - i : LANES;
            keep(dx + row * K + i, (some(d + i, k) * some(weight + i, k) - some(p + i, k) * mean) * scale, k);
        }
    }
}

// A vector of each half of a row; the sines of the halves are those that multiply them.
template <class T> void rotate_row(const T* x, const T* cos, const T* sin, T* y, int64_t half, bool back) {
    for (int64_t i = 0; i < half; i += LANES) {
        int64_t k = half - i < LANES ? half - i : LANES;
        Vec a = some(x + i, k), b = some(x + half + i, k);
        Vec low = some(sin + i, k), high = some(sin + half + i, k);
        Vec to_a = back ? b * high : -b * low, to_b = back ? -a * low : a * high;
        keep(y + i, a * some(cos + i, k) + to_a, k);
        keep(y + half + i, b * some(cos + half + i, k) + to_b, k);
    }
}

// x [B, H, T, D] with strides in elements, features dense; y [B, T, H, D], dense.
template <class T> struct Heads {
    const T* x;
    T* y;
    int64_t H, b, h, t;
};

// The queries and the keys; cos and sin [B, T, D], or [T, D] if they are shared.
template <class T>
void rotate(Heads<T> q, Heads<T> k, const T* cos, const T* sin, int64_t B, int64_t length, int64_t D, bool shared,
            bool back) {
    const Heads<T> parts[] = {q, k};
#pragma omp parallel for collapse(2) if (B * (q.H + k.H) * length * D > SMALL)
    for (int64_t b = 0; b < B; b++)
        for (int64_t t = 0; t < length; t++) {
            int64_t angle = ((shared ? 0 : b * length) + t) * D;
            for (const Heads<T>& part : parts)
                for (int64_t h = 0; h < part.H; h++)
                    rotate_row(part.x + b * part.b + h * part.h + t * part.t, cos + angle, sin + angle,
                               part.y + ((b * length + t) * part.H + h) * D, D / 2, back);
        }
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default"))) void

EXPORTED hubkit_gate(const void* g, const void* u, void* out, int64_t n, int64_t dtype) {
    typed(dtype, [=](auto* t) {
        using P = decltype(t);
        gate((P)g, (P)u, (P)out, n);
    });
}

EXPORTED hubkit_gate_gradients(
    const void* g, const void* u, const void* d, void* dg, void* du, int64_t n, int64_t dtype) {
    typed(dtype, [=](auto* t) {
        using P = decltype(t);
        gate_gradients((P)g, (P)u, (P)d, (P)dg, (P)du, n);
    });
}

EXPORTED hubkit_norm(
    const void* x, const void* weight, void* y, float* inverse, int64_t rows, int64_t K, float eps, int64_t dtype) {
    typed(dtype, [=](auto* t) {
        using P = decltype(t);
        norm((P)x, (P)weight, (P)y, inverse, rows, K, eps);
    });
}

EXPORTED hubkit_norm_gradient(
    const void* x, const void* weight, const float* inverse, const void* dy, void* dx, int64_t rows, int64_t K,
    int64_t dtype) {
    typed(dtype, [=](auto* t) {
        using P = decltype(t);
        norm_gradient((P)x, (P)weight, inverse, (P)dy, (P)dx, rows, K);
    });
}

EXPORTED hubkit_rotate(
    const void* q, const void* k, const void* cos, const void* sin, void* yq, void* yk, int64_t B, int64_t length,
    int64_t D, int64_t Hq, int64_t qb, int64_t qh, int64_t qt, int64_t Hk, int64_t kb, int64_t kh, int64_t kt,
    int64_t shared, int64_t back, int64_t dtype) {
    typed(dtype, [=](auto* t) {
        using P = decltype(t);
        using Part = Heads<std::remove_pointer_t<P>>;
        rotate(Part{(P)q, (P)yq, Hq, qb, qh, qt}, Part{(P)k, (P)yk, Hk, kb, kh, kt}, (P)cos, (P)sin, B, length, D,
               shared, back);
    });
}
