// How attention divides its work, and the memory for it.
#pragma once

#include "kernels_attention_blocks.h"

namespace turbolm {
namespace {

constexpr int kMaxRows = 48;
constexpr int kVectors = kKeyBlock / kLanes;

TURBOLM_INLINE int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Result of some keys for some rows: softmax = weighted / sum, relative to e^top.
struct Partial {
    float* top;       // [rows]
    float* sum;       // [rows]
    float* weighted;  // [rows, padded v_head_dim]
};

// Memory of one thread, and of partial results that cross threads; both in floats.
struct Layout {
    int64_t padded_v, q, q_sums, scores, starts, k_range, v_range, k_stage, v_stage, state;
    int64_t thread_floats, partial_floats;

    explicit Layout(const HeadShape& shape) {
        padded_v = round_up(shape.v_head_dim, kLanes);
        partial_floats = round_up(kMaxRows * (padded_v + 2), kLanes);
        q = 0;
        q_sums = q + round_up(kMaxRows * shape.head_dim, kLanes);
        scores = q_sums + kMaxRows;
        starts = scores + kMaxRows * kKeyBlock;
        k_range = starts + kMaxRows;
        v_range = k_range + 2 * kKeyBlock;
        k_stage = v_range + 2 * kKeyBlock;
        v_stage = k_stage + static_cast<int64_t>(shape.head_dim) * kChunk * kLanes;
        state = v_stage + kKeyBlock * padded_v;
        thread_floats = state + 2 * partial_floats;  // the folded state and the current block
    }
};

Partial partial_at(float* memory, int64_t rows) { return {memory, memory + rows, memory + 2 * rows}; }

struct Unit {
    int64_t sequence, kv_head;
    int64_t first_row, num_rows;  // of the sequence's (query, head of the group) pairs
    int64_t context, num_queries;
    int64_t first_key, end_key;  // that any row sees
    int64_t first_block, end_block;
    int64_t first_cost, row_cost;  // cost of all units before; cost of a vector of keys

    int64_t cost_at(int64_t block) const {
        const int64_t key = block * kKeyBlock < end_key ? block * kKeyBlock : round_up(end_key, kLanes);
        return first_cost + (key - first_block * kKeyBlock) / kLanes * row_cost;
    }
};

// Calls visit(unit) for the units whose cost range meets [begin, end); returns the cost of all.
template <class Visit>
TURBOLM_INLINE int64_t each_unit(const Attention& op, const Step& step, int64_t begin, int64_t end, const Visit& visit) {
    const int64_t kv_heads = op.shape.num_kv_heads, group = op.shape.num_heads / kv_heads;
    int64_t cost = 0;
    Unit unit;
    for (unit.sequence = 0; unit.sequence < step.num_sequences; ++unit.sequence) {
        unit.context = step.context_lens[unit.sequence];
        unit.num_queries = step.query_start[unit.sequence + 1] - step.query_start[unit.sequence];
        const int64_t rows = unit.num_queries * group, cached = unit.context - unit.num_queries;
        for (unit.first_row = 0; unit.first_row < rows; unit.first_row += kMaxRows) {
            unit.num_rows = rows - unit.first_row < kMaxRows ? rows - unit.first_row : kMaxRows;
            const int64_t first_query = cached + unit.first_row / group;
            const int64_t window_start = op.window > 0 ? first_query + 1 - op.window : 0;
            unit.first_key = window_start > 0 ? window_start : 0;
            unit.end_key = cached + (unit.first_row + unit.num_rows - 1) / group + 1;
            unit.first_block = unit.first_key / kKeyBlock;
            unit.end_block = (unit.end_key + kKeyBlock - 1) / kKeyBlock;
            unit.row_cost = unit.num_rows + 4;  // reading K and V costs as much as 4 rows
            unit.first_cost = 0;
            const int64_t unit_cost = unit.cost_at(unit.end_block);
            if (cost + unit_cost * kv_heads > begin && cost < end) {
                for (unit.kv_head = 0; unit.kv_head < kv_heads; ++unit.kv_head) {
                    unit.first_cost = cost + unit.kv_head * unit_cost;
                    if (unit.first_cost + unit_cost > begin && unit.first_cost < end) visit(unit);
                }
            }
            cost += unit_cost * kv_heads;
        }
    }
    return cost;
}

// First block of the unit that starts at or after this cost.
TURBOLM_INLINE int64_t block_from(const Unit& unit, int64_t cost) {
    if (cost <= unit.first_cost) return unit.first_block;
    const int64_t block_cost = kVectors * unit.row_cost;
    const int64_t block = unit.first_block + (cost - unit.first_cost + block_cost - 1) / block_cost;
    return block < unit.end_block ? block : unit.end_block;
}

}  // namespace
}  // namespace turbolm
