// The eight tile registers of AMX, 16 rows of 64 bytes each.
//
// dot<D, A, B>: D[i][j] += sum over 16 pairs p of A[i][2p] B[p][2j] + A[i][2p + 1] B[p][2j + 1], with D fp32 [16, 16],
// A bf16 [16, 32] as rows lie in memory, B bf16 in pairs [16, 16, 2]. Where there is no AMX the same in plain C++,
// slowly: for tests of what is built on it.
#pragma once

#include "arrange.h"
#if HUBKIT_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tile {

#if HUBKIT_AMX

// Linux gives a process the tile registers if it asks; false: it does not have them.
inline bool allowed() {
    constexpr int request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

// A thread's tile registers are all of the full size while one of these lives.
struct Registers {
    Registers() {
        struct alignas(64) {
            uint8_t palette = 1, rest[15] = {};
            uint16_t bytes[16] = {};
            uint8_t rows[16] = {};
        } shape;
        for (int i = 0; i < 8; i++) shape.bytes[i] = ROW, shape.rows[i] = SIDE;
        asm volatile("ldtilecfg %0" ::"m"(shape));
    }
    ~Registers() { asm volatile("tilerelease"); }
};

template <int T> void zero() { asm volatile("tilezero %%tmm%c0" ::"i"(T)); }
template <int T> void load(const void* p, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
// For what streams through once and should not push out of the L1 cache what is read again and again.
template <int T> void stream(const void* p, int64_t stride) {
    asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T> void store(float* p) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(ROW), "i"(T) : "memory");
}
template <int D, int A, int B> void dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(D), "i"(A), "i"(B));
}

#else

inline bool allowed() { return false; }

inline uint8_t (&registers())[8][SIDE * ROW] {
    thread_local uint8_t held[8][SIDE * ROW];
    return held;
}
struct Registers {};

template <int T> void zero() { std::memset(registers()[T], 0, SIDE * ROW); }
template <int T> void load(const void* p, int64_t stride) {
    for (int i = 0; i < SIDE; i++) std::memcpy(registers()[T] + i * ROW, (const char*)p + i * stride, ROW);
}
template <int T> void stream(const void* p, int64_t stride) { load<T>(p, stride); }
template <int T> void store(float* p) { std::memcpy(p, registers()[T], SIDE * ROW); }
template <int D, int A, int B> void dot() {
    float* d = (float*)registers()[D];
    const bf16 *a = (const bf16*)registers()[A], *b = (const bf16*)registers()[B];
    for (int i = 0; i < SIDE; i++)
        for (int k = 0; k < DEPTH; k++)
            for (int j = 0; j < SIDE; j++)
                d[i * SIDE + j] += widen(a[i * DEPTH + k]) * widen(b[k / 2 * DEPTH + 2 * j + k % 2]);
}

#endif

}  // namespace tile
