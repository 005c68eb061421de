// The two products of attention, query rows by keys and weights by values, in blocks that fit the registers.
#pragma once

#include "kernels_math.h"

namespace turbolm {
namespace {

constexpr int kKeyBlock = 128;  // keys that are attended at once
constexpr int kChunk = Vec::block_columns;  // vectors of 16 keys that are scored together

// scores[r, 16 c + lane] = q[r] · k[c][lane], summed in the order of dimensions. On the way it asks for
// memory that is read soon: `ahead`, as much as it reads of k.
template <int rows, int columns, class T>
TURBOLM_INLINE void score_block(const float* q, int64_t d, const T* const* k, int64_t k_stride, const T* const* ahead,
                                float* scores) {
    Vec total[rows][columns];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
        for (int c = 0; c < columns; ++c) total[r][c] = Vec::zero();
    }
    for (int64_t i = 0; i < d; ++i) {
        Vec key[columns];
#pragma GCC unroll 8
        for (int c = 0; c < columns; ++c) {
            key[c] = load(k[c] + i * k_stride);
            if (sizeof(T) < 4) __builtin_prefetch(ahead[c] + i * k_stride);
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            const Vec query = Vec::all(q[r * d + i]);
#pragma GCC unroll 8
            for (int c = 0; c < columns; ++c) total[r][c] = Vec::fma(query, key[c], total[r][c]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
        for (int c = 0; c < columns; ++c) store(total[r][c], scores + r * kKeyBlock + c * kLanes);
    }
}

// Neighbouring rows of V: a KV block's part of a key block.
template <class T>
struct Run {
    const T* v;
    const T* ahead;  // keys that are read soon, as many; or null
    int64_t count;
};

// weighted[r, 16 c + lane] = sum over keys of weights[r, key] * v[key], in the order of keys.
template <int rows, int columns, class T>
TURBOLM_INLINE void weigh_block(const float* weights, const Run<T>* runs, int num_runs, int64_t v_stride,
                                int64_t key_bytes, float* weighted, int64_t padded_v) {
    Vec total[rows][columns];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
        for (int c = 0; c < columns; ++c) total[r][c] = Vec::zero();
    }
    for (int run = 0; run < num_runs; ++run) {
        const T* v = runs[run].v;
        const char* ahead = reinterpret_cast<const char*>(runs[run].ahead);
        for (int64_t i = 0; i < runs[run].count; ++i, ++weights, v += v_stride) {
            if (ahead != nullptr) {
                for (int64_t byte = 0; byte < key_bytes; byte += 64) __builtin_prefetch(ahead + byte);
                ahead += key_bytes;
            }
            Vec value[columns];
#pragma GCC unroll 8
            for (int c = 0; c < columns; ++c) value[c] = load(v + c * kLanes);
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) {
                const Vec weight = Vec::all(weights[r * kKeyBlock]);
#pragma GCC unroll 8
                for (int c = 0; c < columns; ++c) total[r][c] = Vec::fma(weight, value[c], total[r][c]);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
        for (int c = 0; c < columns; ++c) store(total[r][c], weighted + r * padded_v + c * kLanes);
    }
}

template <int number>
struct Constant {
    static constexpr int value = number;
};

// Calls f with the number of rows, at most Vec::block_rows, as a constant.
template <int rows = Vec::block_rows, class F>
TURBOLM_INLINE void with_rows(int64_t wanted, const F& f) {
    if constexpr (rows > 1) {
        if (wanted < rows) return with_rows<rows - 1>(wanted, f);
    }
    f(Constant<rows>{});
}

template <class T>
__attribute__((noinline)) void score_chunk(const float* q, int64_t num_rows, int64_t d, const T* const* k,
                                           int64_t k_stride, const T* const* ahead, int num_vectors, float* scores) {
    for (int64_t row = 0; row < num_rows; row += Vec::block_rows) {
        with_rows(num_rows - row, [&](auto rows) {
            const float* block_q = q + row * d;
            float* block_scores = scores + row * kKeyBlock;
            if (num_vectors == kChunk) {
                score_block<rows.value, kChunk>(block_q, d, k, k_stride, ahead, block_scores);
            } else {
                for (int c = 0; c < num_vectors; ++c) {
                    score_block<rows.value, 1>(block_q, d, k + c, k_stride, ahead + c, block_scores + c * kLanes);
                }
            }
        });
    }
}

template <class T>
__attribute__((noinline)) void weigh(const float* weights, int64_t num_rows, const Run<T>* runs, int num_runs,
                                     int64_t v_stride, int64_t key_bytes, float* weighted, int64_t padded_v) {
    Run<T> shifted[kKeyBlock / 8 + 1];
    for (int64_t column = 0; column < padded_v;) {
        const bool is_wide = padded_v - column >= kChunk * kLanes;
        for (int i = 0; i < num_runs; ++i) {
            shifted[i] = {runs[i].v + column, column == 0 ? runs[i].ahead : nullptr, runs[i].count};
        }
        for (int64_t row = 0; row < num_rows; row += Vec::block_rows) {
            with_rows(num_rows - row, [&](auto rows) {
                const float* block_weights = weights + row * kKeyBlock;
                float* target = weighted + row * padded_v + column;
                if (is_wide) {
                    weigh_block<rows.value, kChunk>(block_weights, shifted, num_runs, v_stride, key_bytes, target,
                                                    padded_v);
                } else {
                    weigh_block<rows.value, 1>(block_weights, shifted, num_runs, v_stride, key_bytes, target, padded_v);
                }
            });
        }
        column += is_wide ? kChunk * kLanes : kLanes;
    }
}

}  // namespace
}  // namespace turbolm
