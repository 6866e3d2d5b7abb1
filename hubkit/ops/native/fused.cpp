// The multi-LoRA linear in bf16, base product and deltas in one pass: y = x W^T + b + ((x A^T) * C[group]) Bt
// for linears that read the same x; and its gradient, dx = sum of dy W + ((dy Bt^T) * C[group]) A over these linears,
// which is the same with other parts. On AMX by tiles, elsewhere by vectors of AVX-512.
//
// Tiles, and vectors where batch rows are few, compute y^T = W x^T: then W, A and x are read as they lie, and only x
// has to be paired up, once for all linears. With many rows vectors compute y, and W is paired up. Sums stay in
// registers through all features and are rounded once, after the expansion. Batch rows need no order: a tile of 16
// takes the arena rows of each of its groups in turn.
//
// An element of y is one chain of additions whose order depends on K and its own group alone, whatever the number of
// threads and the other rows are.

#include "fused.h"
#if HUBKIT_BY_TILES
#include "fused_tiles.h"
#else
#include "fused_vectors.h"
#endif

namespace {

void pair_up(const Call& call, const Work& work, int64_t t) {
    bf16* to = work.x + t * SIDE * call.features;
    for (const Input& input : call.inputs) {
        const bf16* from = input.x + (work.first + t * SIDE) * input.features;
        for (int64_t k = 0; k < input.features; k += DEPTH, to += BF16S)
            tile::pair(from + k, input.features, work.rows - t * SIDE, to);
    }
}

void run(const Call& call) {
    thread_local Work kept;
    Work& work = kept;  // the threads below would each see their own
    for (int64_t first = 0; first < call.M; first += SLAB) {
        work.plan(call, first);
        work.share_out(call, shape(call, work));
#pragma omp parallel if (call.M * call.features * call.columns > SMALL)
        {
            thread_local Desk desk;
            [[maybe_unused]] Registers registers;
#pragma omp for schedule(static)
            for (int64_t t = 0; t < (pairs_up(call, work) ? work.tiles : 0); t++) pair_up(call, work, t);
#pragma omp for schedule(dynamic)
            for (size_t i = 0; i < work.shrinks.size(); i++) shrink(call, work, work.shrinks[i], desk);
#pragma omp for schedule(dynamic)
            for (size_t i = 0; i < work.tasks.size(); i++) compute(call, work, work.tasks[i], desk);
        }
    }
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Whether this process may use what this is compiled for, and that is worth it.
EXPORTED int64_t hubkit_fused_allowed() { return allowed(); }

// How many features there are to be for oneDNN to be faster with many rows (docs/kernel.md).
EXPORTED int64_t hubkit_fused_deep() { return TOO_DEEP; }

// bf16 x [M, K], weights [N, K], biases [N] or null, y [M, N], contiguous; K a multiple of 32. seen: what reaches the
// adapters, x or what dropout leaves of it. S: null, or for each linear where to put S^T [entries of its route, padded].
EXPORTED void hubkit_fused(const Member* members, const bf16* const* weights, const bf16* const* biases,
                           bf16* const* y, bf16* const* S, int64_t padded, int64_t count, const bf16* x,
                           const bf16* seen, int64_t M, int64_t K, int64_t threads) {
    thread_local Call call;
    Input whole = {x, K, 0}, rest = {seen, K, SHRINKS_PAIRS && seen != x ? K : 0};
    call.inputs.assign(1, whole), call.parts.clear(), call.outputs.clear();
    if (rest.offset) call.inputs.push_back(rest);
    for (int64_t i = 0; i < count; i++)
        call.parts.push_back({whole, rest, weights[i], (const bf16*)members[i].A, (const bf16*)members[i].Bt,
                              members[i].N, &members[i].route, S ? S[i] : nullptr});
    for (int64_t i = 0; i < count; i++)
        call.outputs.push_back({y[i], biases[i], members[i].N, &call.parts[i], &call.parts[i] + 1});
    call.features = K + rest.offset, call.M = M, call.padded = padded, call.threads = threads, call.turned = false;
    call.dropped = {};
    call.columns = 0;
    for (const Output& output : call.outputs) call.columns += output.columns;
    run(call);
}

// dx [M, K] (null: only Z) from dy [M, N] of each linear; K and every N a multiple of 32. Z: for each linear where to
// put Z^T [entries of its route, padded], Z = (dy Bt^T) * C. bits, scale: of the dropout that Z A goes back through.
EXPORTED void hubkit_fused_gradient(const Member* members, const bf16* const* weights, const bf16* const* dy,
                                    bf16* const* Z, int64_t padded, int64_t count, bf16* dx, int64_t M, int64_t K,
                                    const uint32_t* bits, float scale, int64_t threads) {
    thread_local Call call;
    call.inputs.clear(), call.parts.clear(), call.outputs.clear();
    int64_t features = 0;
    for (int64_t i = 0; i < count; i++) {
        Input input = {dy[i], members[i].N, features};
        call.inputs.push_back(input);
        call.parts.push_back({input, input, weights[i], (const bf16*)members[i].Bt, (const bf16*)members[i].A, K,
                              &members[i].route, Z[i]});
        features += input.features;
    }
    call.outputs.push_back({dx, nullptr, K, call.parts.data(), call.parts.data() + count});
    call.features = features, call.columns = K, call.M = M, call.padded = padded, call.threads = threads, call.turned = true;
    call.dropped = {bits, scale};
    run(call);
}
