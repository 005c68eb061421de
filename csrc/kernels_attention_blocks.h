// The two products of attention, query rows by keys and weights by values, in blocks that fit the registers.
#pragma once

#include "kernels_cache.h"

namespace turbolm {
namespace {

constexpr int kKeyBlock = 128;  // keys that are attended at once
constexpr int kChunk = Vec::block_columns;  // vectors of 16 keys that are scored together

// 16 keys, by dimension.
template <class T>
struct KeyGroup {
    const T* k;
    const char* ahead;  // memory that is read soon
};

// With the items of dimension i: what is read soon, `step` bytes of it for each line of k.
template <class T>
TURBOLM_INLINE void fetch_ahead(const KeyGroup<T>& group, int64_t i, int64_t step) {
    constexpr int per_line = 64 / (kLanes * sizeof(T));
    if (sizeof(T) < 4 && i % per_line == 0) __builtin_prefetch(group.ahead + i / per_line * step);
}

// Asks for a key, if there is one; → the next one.
TURBOLM_INLINE const char* fetch_key(const char* key, int64_t key_bytes) {
    if (key == nullptr) return nullptr;
    for (int64_t byte = 0; byte < key_bytes; byte += 64) __builtin_prefetch(key + byte);
    return key + key_bytes;
}

// scores[r, 16 c + lane] = q[r] · k[c][lane], summed in the order of dimensions; those of neighbouring items
// are `stride` apart.
template <int rows, int columns, class T>
TURBOLM_INLINE void score_block(const float* q, int64_t d, const KeyGroup<T>* groups, int64_t stride,
                                int64_t ahead_step, float* scores) {
    Vec total[rows][columns];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
        for (int c = 0; c < columns; ++c) total[r][c] = Vec::zero();
    }
    for (int64_t i = 0; i < d / kPerItem<T>; ++i) {
#pragma GCC unroll 8
        for (int c = 0; c < columns; ++c) fetch_ahead(groups[c], i, ahead_step);
#pragma GCC unroll 2
        for (int half = 0; half < kPerItem<T>; ++half) {
            Vec key[columns];
#pragma GCC unroll 8
            for (int c = 0; c < columns; ++c) key[c] = load_half(groups[c].k + i * stride, half);
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) {
                const Vec query = Vec::all(q[r * d + i * kPerItem<T> + half]);
#pragma GCC unroll 8
                for (int c = 0; c < columns; ++c) total[r][c] = Vec::fma(query, key[c], total[r][c]);
            }
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
    const char* ahead;  // keys that are read soon, as many; or null
    int64_t count;
};

// weighted[r, 16 c + lane] = start[r] + sum over keys of weights[r, key] * v[key], in the order of keys.
// Of items of two numbers the first column is half `half`, the next one the other half.
template <int rows, int columns, class T>
TURBOLM_INLINE void weigh_block(const float* weights, const float* start, const Run<T>* runs, int num_runs,
                                int64_t v_stride, int half, int64_t key_bytes, float* weighted, int64_t padded_v) {
    Vec total[rows][columns];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
        for (int c = 0; c < columns; ++c) total[r][c] = Vec::all(start[r]);
    }
    for (int run = 0; run < num_runs; ++run) {
        const T* v = runs[run].v;
        const char* ahead = runs[run].ahead;
        for (int64_t i = 0; i < runs[run].count; ++i, ++weights, v += v_stride) {
            ahead = fetch_key(ahead, key_bytes);
            Vec value[columns];
#pragma GCC unroll 8
            for (int c = 0; c < columns; ++c) {
                const int part = half + c;
                value[c] = load_half(v + part / kPerItem<T> * kLanes, part % kPerItem<T>);
            }
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

// Rows of the blocks that so many rows are divided into: as even as can be.
TURBOLM_INLINE int64_t rows_of_block(int64_t num_rows) {
    const int64_t blocks = (num_rows + Vec::block_rows - 1) / Vec::block_rows;
    return (num_rows + blocks - 1) / blocks;
}

// Calls f with the number of rows, at most Vec::block_rows, as a constant.
template <int rows = Vec::block_rows, class F>
TURBOLM_INLINE void with_rows(int64_t wanted, const F& f) {
    if constexpr (rows > 1) {
        if (wanted < rows) return with_rows<rows - 1>(wanted, f);
    }
    f(Constant<rows>{});
}

template <class T>
__attribute__((noinline)) void score_chunk(const float* q, int64_t num_rows, int64_t d, const KeyGroup<T>* groups,
                                           int64_t stride, int64_t ahead_step, int num_groups, float* scores) {
    const int64_t block_rows = rows_of_block(num_rows);
    for (int64_t row = 0; row < num_rows; row += block_rows) {
        with_rows(num_rows - row < block_rows ? num_rows - row : block_rows, [&](auto rows) {
            const float* block_q = q + row * d;
            float* block_scores = scores + row * kKeyBlock;
            if (num_groups == kChunk) {
                score_block<rows.value, kChunk>(block_q, d, groups, stride, ahead_step, block_scores);
            } else {
                for (int c = 0; c < num_groups; ++c) {
                    score_block<rows.value, 1>(block_q, d, groups + c, stride, ahead_step, block_scores + c * kLanes);
                }
            }
        });
    }
}

template <class T>
__attribute__((noinline)) void weigh(const float* weights, const float* start, int64_t num_rows, const Run<T>* runs,
                                     int num_runs, int64_t v_stride, int64_t key_bytes, float* weighted,
                                     int64_t padded_v) {
    const int64_t block_rows = rows_of_block(num_rows);
    Run<T> shifted[kKeyBlock / 8 + 1];
    for (int64_t column = 0; column < padded_v;) {
        const bool is_wide = padded_v - column >= kChunk * kLanes;
        const int64_t number = column / kLanes;
        const int half = static_cast<int>(number % kPerItem<T>);
        for (int i = 0; i < num_runs; ++i) {
            const T* v = runs[i].v + number / kPerItem<T> * kLanes;
            shifted[i] = {v, column == 0 ? runs[i].ahead : nullptr, runs[i].count};
        }
        for (int64_t row = 0; row < num_rows; row += block_rows) {
            with_rows(num_rows - row < block_rows ? num_rows - row : block_rows, [&](auto rows) {
                const auto block = [&](auto columns, int first_half) {
                    weigh_block<rows.value, columns.value>(weights + row * kKeyBlock, start + row, shifted, num_runs,
                                                           v_stride, first_half, key_bytes,
                                                           weighted + row * padded_v + column, padded_v);
                };
                if (kChunk > 1 && is_wide) return block(Constant<kChunk>{}, 0);
                if (half == 0) return block(Constant<1>{}, 0);
                if constexpr (kPerItem<T> == 2) block(Constant<1>{}, 1);
            });
        }
        column += is_wide ? kChunk * kLanes : kLanes;
    }
}

}  // namespace
}  // namespace turbolm
