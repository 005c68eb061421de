// bf16 weights and x, with AVX512-BF16's dot product of pairs.

#include "matmul_avx512.h"
#include "matmul_kernel.h"
#include "matmul_panel.h"
#include "rows_bf16.h"

namespace turbolm {
namespace {

__m512bh as_pairs(Bytes bytes) {
    __m512bh pairs;
    __builtin_memcpy(&pairs, &bytes, 64);
    return pairs;
}

// One or two groups times rows [rows.first, rows.first + R) of a tile, and on in steps of R.
template <int R, int groups>
void multiply_rows(const MatmulWork& work, TileRows& rows, float* y) {
    const int64_t group_bytes = Bf16Rows::group_bytes(work.k);
    for (; rows.stride - rows.first >= R; rows.first += R) {
        Sums<R> sums[groups];
#pragma GCC unroll 2
        for (Sums<R>& of_group : sums) of_group.clear();
        const uint8_t* x = rows.tile + 64 * rows.first;
        const uint8_t* w = work.packed;
        for (int64_t left = (work.k + 1) / 2; left > 0; left -= 16, x += 64 * rows.stride) {
            const int pairs = left < 16 ? static_cast<int>(left) : 16;
            for (int i = 0; i < pairs; ++i, w += 64) {
                __m512bh of_group[groups];
#pragma GCC unroll 2
                for (int group = 0; group < groups; ++group) {
                    Vector::prefetch(w + group * group_bytes + prefetch_distance);
                    of_group[group] = as_pairs(Vector::load_bytes(w + group * group_bytes));
                }
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    const auto* x_pair = reinterpret_cast<const int8_t*>(x + 64 * r + 4 * i);
                    const __m512bh pair = as_pairs(Vector::broadcast(x_pair));
#pragma GCC unroll 2
                    for (int group = 0; group < groups; ++group) {
                        Float& sum = sums[group].of[r][0];
                        sum = _mm512_dpbf16_ps(sum, of_group[group], pair);
                    }
                }
            }
        }
#pragma GCC unroll 2
        for (int group = 0; group < groups; ++group) {
            const int64_t first = group_rows * group;
            store<R>(sums[group], work.bias == nullptr ? nullptr : work.bias + first, work.columns - first,
                     y + rows.first * work.ldy + first, work.ldy);
        }
    }
}

template <int groups>
void multiply_all_rows(const MatmulWork& work) {
    for (int64_t row = 0; row < work.rows; row += tile_rows) {
        const int64_t stride = work.rows - row < tile_rows ? work.rows - row : tile_rows;
        TileRows rows{work.tiles + row * Bf16Rows::row_bytes(work.k), stride, 0};
        float* y = work.y + row * work.ldy;
        multiply_rows<8, groups>(work, rows, y);
        multiply_rows<4, groups>(work, rows, y);
        multiply_rows<2, groups>(work, rows, y);
        multiply_rows<1, groups>(work, rows, y);
    }
}

void multiply_bf16(const MatmulWork& work) {
    constexpr int64_t width = panel_groups * group_rows;
    for (int64_t column = 0; column < work.columns; column += width) {
        const int64_t left = work.columns - column;
        const MatmulWork part = part_of<Bf16Rows>(work, column, left < width ? left : width, 0, work.rows);
        part.columns > group_rows ? multiply_all_rows<2>(part) : multiply_all_rows<1>(part);
    }
}

}  // namespace

constinit const Bf16Kernels bf16_avx512 = {lay_out_bf16, multiply_bf16};

}  // namespace turbolm
