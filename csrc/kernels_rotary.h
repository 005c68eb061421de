// From the qkv projection to attention: norms and rotation of heads, and the store of keys and values.
#pragma once

#include "kernels_math.h"
#include "ops.h"

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

// One token's k into the pool: dimension i goes to target[i * group].
template <class T>
TURBOLM_INLINE void store_strided(const float* x, int count, T* target, int64_t group) {
    for (int i = 0; i < count; i += kLanes) {
        const int rest = count - i < kLanes ? count - i : kLanes;
        T buffer[kLanes];
        store(Vec::load_first(x + i, rest), buffer);
        for (int j = 0; j < rest; ++j) target[(i + j) * group] = buffer[j];
    }
}

template <class T>
TURBOLM_INLINE void store_row(const float* x, int count, T* target) {
    int i = 0;
    for (; i + kLanes <= count; i += kLanes) store(load(x + i), target + i);
    if (i < count) store_strided(x + i, count - i, target + i, 1);
}

// One token's row of qkv: where its parts are, what is done to them, and where they go.
template <class T>
struct TokenRow {
    const RotaryStore& op;
    const int64_t d = op.shape.head_dim, dv = op.shape.v_head_dim;
    const int64_t num_heads = op.shape.num_heads, num_kv_heads = op.shape.num_kv_heads;
    const int64_t width = (num_heads + num_kv_heads) * d + num_kv_heads * dv;

    // Norm and rotation of a head of q or k, in place.
    TURBOLM_INLINE void turn(float* head, const float* norm, int64_t position) const {
        const int half = op.rotary_dim / 2;
        if (norm != nullptr) normalize_row(head, norm, head, d, op.eps);
        if (op.cos == nullptr) return;
        rotate_head(head, op.cos + position * half, op.sin + position * half, half, op.is_interleaved != 0);
    }

    TURBOLM_INLINE void store_key(const float* key, int64_t kv_head, int64_t slot) const {
        const int64_t block_size = op.pool.block_size, group = block_size < kLanes ? block_size : kLanes;
        const int64_t offset = slot % block_size;
        T* target = static_cast<T*>(op.pool.k) + (slot / block_size * num_kv_heads + kv_head) * block_size * d;
        store_strided(key, static_cast<int>(d), target + offset / group * group * d + offset % group, group);
    }

    TURBOLM_INLINE void store_value(const float* value, int64_t kv_head, int64_t slot) const {
        const int64_t block_size = op.pool.block_size;
        const int64_t row = (slot / block_size * num_kv_heads + kv_head) * block_size + slot % block_size;
        store_row(value, static_cast<int>(dv), static_cast<T*>(op.pool.v) + row * dv);
    }
};

template <class T>
void rotary_store_as(const RotaryStore& op, const Step& step, const Team& team) {
    const TokenRow<T> rows{op};
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

void rotary_store(const RotaryStore& op, const Step& step, const Team& team) {
    switch (op.pool.type) {
        case CacheType::f32: return rotary_store_as<float>(op, step, team);
        case CacheType::f16: return rotary_store_as<F16>(op, step, team);
        case CacheType::bf16: return rotary_store_as<Bf16>(op, step, team);
    }
}

}  // namespace
}  // namespace turbolm
