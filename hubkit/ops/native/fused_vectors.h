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
struct Registers {};

constexpr int64_t MANY = 4;  // tiles of batch rows for which weights are laid out

bool many(const Work& work) { return work.tiles >= MANY; }
bool pairs_up(const Work& work) { return !many(work); }
Shape shape(const Call& call, const Work& work) { return many(work) ? strips_of(call, work) : panels_of(call, work); }

void shrink(const Call& call, const Work& work, const Shrink& task, Desk&) {
    for (int64_t i = 0; i < task.count; i++) shrink(call, work, *task.pieces[i]);
}

void compute(const Call& call, const Work& work, const Task& task, Desk& desk) {
    many(work) ? compute_many(call, work, task, desk) : compute_few(call, work, task, desk);
}

}  // namespace
