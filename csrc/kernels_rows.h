// Kernels that work on rows and elements: norms, sums, activations, rotation and KV store.
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

TURBOLM_INLINE void add_range(const float* x, float* residual, int64_t count) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(load(residual + i) + load(x + i), residual + i);
    if (i < count) {
        const int rest = static_cast<int>(count - i);
        (Vec::load_first(residual + i, rest) + Vec::load_first(x + i, rest)).store_first(residual + i, rest);
    }
}

void rms_norm(const RmsNorm& op, const Step& step, const Team& team) {
    int64_t first, last;
    share(team, step.num_tokens, 1, &first, &last);
    for (int64_t row = first; row < last; ++row) {
        const float* x = op.x + row * op.width;
        if (op.residual != nullptr) {
            float* residual = op.residual + row * op.width;
            add_range(x, residual, op.width);
            x = residual;
        }
        normalize_row(x, op.weight, op.y + row * op.width, op.width, op.eps);
    }
}

void add(const Add& op, const Step& step, const Team& team) {
    int64_t first, last;
    share(team, step.num_tokens * op.width, 64, &first, &last);
    add_range(op.x + first, op.residual + first, last - first);
}

template <class F>
void activate_rows(const ActivateMultiply& op, const Step& step, const Team& team) {
    // Few rows: every thread does some columns of each; so the result is where the next op's thread is.
    const bool by_rows = step.num_tokens >= team.num_threads;
    int64_t first_row = 0, last_row = step.num_tokens, first = 0, last = op.width;
    if (by_rows) {
        share(team, step.num_tokens, 1, &first_row, &last_row);
    } else {
        share(team, op.width, 64, &first, &last);
    }
    for (int64_t row = first_row; row < last_row; ++row) {
        const float *gate = op.gate_up + row * 2 * op.width, *up = gate + op.width;
        float* y = op.y + row * op.width;
        int64_t i = first;
        for (; i + kLanes <= last; i += kLanes) store(F::apply(load(gate + i)) * load(up + i), y + i);
        if (i < last) {
            const int rest = static_cast<int>(last - i);
            (F::apply(Vec::load_first(gate + i, rest)) * Vec::load_first(up + i, rest)).store_first(y + i, rest);
        }
    }
}

void activate_multiply(const ActivateMultiply& op, const Step& step, const Team& team) {
    switch (op.activation) {
        case ActivationKind::silu: return activate_rows<Silu>(op, step, team);
        case ActivationKind::gelu: return activate_rows<Gelu>(op, step, team);
        case ActivationKind::gelu_tanh: return activate_rows<GeluTanh>(op, step, team);
    }
}

void softcap(const Softcap& op, const Step& step, const Team& team) {
    int64_t first, last;
    share(team, step.num_logits * op.width, 64, &first, &last);
    float* x = step.logits;
    int64_t i = first;
    for (; i + kLanes <= last; i += kLanes) store(cap(load(x + i), op.cap), x + i);
    if (i < last) {
        const int rest = static_cast<int>(last - i);
        cap(Vec::load_first(x + i, rest), op.cap).store_first(x + i, rest);
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

template <class T>
void rotary_store_as(const RotaryStore& op, const Step& step, const Team& team) {
    const HeadShape& shape = op.shape;
    const int64_t heads = shape.num_heads, kv_heads = shape.num_kv_heads, d = shape.head_dim, dv = shape.v_head_dim;
    const int64_t width = (heads + kv_heads) * d + kv_heads * dv;
    const int64_t block_size = op.pool.block_size, group = block_size < kLanes ? block_size : kLanes;
    const int64_t units = heads + 2 * kv_heads;  // per token: q heads, k heads, v heads
    const int half = op.rotary_dim / 2;
    int64_t first, last;
    share(team, step.num_tokens * units, 1, &first, &last);
    int64_t token = first / units, unit = first % units;
    for (int64_t i = first; i < last; ++i) {
        float* row = op.qkv + token * width;
        const int64_t block = step.slots[token] / block_size, offset = step.slots[token] % block_size;
        if (unit < heads + kv_heads) {
            float* head = row + unit * d;
            const float* norm = unit < heads ? op.q_norm : op.k_norm;
            if (norm != nullptr) normalize_row(head, norm, head, d, op.eps);
            const int64_t angles = static_cast<int64_t>(step.positions[token]) * half;
            if (op.cos != nullptr) rotate_head(head, op.cos + angles, op.sin + angles, half, op.is_interleaved != 0);
            if (unit >= heads) {
                T* target = static_cast<T*>(op.pool.k) + (block * kv_heads + unit - heads) * block_size * d;
                store_strided(head, static_cast<int>(d), target + offset / group * group * d + offset % group, group);
            }
        } else {
            const int64_t kv_head = unit - heads - kv_heads;
            T* target = static_cast<T*>(op.pool.v) + ((block * kv_heads + kv_head) * block_size + offset) * dv;
            store_row(row + (heads + kv_heads) * d + kv_head * dv, static_cast<int>(dv), target);
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

// Largest of n numbers in *top, any NaN in *is_nan.
TURBOLM_INLINE void scan_chunk(const float* x, int64_t n, float* top, bool* is_nan) {
    Vec best = Vec::all(-kInfinity), check = Vec::zero();
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        const Vec v = load(x + i);
        best = Vec::max(v, best);
        check = Vec::fma(v, Vec::zero(), check);  // NaN from NaN, but from infinities too
    }
    *top = largest(best);
    const bool is_odd = !(sum(check) == 0.0f);
    for (int64_t j = is_odd ? 0 : i; j < n; ++j) {
        *top = x[j] > *top ? x[j] : *top;
        *is_nan |= x[j] != x[j];
    }
}

int64_t argmax(const float* x, int64_t n) {
    constexpr int64_t chunk = 1024;
    int64_t best = -1;
    float top = -kInfinity;
    bool is_nan = false;
    for (int64_t begin = 0; begin < n; begin += chunk) {
        float chunk_top;
        scan_chunk(x + begin, n - begin < chunk ? n - begin : chunk, &chunk_top, &is_nan);
        if (chunk_top > top) {
            top = chunk_top;
            best = begin;
        }
    }
    if (best < 0 || is_nan) return -1;
    while (x[best] != top) ++best;
    return best;
}

void exponentials(const float* x, int64_t n, float top, float inverse_temperature, float* p, double* sums) {
    constexpr int64_t chunk = 1024;
    const Vec shift = Vec::all(top), factor = Vec::all(inverse_temperature);
    for (int64_t begin = 0; begin < n; begin += chunk) {
        const int64_t end = begin + chunk < n ? begin + chunk : n;
        Vec total = Vec::zero();
        int64_t i = begin;
        for (; i + kLanes <= end; i += kLanes) {
            const Vec e = exp((load(x + i) - shift) * factor);
            store(e, p + i);
            total = total + e;
        }
        double rest = 0.0;
        if (i < end) {
            const int count = static_cast<int>(end - i);
            exp((Vec::load_first(x + i, count) - shift) * factor).store_first(p + i, count);
            for (; i < end; ++i) rest += p[i];
        }
        sums[begin / chunk] = sum(total) + rest;
    }
}

}  // namespace
}  // namespace turbolm
