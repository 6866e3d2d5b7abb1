// What native/__init__.py hands over: which batch rows use which arena rows, and the arenas.
#pragma once

#include <cstdint>

extern "C" {
// Group g has rows[row_start[g] : row_start[g + 1]] (rows null: one group of all M rows), and cols and
// coef[col_start[g] : col_start[g + 1]].
struct Route {
    int64_t groups;
    const int64_t *row_start, *rows, *col_start, *cols;
    const float* coef;
};
// One linear: A [., K], Bt [., N], contiguous.
struct Member {
    const void *A, *Bt;
    int64_t N;
    Route route;
};
}
