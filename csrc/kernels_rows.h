// Kernels that work on rows and elements: norms, sums, activations, and what sampling needs.
#pragma once

#include "kernels_rotary.h"
#include "ops.h"

namespace turbolm {
namespace {

TURBOLM_INLINE void add_range(const float* x, float* residual, int64_t count) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(load(residual + i) + load(x + i), residual + i);
    if (i < count) {
        const int rest = static_cast<int>(count - i);
        (Vec::load_first(residual + i, rest) + Vec::load_first(x + i, rest)).store_first(residual + i, rest);
    }
}

void rms_norm(const RmsNorm& op, const Step& step, const Team& team) {
    const Rows rows = rows_of(op.head, step, step.num_tokens, team);
    for (int64_t row = rows.first; row < rows.last; ++row) {
        const float* x = op.x + (row + rows.from) * op.width;
        if (op.residual != nullptr) {
            float* residual = op.residual + (row + rows.to) * op.width;
            add_range(x, residual, op.width);
            x = residual;
        }
        normalize_row(x, op.weight, op.y + (row + rows.to) * op.width, op.width, op.eps);
    }
}

void add(const Add& op, const Step& step, const Team& team) {
    if (is_lone(step) && (op.head.flags & (kOwnInput | kOwnOutput)) != 0) {
        const Rows rows = rows_of(op.head, step, 1, team);
        if (rows.first < rows.last) add_range(op.x + rows.from * op.width, op.residual + rows.to * op.width, op.width);
        return;
    }
    int64_t first, last;
    share(team, step.num_tokens * op.width, 64, &first, &last);
    add_range(op.x + first, op.residual + first, last - first);
}

template <class F>
void activate_rows(const ActivateMultiply& op, const Step& step, const Team& team) {
    // Few rows: every thread does some columns of each; so the result is where the next op's thread is.
    const bool is_own = is_lone(step) && (op.head.flags & kOwnOutput) != 0;
    const bool by_rows = is_own || step.num_tokens >= team.num_threads;
    Rows rows = rows_of(op.head, step, step.num_tokens, team);
    int64_t first = 0, last = op.width;
    if (!by_rows) {
        rows.first = 0;
        rows.last = step.num_tokens;
        share(team, op.width, 64, &first, &last);
    }
    for (int64_t row = rows.first; row < rows.last; ++row) {
        const float *gate = op.gate_up + (row + rows.from) * 2 * op.width, *up = gate + op.width;
        float* y = op.y + (row + rows.to) * op.width;
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
