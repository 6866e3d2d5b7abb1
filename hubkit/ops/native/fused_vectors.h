// A fused call on vectors. Included by fused.cpp alone.
//
// Few and many batch rows are computed by other ways, with the same sums: what is added to an element of y is added in
// the same order.
#pragma once

#include "fused_few.h"
#include "fused_many.h"

namespace {

inline bool allowed() { return HUBKIT_AVX512; }
constexpr bool SHRINKS_PAIRS = false;
constexpr int64_t TOO_DEEP = INT64_MAX;  // none are
struct Registers {};

// Tiles of batch rows for which weights are laid out; a weight that is turned anyway is so for fewer.
constexpr int64_t MANY = 8, MANY_TURNED = 3;

bool many(const Call& call, const Work& work) { return work.tiles >= (call.turned ? MANY_TURNED : MANY); }
bool pairs_up(const Call& call, const Work& work) { return !many(call, work); }
Shape shape(const Call& call, const Work& work) {
    return many(call, work) ? strips_of(call, work) : panels_of(call, work);
}

void shrink(const Call& call, const Work& work, const Shrink& task, Desk&) {
    for (int64_t i = 0; i < task.count; i++) shrink(call, work, *task.pieces[i]);
}

void compute(const Call& call, const Work& work, const Task& task, Desk& desk) {
    many(call, work) ? compute_many(call, work, task, desk) : compute_few(call, work, task, desk);
}

}  // namespace
