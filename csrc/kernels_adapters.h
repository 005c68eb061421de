// What LoRA adapters add to a product: each row of x is shrunk to the adapter's rank, and expanded to a row of y.
// Both are summed in float32 in one order, whatever else is in the step and however many threads there are.
#pragma once

#include "kernels_math.h"
#include "ops.h"

namespace turbolm {
namespace {

constexpr int kShrinkRows = 4;  // rows of a that share the loads of x

// Dot products of x with N rows of a, each `width` long.
template <int N>
TURBOLM_INLINE void shrink_rows(const float* x, const float* a, int64_t width, float* y) {
    Vec total[N];
    for (int r = 0; r < N; ++r) total[r] = Vec::zero();
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) {
        const Vec v = load(x + i);
        for (int r = 0; r < N; ++r) total[r] = Vec::fma(v, load(a + r * width + i), total[r]);
    }
    if (i < width) {
        const int rest = static_cast<int>(width - i);
        const Vec v = Vec::load_first(x + i, rest);
        for (int r = 0; r < N; ++r) total[r] = Vec::fma(v, Vec::load_first(a + r * width + i, rest), total[r]);
    }
    for (int r = 0; r < N; ++r) y[r] = sum(total[r]);
}

void adapter_shrink(const AdapterShrink& op, const Step& step, const Team& team) {
    const bool has_own_input = is_lone(step) && (op.head.flags & kOwnInput) != 0;
    const int64_t height = static_cast<int64_t>(op.num_parts) * op.max_rank;  // rows of an adapter's a
    const int64_t groups = height / kShrinkRows;
    int64_t first, last;
    share(team, step.num_tokens * groups, 1, &first, &last);
    for (int64_t item = first; item < last; ++item) {
        const int64_t token = item / groups, row = item % groups * kShrinkRows;
        const int32_t place = step.adapters[token];
        if (place < 0 || row % op.max_rank >= op.ranks[place]) continue;  // padding
        const float* x = op.x + (has_own_input ? team.thread : token) * op.width;
        shrink_rows<kShrinkRows>(x, op.a + (place * height + row) * op.width, op.width, op.y + token * height + row);
    }
}

// y += x[0] * b[0] + … + x[rank - 1] * b[rank - 1], N vectors wide; rows of b are `stride` apart.
template <int N>
TURBOLM_INLINE void expand_columns(const float* x, const float* b, int64_t stride, int rank, float* y) {
    Vec total[N];
    for (int i = 0; i < N; ++i) total[i] = Vec::zero();
    for (int r = 0; r < rank; ++r) {
        const Vec factor = Vec::all(x[r]);
        for (int i = 0; i < N; ++i) total[i] = Vec::fma(factor, load(b + r * stride + i * kLanes), total[i]);
    }
    for (int i = 0; i < N; ++i) store(load(y + i * kLanes) + total[i], y + i * kLanes);
}

// The same of n < 16 columns.
TURBOLM_INLINE void expand_rest(const float* x, const float* b, int64_t stride, int rank, float* y, int n) {
    Vec total = Vec::zero();
    for (int r = 0; r < rank; ++r) total = Vec::fma(Vec::all(x[r]), Vec::load_first(b + r * stride, n), total);
    (Vec::load_first(y, n) + total).store_first(y, n);
}

void adapter_expand(const AdapterExpand& op, const Step& step, const Team& team) {
    constexpr int64_t chunk = 64;  // columns
    const int64_t chunks = (op.width + chunk - 1) / chunk;
    int64_t first, last;
    share(team, step.num_tokens * chunks, 1, &first, &last);
    for (int64_t item = first; item < last; ++item) {
        const int64_t token = item / chunks, begin = item % chunks * chunk;
        const int64_t end = begin + chunk < op.width ? begin + chunk : op.width;
        const int32_t place = step.adapters[token];
        const int rank = place < 0 ? 0 : op.ranks[place];
        if (rank == 0) continue;
        const float* b = op.b + place * op.max_rank * op.width;
        float* y = op.y + token * op.width;
        int64_t part_begin = 0;
        for (int part = 0; part < op.num_parts; ++part) {
            const int64_t part_end = op.ends[part];
            int64_t i = begin > part_begin ? begin : part_begin;
            const int64_t stop = end < part_end ? end : part_end;
            const float* x = op.x + (token * op.num_parts + part) * op.max_rank;
            for (; i + 4 * kLanes <= stop; i += 4 * kLanes) expand_columns<4>(x, b + i, op.width, rank, y + i);
            for (; i + kLanes <= stop; i += kLanes) expand_columns<1>(x, b + i, op.width, rank, y + i);
            if (i < stop) expand_rest(x, b + i, op.width, rank, y + i, static_cast<int>(stop - i));
            part_begin = part_end;
        }
    }
}

}  // namespace
}  // namespace turbolm
