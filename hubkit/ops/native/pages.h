// Arena rows laid out for the products of a task, kept from one tile of batch rows to the next. Included by the two ways
// of a fused call alone.
#pragma once

#include "fused.h"

namespace {

class Pages {
    std::vector<bf16> room;
    bf16* slots = nullptr;
    int64_t size = 0;
    std::vector<int64_t> tags;  // which page lies in each slot

  public:
    // For pages of so many numbers, of which at most so many are kept.
    void begin(const Work& work, int64_t numbers, int64_t most) {
        size = numbers;
        tags.assign(std::max<int64_t>(1, std::min(most, work.pages)), -1);
        slots = lined(room, int64_t(tags.size()) * size);
    }

    // Whether none gives way to another.
    bool all(const Work& work) const { return work.pages <= int64_t(tags.size()); }

    // The page of a piece's arena rows; fill(page) if it is not here.
    template <class Fill> const bf16* of(const Piece& piece, Fill fill) {
        int64_t slot = piece.page % tags.size();
        bf16* page = slots + slot * size;
        if (tags[slot] != piece.page) tags[slot] = piece.page, fill(page);
        return page;
    }
};

}  // namespace
