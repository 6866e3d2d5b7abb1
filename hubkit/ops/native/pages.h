// Pages of arena rows turned for the columns of a task, kept from one tile of batch rows to the next. Included by the
// two ways of a fused call alone.
#pragma once

#include "fused.h"

namespace {

constexpr int64_t PAGES = 64;  // that a thread keeps

class Pages {
    std::vector<bf16> room;
    bf16* slots = nullptr;
    std::vector<int64_t> tags;  // which page lies in each slot

  public:
    void begin(const Work& work, const Task& task) {
        int64_t count = std::max<int64_t>(1, std::min(PAGES, work.pages));
        tags.assign(count, -1);
        slots = lined(room, count * panels(task) * 2 * BF16S);
    }

    // A piece's rows of Bt for the panel at column n, turned, each number twice: two tiles.
    const bf16* turned(const Piece& piece, const Task& task, int64_t n) {
        int64_t slot = piece.page % tags.size(), N = piece.part->columns;
        bf16* page = slots + slot * panels(task) * 2 * BF16S;
        if (tags[slot] != piece.page) {
            tags[slot] = piece.page;
            const bf16* rows[SIDE];
            for (int64_t j = 0; j < piece.count; j++) rows[j] = piece.part->Bt + piece.cols[j] * N;
            for (int64_t i = 0; i < 2 * panels(task); i++)
                tile::twice(rows, piece.count, task.begin + i * SIDE, N, page + i * BF16S);
        }
        return page + (n - task.begin) / SIDE * BF16S;
    }
};

}  // namespace
