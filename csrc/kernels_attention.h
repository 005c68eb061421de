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
#include "kernels_attention_units.h"
#include "kernels_rotary.h"

namespace turbolm {
namespace {

struct Attend {
    const Attention& op;
    const Step& step;
    const Team& team;
    const Layout layout;
    const KvPool& pool;
    const int64_t group, d, dv, block_size, lanes_of_k, max_blocks;
    const int64_t key_bytes, value_bytes, ahead_step;  // of values for each cache line of keys
    const int block_bits;   // block_size is a power of two: no divisions
    const bool is_fused;    // with rotary_store
    float* const memory;    // of this thread
    float* const crossing;  // partial results of units cut between threads: [thread of its first block, block]

    Attend(const Attention& op, const Step& step, const Team& team)
        : op(op), step(step), team(team), layout(op.shape), pool(op.pool),
          group(op.shape.num_heads / op.shape.num_kv_heads), d(op.shape.head_dim), dv(op.shape.v_head_dim),
          block_size(pool.block_size), lanes_of_k(block_size < kLanes ? block_size : kLanes),
          max_blocks((op.max_context + kKeyBlock - 1) / kKeyBlock),
          key_bytes(bytes_of(pool.k_type, d)), value_bytes(bytes_of(pool.v_type, dv)),
          ahead_step(64 * value_bytes / key_bytes),
          block_bits(__builtin_ctz(static_cast<unsigned>(pool.block_size))),
          is_fused(op.rotary != nullptr && is_lone(step)),
          memory(reinterpret_cast<float*>(op.workspace) + team.thread * layout.thread_floats),
          crossing(reinterpret_cast<float*>(op.workspace) + team.num_threads * layout.thread_floats) {}

    // The key's number among all tokens of all blocks and heads of the pool.
    int64_t token_at(const Unit& unit, int64_t key) const {
        const int64_t block = step.block_tables[unit.sequence * step.table_stride + (key >> block_bits)];
        return ((block * op.shape.num_kv_heads + unit.kv_head) << block_bits) + (key & (block_size - 1));
    }

    // The group of keys that `key` begins, all dimensions.
    const char* k_group(const Unit& unit, int64_t key) const {
        return static_cast<const char*>(pool.k) + token_at(unit, key) * key_bytes;
    }

    const char* v_row(const Unit& unit, int64_t key) const {
        return static_cast<const char*>(pool.v) + token_at(unit, key) * value_bytes;
    }

    // The unit's rows of q, scaled, and their sums; of a lone token turned before, as rotary_store does it.
    void load_queries(const Unit& unit) const {
        const int64_t width = (op.shape.num_heads + op.shape.num_kv_heads) * d + op.shape.num_kv_heads * dv;
        const float* first = op.qkv + step.query_start[unit.sequence] * width + unit.kv_head * group * d;
        const Vec scale = Vec::all(op.scale * unit_of(pool.k_type));
        float* q = memory + layout.q;
        for (int64_t i = 0; i < unit.num_rows; ++i, q += d) {
            const int64_t row = unit.first_row + i;
            const float* source = first + row / group * width + row % group * d;
            if (is_fused) {
                __builtin_memcpy(q, source, d * sizeof(float));
                TokenRow{*op.rotary}.turn(q, op.rotary->q_norm, step.positions[0]);
                source = q;
            }
            Vec total = Vec::zero();
            for (int64_t j = 0; j < d; j += kLanes) {
                const int count = static_cast<int>(d - j < kLanes ? d - j : kLanes);
                const Vec scaled = Vec::load_first(source + j, count) * scale;
                scaled.store_first(q + j, count);
                total = total + scaled;
            }
            memory[layout.q_sums + i] = sum(total);
        }
    }

    // The lone token's key and value into the pool: by the thread that attends the block they are in.
    void store_token(const Unit& unit) const {
        const TokenRow rows{*op.rotary};
        const float* key = op.qkv + (rows.num_heads + unit.kv_head) * d;
        const float* value = op.qkv + (rows.num_heads + rows.num_kv_heads) * d + unit.kv_head * dv;
        float* turned = memory + layout.k_stage;
        __builtin_memcpy(turned, key, d * sizeof(float));
        rows.turn(turned, op.rotary->k_norm, step.positions[0]);
        rows.store_key(turned, unit.kv_head, step.slots[0]);
        rows.store_value(value, unit.kv_head, step.slots[0]);
    }

    // Scales and minimums of keys [first, first + 16 * num_vectors), 0 past the context's end, to
    // target[0 .. 128) and target[128 .. 256).
    void load_ranges(const Unit& unit, const uint16_t* scales, int64_t first, int num_vectors, float* target) const {
        for (int c = 0; c < num_vectors; ++c, target += kLanes) {
            const int64_t key = first + c * kLanes, left = unit.end_key - key;
            const uint16_t* source = scales + 2 * token_at(unit, key);
            if (left > kKeyBlock) __builtin_prefetch(scales + 2 * token_at(unit, key + kKeyBlock));
            uint16_t halves[2 * kLanes] = {};
            if (lanes_of_k < kLanes) {
                source = join_halves(source, left > 8 ? scales + 2 * token_at(unit, key + 8) : nullptr, halves);
            }
            const int valid = static_cast<int>(left < kLanes ? left : kLanes);
            store(Vec::between(Vec::load_f16(source), 0, valid, Vec::zero()), target);
            store(Vec::between(Vec::load_f16(source + kLanes), 0, valid, Vec::zero()), target + kKeyBlock);
        }
    }

    // 8 scales and 8 minimums, and as many of the next keys, as 16 scales and 16 minimums.
    static const uint16_t* join_halves(const uint16_t* first, const uint16_t* second, uint16_t* joined) {
        for (int i = 0; i < 2; ++i) {
            __builtin_memcpy(joined + 16 * i, first + 8 * i, 16);
            if (second != nullptr) __builtin_memcpy(joined + 16 * i + 8, second + 8 * i, 16);
        }
        return joined;
    }

    // Scores of keys [first, first + 16 * num_vectors), of codes alone where keys are coded.
    template <class T>
    void score(const Unit& unit, int64_t first, int num_vectors) const {
        const float* q = memory + layout.q;
        float* scores = memory + layout.scores;
        // K is converted once for several blocks of rows, or on the way for a single one.
        const bool is_staged = lanes_of_k < kLanes || (sizeof(T) < 4 && unit.num_rows > Vec::block_rows);
        for (int begin = 0; begin < num_vectors; begin += kChunk) {
            const int count = num_vectors - begin < kChunk ? num_vectors - begin : kChunk;
            KeyGroup<T> groups[kChunk];
            for (int c = 0; c < count; ++c) {
                const int64_t key = first + (begin + c) * kLanes;
                groups[c] = {reinterpret_cast<const T*>(k_group(unit, key)), v_row(unit, key)};
            }
            if (!is_staged) {
                score_chunk<T>(q, unit.num_rows, d, groups, kLanes, ahead_step, count, scores + begin * kLanes);
                continue;
            }
            float* stage = memory + layout.k_stage;
            KeyGroup<float> staged[kChunk];
            for (int c = 0; c < count; ++c) {
                const int64_t key = first + (begin + c) * kLanes;
                staged[c] = {stage + c * kLanes, nullptr};
                const bool has_second = lanes_of_k < kLanes && key + lanes_of_k < unit.end_key;
                const char* second = has_second ? k_group(unit, key + lanes_of_k) : nullptr;
                stage_keys(groups[c], reinterpret_cast<const T*>(second), stage + c * kLanes);
            }
            score_chunk<float>(q, unit.num_rows, d, staged, kChunk * kLanes, 0, count, scores + begin * kLanes);
        }
    }

    // A group of 16 keys, or two of 8 side by side (the second may be null), as floats.
    template <class T>
    void stage_keys(const KeyGroup<T>& first, const T* second, float* stage) const {
        for (int64_t i = 0; i < d / kPerItem<T>; ++i) {
            fetch_ahead(first, i, ahead_step);
            T both[kLanes] = {};
            const T* items = first.k + i * kLanes;
            if (lanes_of_k < kLanes) {
                __builtin_memcpy(both, first.k + i * 8, 8 * sizeof(T));
                if (second != nullptr) __builtin_memcpy(both + 8, second + i * 8, 8 * sizeof(T));
                items = both;
            }
            for (int half = 0; half < kPerItem<T>; ++half) {
                store(load_half(items, half), stage + (i * kPerItem<T> + half) * kChunk * kLanes);
            }
        }
    }

    // Scores to weights e^(score - top), 0 for keys that a row doesn't see. Where values are coded, the weights
    // are those of their codes, and `starts` gets what the minimums add.
    void soften(const Unit& unit, int64_t first, int num_vectors, const Partial& out) const {
        const int64_t cached = unit.context - unit.num_queries, bound = num_vectors * kLanes;
        const float *k_range = memory + layout.k_range, *v_range = memory + layout.v_range;
        const bool has_k_range = is_coded(pool.k_type), has_v_range = is_coded(pool.v_type);
        int64_t position = cached + unit.first_row / group, head = unit.first_row % group;
        for (int64_t i = 0; i < unit.num_rows; ++i) {
            float* scores = memory + layout.scores + i * kKeyBlock;
            int64_t end = position + 1 - first, begin = op.window > 0 ? end - op.window : 0;
            end = end < bound ? end : bound;
            begin = begin > 0 ? begin : 0;
            const Vec nothing = Vec::all(-kInfinity), q_sum = Vec::all(memory[layout.q_sums + i]);
            Vec tops = nothing;
            for (int64_t j = 0; j < bound; j += kLanes) {
                Vec s = load(scores + j);
                if (has_k_range) s = Vec::fma(s, load(k_range + j), q_sum * load(k_range + kKeyBlock + j));
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
            Vec total = Vec::zero(), start = Vec::zero();
            for (int64_t j = 0; j < bound; j += kLanes) {
                Vec weight = exp(load(scores + j) - shift);
                total = total + weight;
                if (has_v_range) {
                    start = Vec::fma(weight, load(v_range + kKeyBlock + j), start);
                    weight = weight * load(v_range + j);
                }
                store(weight, scores + j);
            }
            out.sum[i] = sum(total);
            memory[layout.starts + i] = sum(start);
            if (++head == group) {
                head = 0;
                ++position;
            }
        }
    }

    // Where the keys are that this thread attends, as a rule, a block after `key`, the first of a run of
    // values: in the same context or, past its end, at the start of the next kv head's. Or null.
    const char* keys_after(const Unit& unit, int64_t key) const {
        Unit next = unit;
        int64_t after = key + kKeyBlock;
        if (after >= unit.end_key) {
            if (++next.kv_head == op.shape.num_kv_heads) return nullptr;
            after = unit.first_block * kKeyBlock + key % kKeyBlock;
        }
        return k_group(next, after & -lanes_of_k);
    }

    template <class T>
    void weigh_values(const Unit& unit, int64_t first, int64_t end, const Partial& out) const {
        const float *weights = memory + layout.scores, *start = memory + layout.starts;
        Run<T> runs[kKeyBlock / 8 + 1];
        int num_runs = 0;
        for (int64_t key = first; key < end;) {
            const int64_t next = (key | (block_size - 1)) + 1;
            const T* v = reinterpret_cast<const T*>(v_row(unit, key));
            runs[num_runs] = {v, keys_after(unit, key), (next < end ? next : end) - key};
            key += runs[num_runs++].count;
        }
        const bool is_whole = dv % (kLanes * kPerItem<T>) == 0;
        if (is_whole && (sizeof(T) == 4 || unit.num_rows <= Vec::block_rows)) {
            weigh<T>(weights, start, unit.num_rows, runs, num_runs, dv / kPerItem<T>, key_bytes, out.weighted,
                     layout.padded_v);
            return;
        }
        float* stage = memory + layout.v_stage;
        float* target = stage;
        for (int run = 0; run < num_runs; ++run) {
            const T* v = runs[run].v;
            const char* ahead = runs[run].ahead;
            for (int64_t i = 0; i < runs[run].count; ++i, v += dv / kPerItem<T>, target += layout.padded_v) {
                ahead = fetch_key(ahead, key_bytes);
                stage_value(v, target);
            }
        }
        const Run<float> staged{stage, nullptr, end - first};
        weigh<float>(weights, start, unit.num_rows, &staged, 1, layout.padded_v, 0, out.weighted, layout.padded_v);
    }

    // A value as floats, with zeros to the end of its last vector.
    template <class T>
    void stage_value(const T* v, float* target) const {
        constexpr int per = kPerItem<T>;
        int64_t j = 0;
        for (; j + per * kLanes <= dv; j += per * kLanes) {
            for (int half = 0; half < per; ++half) store(load_half(v + j / per, half), target + j + half * kLanes);
        }
        const int rest = static_cast<int>(dv - j) / per;
        if (rest == 0) return;
        T last[kLanes] = {};
        __builtin_memcpy(last, v + j / per, rest * sizeof(T));
        for (int64_t padding = j; padding < layout.padded_v; padding += kLanes) store(Vec::zero(), target + padding);
        for (int half = 0; half < per; ++half) load_half(last, half).store_first(target + j + half * rest, rest);
    }

    // The keys of one block.
    void attend_block(const Unit& unit, int64_t block, const Partial& out) const {
        int64_t first = block * kKeyBlock, end = first + kKeyBlock;
        end = end < unit.end_key ? end : unit.end_key;
        if (first < unit.first_key) first = unit.first_key / kLanes * kLanes;
        const int num_vectors = static_cast<int>((end - first + kLanes - 1) / kLanes);
        if (is_fused && block + 1 == unit.end_block) store_token(unit);
        if (is_coded(pool.k_type)) load_ranges(unit, pool.k_scales, first, num_vectors, memory + layout.k_range);
        if (is_coded(pool.v_type)) load_ranges(unit, pool.v_scales, first, num_vectors, memory + layout.v_range);
        with_type(pool.k_type, [&](auto kept) { score<typename decltype(kept)::Item>(unit, first, num_vectors); });
        soften(unit, first, num_vectors, out);
        with_type(pool.v_type, [&](auto kept) { weigh_values<typename decltype(kept)::Item>(unit, first, end, out); });
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
            const Vec scale = Vec::all(unit_of(pool.v_type) / state.sum[i]);
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

void attention(const Attention& op, const Step& step, const Team& team) { Attend(op, step, team).run(); }

int64_t attention_bytes(const HeadShape& shape, int64_t max_context, int num_threads) {
    const Layout layout(shape);
    const int64_t blocks = (max_context + kKeyBlock - 1) / kKeyBlock;
    return 4 * num_threads * (layout.thread_floats + blocks * layout.partial_floats);
}

}  // namespace
}  // namespace turbolm
