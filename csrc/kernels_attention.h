// Attention over a paged KV cache.
//
// The result for a token depends on its own sequence alone, bit by bit: not on how the prompt was
// cut into steps, on what else is in the batch, or on the number of threads. For that the context
// is cut at fixed positions into blocks of kKeyBlock keys. Each block is attended by itself (its
// largest score, sum and weighted values), and the results are folded in the order of positions,
// as in FlashAttention (arXiv 2205.14135). Keys that a row may not see have weight exactly 0.
//
// A unit of work is some rows (query tokens times the query heads that share one kv head) of one
// sequence, so one pass over K and V serves all of them; threads get equal shares of all units'
// blocks, and a unit cut between threads is folded by the thread that has its first block.
#pragma once

#include "kernels_attention_blocks.h"
#include "kernels_rotary.h"

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
    int64_t padded_v, q, scores, k_stage, v_stage, state, thread_floats, partial_floats;

    explicit Layout(const HeadShape& shape) {
        padded_v = round_up(shape.v_head_dim, kLanes);
        partial_floats = round_up(kMaxRows * (padded_v + 2), kLanes);
        q = 0;
        scores = q + round_up(kMaxRows * shape.head_dim, kLanes);
        k_stage = scores + kMaxRows * kKeyBlock;
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

template <class T>
struct Attend {
    const Attention& op;
    const Step& step;
    const Team& team;
    const Layout layout;
    const int64_t group, d, dv, block_size, lanes_of_k, max_blocks;
    const bool is_fused;    // with rotary_store
    float* const memory;    // of this thread
    float* const crossing;  // partial results of units cut between threads: [thread of its first block, block]

    Attend(const Attention& op, const Step& step, const Team& team)
        : op(op), step(step), team(team), layout(op.shape),
          group(op.shape.num_heads / op.shape.num_kv_heads), d(op.shape.head_dim), dv(op.shape.v_head_dim),
          block_size(op.pool.block_size), lanes_of_k(block_size < kLanes ? block_size : kLanes),
          max_blocks((op.max_context + kKeyBlock - 1) / kKeyBlock),
          is_fused(op.rotary != nullptr && is_lone(step)),
          memory(reinterpret_cast<float*>(op.workspace) + team.thread * layout.thread_floats),
          crossing(reinterpret_cast<float*>(op.workspace) + team.num_threads * layout.thread_floats) {}

    // The group of keys that `key` begins, all dimensions.
    const T* k_group(const Unit& unit, int64_t key) const {
        const int64_t block = step.block_tables[unit.sequence * step.table_stride + key / block_size];
        const int64_t head = block * op.shape.num_kv_heads + unit.kv_head;
        return static_cast<const T*>(op.pool.k) + (head * block_size + key % block_size) * d;
    }

    const T* v_row(const Unit& unit, int64_t key) const {
        const int64_t block = step.block_tables[unit.sequence * step.table_stride + key / block_size];
        const int64_t head = block * op.shape.num_kv_heads + unit.kv_head;
        return static_cast<const T*>(op.pool.v) + (head * block_size + key % block_size) * dv;
    }

    // The unit's rows of q, scaled; of a lone token turned before, as rotary_store does it.
    void load_queries(const Unit& unit) const {
        const int64_t width = (op.shape.num_heads + op.shape.num_kv_heads) * d + op.shape.num_kv_heads * dv;
        const float* first = op.qkv + step.query_start[unit.sequence] * width + unit.kv_head * group * d;
        const Vec scale = Vec::all(op.scale);
        float* q = memory + layout.q;
        for (int64_t i = 0; i < unit.num_rows; ++i, q += d) {
            const int64_t row = unit.first_row + i;
            const float* source = first + row / group * width + row % group * d;
            if (is_fused) {
                __builtin_memcpy(q, source, d * sizeof(float));
                TokenRow<T>{*op.rotary}.turn(q, op.rotary->q_norm, step.positions[0]);
                source = q;
            }
            for (int64_t j = 0; j < d; j += kLanes) {
                const int count = static_cast<int>(d - j < kLanes ? d - j : kLanes);
                (Vec::load_first(source + j, count) * scale).store_first(q + j, count);
            }
        }
    }

    // The lone token's key and value into the pool: by the thread that attends the block they are in.
    void store_token(const Unit& unit) const {
        const TokenRow<T> rows{*op.rotary};
        const float* key = op.qkv + (rows.num_heads + unit.kv_head) * d;
        const float* value = op.qkv + (rows.num_heads + rows.num_kv_heads) * d + unit.kv_head * dv;
        float* turned = memory + layout.k_stage;
        __builtin_memcpy(turned, key, d * sizeof(float));
        rows.turn(turned, op.rotary->k_norm, step.positions[0]);
        rows.store_key(turned, unit.kv_head, step.slots[0]);
        rows.store_value(value, unit.kv_head, step.slots[0]);
    }

    // Scores of keys [first, first + 16 * num_vectors).
    void score(const Unit& unit, int64_t first, int num_vectors) const {
        const float* q = memory + layout.q;
        float* scores = memory + layout.scores;
        // K is converted once for several blocks of rows, or on the way for a single one.
        const bool is_staged = lanes_of_k < kLanes || (sizeof(T) < 4 && unit.num_rows > Vec::block_rows);
        for (int begin = 0; begin < num_vectors; begin += kChunk) {
            const int count = num_vectors - begin < kChunk ? num_vectors - begin : kChunk;
            const T *source[kChunk], *values[kChunk];
            for (int c = 0; c < count; ++c) {
                const int64_t key = first + (begin + c) * kLanes;
                source[c] = k_group(unit, key);
                values[c] = is_staged ? nullptr : v_row(unit, key);
            }
            if (!is_staged) {
                score_chunk<T>(q, unit.num_rows, d, source, kLanes, values, count, scores + begin * kLanes);
                continue;
            }
            float* stage = memory + layout.k_stage;
            const float* staged[kChunk];
            for (int c = 0; c < count; ++c) {
                const int64_t key = first + (begin + c) * kLanes;
                staged[c] = stage + c * kLanes;
                if (lanes_of_k == kLanes) {
                    for (int64_t i = 0; i < d; ++i) store(load(source[c] + i * kLanes), stage + (i * kChunk + c) * kLanes);
                } else {
                    stage_halves(source[c], key + 8 < unit.end_key ? k_group(unit, key + 8) : source[c], stage + c * kLanes);
                }
            }
            score_chunk<float>(q, unit.num_rows, d, staged, kChunk * kLanes, staged, count, scores + begin * kLanes);
        }
    }

    // Two groups of 8 keys side by side.
    void stage_halves(const T* low, const T* high, float* stage) const {
        for (int64_t i = 0; i < d; ++i) {
            T both[kLanes];
            __builtin_memcpy(both, low + i * 8, 8 * sizeof(T));
            __builtin_memcpy(both + 8, high + i * 8, 8 * sizeof(T));
            store(load(both), stage + i * kChunk * kLanes);
        }
    }

    // Scores to weights e^(score - top), 0 for keys that a row doesn't see.
    void soften(const Unit& unit, int64_t first, int num_vectors, const Partial& out) const {
        const int64_t cached = unit.context - unit.num_queries;
        for (int64_t i = 0; i < unit.num_rows; ++i) {
            float* scores = memory + layout.scores + i * kKeyBlock;
            const int64_t position = cached + (unit.first_row + i) / group;
            const int64_t bound = num_vectors * kLanes;
            int64_t end = position + 1 - first, begin = op.window > 0 ? end - op.window : 0;
            end = end < bound ? end : bound;
            begin = begin > 0 ? begin : 0;
            const Vec nothing = Vec::all(-kInfinity);
            Vec tops = nothing;
            for (int64_t j = 0; j < bound; j += kLanes) {
                Vec s = load(scores + j);
                if (op.softcap > 0.0f) s = cap(s, op.softcap);
                if (j < begin || j + kLanes > end) {
                    s = Vec::between(s, static_cast<int>(begin - j), static_cast<int>(end - j), nothing);
                }
                store(s, scores + j);
                tops = Vec::max(tops, s);
            }
            const float top = largest(tops);
            out.top[i] = top;
            const Vec shift = Vec::all(top == -kInfinity ? 0.0f : top);
            Vec total = Vec::zero();
            for (int64_t j = 0; j < bound; j += kLanes) {
                const Vec weight = exp(load(scores + j) - shift);
                store(weight, scores + j);
                total = total + weight;
            }
            out.sum[i] = sum(total);
        }
    }

    // Where the keys are that this thread attends, as a rule, a block after `key`, the first of a run of
    // values: in the same context or, past its end, at the start of the next kv head's. Or null.
    const T* keys_after(const Unit& unit, int64_t key) const {
        Unit next = unit;
        int64_t after = key + kKeyBlock;
        if (after >= unit.end_key) {
            if (++next.kv_head == op.shape.num_kv_heads) return nullptr;
            after = unit.first_block * kKeyBlock + key % kKeyBlock;
        }
        return k_group(next, after / lanes_of_k * lanes_of_k);
    }

    void weigh_values(const Unit& unit, int64_t first, int64_t end, const Partial& out) const {
        const float* weights = memory + layout.scores;
        Run<T> runs[kKeyBlock / 8 + 1];
        int num_runs = 0;
        for (int64_t key = first; key < end;) {
            const int64_t next = (key / block_size + 1) * block_size;
            runs[num_runs] = {v_row(unit, key), keys_after(unit, key), (next < end ? next : end) - key};
            key += runs[num_runs++].count;
        }
        if (dv == layout.padded_v && (sizeof(T) == 4 || unit.num_rows <= Vec::block_rows)) {
            weigh<T>(weights, unit.num_rows, runs, num_runs, dv, d * sizeof(T), out.weighted, layout.padded_v);
            return;
        }
        float* stage = memory + layout.v_stage;
        float* target = stage;
        for (int run = 0; run < num_runs; ++run) {
            const T* v = runs[run].v;
            for (int64_t i = 0; i < runs[run].count; ++i, v += dv, target += layout.padded_v) {
                int64_t j = 0;
                for (; j + kLanes <= dv; j += kLanes) store(load(v + j), target + j);
                if (j < dv) store(load_first(v + j, static_cast<int>(dv - j)), target + j);
            }
        }
        const Run<float> staged{stage, nullptr, end - first};
        weigh<float>(weights, unit.num_rows, &staged, 1, layout.padded_v, 0, out.weighted, layout.padded_v);
    }

    // The keys of one block.
    void attend_block(const Unit& unit, int64_t block, const Partial& out) const {
        int64_t first = block * kKeyBlock, end = first + kKeyBlock;
        end = end < unit.end_key ? end : unit.end_key;
        if (first < unit.first_key) first = unit.first_key / kLanes * kLanes;
        const int num_vectors = static_cast<int>((end - first + kLanes - 1) / kLanes);
        if (is_fused && block + 1 == unit.end_block) store_token(unit);
        score(unit, first, num_vectors);
        soften(unit, first, num_vectors, out);
        weigh_values(unit, first, end, out);
    }

    // state := state ⊕ block
    void fold(const Unit& unit, const Partial& state, const Partial& block) const {
        for (int64_t i = 0; i < unit.num_rows; ++i) {
            if (block.top[i] == -kInfinity) continue;  // no visible key
            const float top = state.top[i] > block.top[i] ? state.top[i] : block.top[i];
            const Vec old_scale = exp(Vec::all(state.top[i] - top)), new_scale = exp(Vec::all(block.top[i] - top));
            const auto merge = [&](Vec a, Vec b) { return Vec::fma(b, new_scale, a * old_scale); };
            state.top[i] = top;
            merge(Vec::all(state.sum[i]), Vec::all(block.sum[i])).store_first(&state.sum[i], 1);
            float* weighted = state.weighted + i * layout.padded_v;
            const float* added = block.weighted + i * layout.padded_v;
            for (int64_t j = 0; j < layout.padded_v; j += kLanes) store(merge(load(weighted + j), load(added + j)), weighted + j);
        }
    }

    void clear(const Unit& unit, const Partial& state) const {
        for (int64_t i = 0; i < unit.num_rows; ++i) {
            state.top[i] = -kInfinity;
            state.sum[i] = 0.0f;
        }
        for (int64_t j = 0; j < unit.num_rows * layout.padded_v; j += kLanes) store(Vec::zero(), state.weighted + j);
    }

    void finish(const Unit& unit, const Partial& state) const {
        const int64_t width = op.shape.num_heads * dv;
        float* first = op.y + step.query_start[unit.sequence] * width + unit.kv_head * group * dv;
        for (int64_t i = 0; i < unit.num_rows; ++i) {
            const int64_t row = unit.first_row + i;
            const Vec scale = Vec::all(1.0f / state.sum[i]);
            const float* weighted = state.weighted + i * layout.padded_v;
            float* y = first + row / group * width + row % group * dv;
            for (int64_t j = 0; j < dv; j += kLanes) {
                (load(weighted + j) * scale).store_first(y + j, static_cast<int>(dv - j < kLanes ? dv - j : kLanes));
            }
        }
    }

    Partial crossing_at(const Unit& unit, int64_t thread, int64_t block) const {
        const int64_t index = thread * max_blocks + block - unit.first_block;
        return partial_at(crossing + index * layout.partial_floats, unit.num_rows);
    }

    void run() const {
        const int64_t total = each_unit(op, step, 0, 0, [](const Unit&) {});
        const auto share_start = [&](int64_t thread) { return total * thread / team.num_threads; };
        const int64_t begin = share_start(team.thread), end = share_start(team.thread + 1);
        float* state_memory = memory + layout.state;
        Unit open{};  // this thread has its first block, but not its last
        int64_t open_block = 0;
        bool has_open = false;
        each_unit(op, step, begin, end, [&](const Unit& unit) {
            const int64_t first = block_from(unit, begin), last = block_from(unit, end);
            if (first >= last) return;
            const Partial state = partial_at(state_memory, unit.num_rows);
            const Partial current = partial_at(state_memory + layout.partial_floats, unit.num_rows);
            load_queries(unit);
            if (first > unit.first_block) {
                int64_t owner = team.thread;
                while (share_start(owner) > unit.first_cost) --owner;
                for (int64_t block = first; block < last; ++block) {
                    attend_block(unit, block, crossing_at(unit, owner, block));
                }
                return;
            }
            clear(unit, state);
            for (int64_t block = first; block < last; ++block) {
                attend_block(unit, block, current);
                fold(unit, state, current);
            }
            if (last == unit.end_block) {
                finish(unit, state);
            } else {
                open = unit;
                open_block = last;
                has_open = true;
            }
        });
        team.barrier();
        if (!has_open) return;
        const Partial state = partial_at(state_memory, open.num_rows);
        for (int64_t block = open_block; block < open.end_block; ++block) {
            fold(open, state, crossing_at(open, team.thread, block));
        }
        finish(open, state);
    }
};

void attention(const Attention& op, const Step& step, const Team& team) {
    switch (op.pool.type) {
        case CacheType::f32: return Attend<float>(op, step, team).run();
        case CacheType::f16: return Attend<F16>(op, step, team).run();
        case CacheType::bf16: return Attend<Bf16>(op, step, team).run();
    }
}

int64_t attention_bytes(const HeadShape& shape, int64_t max_context, int num_threads) {
    const Layout layout(shape);
    const int64_t blocks = (max_context + kKeyBlock - 1) / kKeyBlock;
    return 4 * num_threads * (layout.thread_floats + blocks * layout.partial_floats);
}

}  // namespace
}  // namespace turbolm
