// From the qkv projection to attention: norms and rotation of heads, and the store of keys and values.
#pragma once

#include "kernels_cache.h"

namespace turbolm {
namespace {

// y = x / sqrt(mean(x²) + eps) * weight; x and y may be the same.
TURBOLM_INLINE void normalize_row(const float* x, const float* weight, float* y, int64_t width, float eps) {
    Vec even = Vec::zero(), odd = Vec::zero();
    int64_t i = 0;
    for (; i + 2 * kLanes <= width; i += 2 * kLanes) {
        const Vec a = load(x + i), b = load(x + i + kLanes);
        even = Vec::fma(a, a, even);
        odd = Vec::fma(b, b, odd);
    }
    for (; i < width; i += kLanes) {
        const Vec a = Vec::load_first(x + i, width - i < kLanes ? static_cast<int>(width - i) : kLanes);
        even = Vec::fma(a, a, even);
    }
    const Vec scale = Vec::all(1.0f / __builtin_sqrtf(sum(even + odd) / static_cast<float>(width) + eps));
    for (i = 0; i + kLanes <= width; i += kLanes) store(load(x + i) * scale * load(weight + i), y + i);
    if (i < width) {
        const int rest = static_cast<int>(width - i);
        (Vec::load_first(x + i, rest) * scale * Vec::load_first(weight + i, rest)).store_first(y + i, rest);
    }
}

// Rotates the pairs (i, i + half) of the head, or (2 i, 2 i + 1) where interleaved.
TURBOLM_INLINE void rotate_head(float* x, const float* cos, const float* sin, int half, bool is_interleaved) {
    if (is_interleaved) {
        for (int i = 0; i < half; ++i) {
            const float a = x[2 * i], b = x[2 * i + 1];
            x[2 * i] = a * cos[i] - b * sin[i];
            x[2 * i + 1] = b * cos[i] + a * sin[i];
        }
        return;
    }
    for (int i = 0; i < half; i += kLanes) {
        const int count = half - i < kLanes ? half - i : kLanes;
        const Vec a = Vec::load_first(x + i, count), b = Vec::load_first(x + half + i, count);
        const Vec c = Vec::load_first(cos + i, count), s = Vec::load_first(sin + i, count);
        (a * c - b * s).store_first(x + i, count);
        (b * c + a * s).store_first(x + half + i, count);
    }
}

// A head of one token into the pool: item i goes to target[i * stride].
template <class T>
TURBOLM_INLINE void store_items(const float* x, int count, const Range& range, bool, T* target, int64_t stride) {
    for (int i = 0; i < count; i += kLanes) {
        const int rest = count - i < kLanes ? count - i : kLanes;
        T items[kLanes];
        pack_items(x + i, rest, range, items);
        for (int j = 0; j < rest; ++j) target[(i + j) * stride] = items[j];
    }
}

// The pairs are neighbours, or the halves of each 32 numbers.
TURBOLM_INLINE void store_items(const float* x, int count, const Range& range, bool are_neighbours, Int4* target,
                                int64_t stride) {
    for (int i = 0; i < count; i += 2 * kLanes) {
        const int pairs = (count - i < 2 * kLanes ? count - i : 2 * kLanes) / 2;
        const int step = are_neighbours ? 2 : 1, apart = are_neighbours ? 1 : pairs;
        float first[kLanes], second[kLanes];
        for (int j = 0; j < pairs; ++j) {
            first[j] = x[i + j * step];
            second[j] = x[i + j * step + apart];
        }
        Int4 items[kLanes];
        pack_pairs(first, second, pairs, range, items);
        for (int j = 0; j < pairs; ++j) target[(i / 2 + j) * stride] = items[j];
    }
}

// One token's row of qkv: where its parts are, what is done to them, and where they go.
struct TokenRow {
    const RotaryStore& op;
    const int64_t d = op.shape.head_dim, dv = op.shape.v_head_dim;
    const int64_t num_heads = op.shape.num_heads, num_kv_heads = op.shape.num_kv_heads;
    const int64_t width = (num_heads + num_kv_heads) * d + num_kv_heads * dv;
    const int64_t group = op.pool.block_size < kLanes ? op.pool.block_size : kLanes;  // of tokens, in k

    // Norm and rotation of a head of q or k, in place.
    TURBOLM_INLINE void turn(float* head, const float* norm, int64_t position) const {
        const int half = op.rotary_dim / 2;
        if (norm != nullptr) normalize_row(head, norm, head, d, op.eps);
        if (op.cos == nullptr) return;
        rotate_head(head, op.cos + position * half, op.sin + position * half, half, op.is_interleaved != 0);
    }

    TURBOLM_INLINE void store_key(const float* key, int64_t kv_head, int64_t slot) const {
        const int64_t token = token_at(kv_head, slot), lane = slot % group;
        with_type(op.pool.k_type, [&](auto kept) {
            using T = typename decltype(kept)::Item;
            const Range range = choose_range(key, d, op.pool.k_type, op.pool.k_scales, op.pool.k_range, token);
            T* target = static_cast<T*>(op.pool.k) + (token - lane) * (d / kPerItem<T>) + lane;
            store_items(key, static_cast<int>(d), range, true, target, group);
        });
    }

    TURBOLM_INLINE void store_value(const float* value, int64_t kv_head, int64_t slot) const {
        const int64_t token = token_at(kv_head, slot);
        with_type(op.pool.v_type, [&](auto kept) {
            using T = typename decltype(kept)::Item;
            const Range range = choose_range(value, dv, op.pool.v_type, op.pool.v_scales, op.pool.v_range, token);
            T* target = static_cast<T*>(op.pool.v) + token * (dv / kPerItem<T>);
            store_items(value, static_cast<int>(dv), range, false, target, 1);
        });
    }

  private:
    // Its number among all tokens of all blocks and heads.
    TURBOLM_INLINE int64_t token_at(int64_t kv_head, int64_t slot) const {
        const int64_t block_size = op.pool.block_size;
        return (slot / block_size * num_kv_heads + kv_head) * block_size + slot % block_size;
    }

    // The range of the token's codes, its head's where these are `fixed`, which it stores; floats need none.
    TURBOLM_INLINE Range choose_range(const float* x, int64_t count, CacheType type, uint16_t* scales,
                                      const uint16_t* fixed, int64_t token) const {
        if (!is_coded(type)) return {};
        const int64_t kv_head = token / op.pool.block_size % num_kv_heads;
        const Range range = fixed == nullptr ? range_of(x, static_cast<int>(count), highest_code(type))
                                             : read_range(fixed + 2 * kv_head, highest_code(type));
        const int64_t lane = token % group;
        F16 rounded[2][kLanes];
        store(Vec::all(range.scale), rounded[0]);
        store(Vec::all(range.minimum), rounded[1]);
        scales[2 * (token - lane) + lane] = rounded[0]->bits;
        scales[2 * (token - lane) + group + lane] = rounded[1]->bits;
        return range;
    }
};

void rotary_store(const RotaryStore& op, const Step& step, const Team& team) {
    const TokenRow rows{op};
    const int64_t heads = rows.num_heads, kv_heads = rows.num_kv_heads;
    const int64_t units = heads + 2 * kv_heads;  // per token: q heads, k heads, v heads
    int64_t first, last;
    share(team, step.num_tokens * units, 1, &first, &last);
    int64_t token = first / units, unit = first % units;
    for (int64_t i = first; i < last; ++i) {
        float* row = op.qkv + token * rows.width;
        if (unit < heads + kv_heads) {
            float* head = row + unit * rows.d;
            rows.turn(head, unit < heads ? op.q_norm : op.k_norm, step.positions[token]);
            if (unit >= heads) rows.store_key(head, unit - heads, step.slots[token]);
        } else {
            const int64_t kv_head = unit - heads - kv_heads;
            rows.store_value(row + (heads + kv_heads) * rows.d + kv_head * rows.dv, kv_head, step.slots[token]);
        }
        if (++unit == units) {
            unit = 0;
            ++token;
        }
    }
}

}  // namespace
}  // namespace turbolm
