// Many rows of x: two groups of columns at a time, over weights that were unpacked once.
//
// The kernel for few rows (matmul_kernel.h) unpacks weights into registers and reads x from memory
// for every dot product. From some rows on it is faster to unpack a stretch of two groups into the
// first-level cache, and to keep the integer sums of 8 rows × 32 columns in registers: a broadcast of
// x serves two dot products and a register of weights eight. The float sums then live in memory; each
// is read and written once per block of 32. The arithmetic is the same, operation by operation.
#pragma once

namespace turbolm {
namespace {

constexpr int64_t min_panel_rows = 8;  // measured
constexpr int panel_groups = 2;
constexpr int panel_blocks = 8;   // of 32 values of k: what is unpacked at once
constexpr int panel_rows = 64;    // that use it

// Whether this kernel is faster for a format.
template <class Kernel>
constexpr bool has_panels = true;
template <class Format>
constexpr bool has_panels<Quantized<Format>> = Format::largest >= Vector::min_panel_byte;

template <int num_rows>
struct Panel {
    Unpacked weights[panel_blocks][panel_groups];
    Float sums[num_rows][panel_groups];
};

template <int R>
TURBOLM_INLINE void store_pair(const Float (*sums)[panel_groups], const float* bias, int64_t columns, float* y,
                               int64_t ldy) {
#pragma GCC unroll 2
    for (int i = 0; i < panel_groups; ++i) {
        Sums<R> of_group;
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) of_group.of[r][0] = sums[r][i];
        const int64_t first = group_rows * i;
        store<R>(of_group, bias == nullptr ? nullptr : bias + first, columns - first, y + first, ldy);
    }
}

// Adds to the sums of R rows one block of both groups.
template <class Format, int R>
TURBOLM_INLINE void multiply_blocks(const Unpacked* w, const uint8_t* block, const TileRows& rows,
                              Float (*sums)[panel_groups]) {
    const int64_t stride = rows.stride;
    const int8_t* x = reinterpret_cast<const int8_t*>(block) + 32 * rows.first;
    const float* scale = reinterpret_cast<const float*>(block + 32 * stride) + rows.first;
    const int32_t* zeros = reinterpret_cast<const int32_t*>(scale + 2 * stride);
    constexpr int halves = Format::has_halves ? 2 : 1;
    constexpr int quads = 8 / halves;  // in an integer sum
    Int dots[R][panel_groups][halves];
#pragma GCC unroll 2
    for (int half = 0; half < halves; ++half) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const int32_t* zero = zeros + (halves == 2 ? (1 + half) * stride : 0) + r;
            dots[r][0][half] = dots[r][1][half] = Vector::start<Format::zero>(zero);
        }
#pragma GCC unroll 8
        for (int j = half * quads; j < (half + 1) * quads; ++j) {
            const Bytes left = w[0].quads[j], right = w[1].quads[j];
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const Bytes quad = Vector::broadcast(x + 32 * r + 4 * j);
                dots[r][0][half] = Vector::dot_quads<Format::largest>(dots[r][0][half], left, quad);
                dots[r][1][half] = Vector::dot_quads<Format::largest>(dots[r][1][half], right, quad);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
        for (int group = 0; group < panel_groups; ++group) {
            sums[r][group] = add_block<Format>(sums[r][group], dots[r][group], w[group], scale + r, stride);
        }
    }
}

// Adds to the sums of a tile the unpacked blocks; x is the tile's first of these blocks.
template <class Format, int R>
TURBOLM_INLINE void add_rows(const Unpacked (*weights)[panel_groups], int blocks, const uint8_t* x, TileRows& rows,
                             Float (*sums)[panel_groups]) {
    for (; rows.stride - rows.first >= R; rows.first += R) {
        const uint8_t* at = x;
        for (int block = 0; block < blocks; ++block) {
            const uint8_t* next = at + quantized_block_bytes * rows.stride;
            for (int64_t line = 0; line < 32 * R; line += 64) Vector::prefetch(next + 32 * rows.first + line);
            for (int64_t line = 0; line < 256; line += 64) Vector::prefetch(next + 32 * rows.stride + line);
            multiply_blocks<Format, R>(weights[block], at, rows, sums + rows.first);
            at = next;
        }
    }
}

// Up to panel_blocks blocks of `groups` groups from first_block on; returns how many.
template <class Format>
int unpack_groups(const uint8_t* group, int groups, int64_t k, int64_t first_block,
                  Unpacked (*weights)[panel_groups]) {
    const int64_t num_blocks = k / 32, group_bytes = Quantized<Format>::group_bytes(k);
    const int64_t left = num_blocks - first_block;
    const int count = left < panel_blocks ? static_cast<int>(left) : panel_blocks;
    constexpr int64_t whole_bytes = Format::header_bytes + Format::sub_blocks * Format::sub_bytes;
    for (int i = 0; i < groups; ++i) {
        const uint8_t* w = group + i * group_bytes + first_block / Format::sub_blocks * whole_bytes;
        Header header = Format::header(w, 0);
        w += Format::header_bytes;
        for (int block = 0; block < count; ++block, w += Format::sub_bytes) {
            for (int line = 0; line < Format::sub_bytes; line += 64) Vector::prefetch(w + prefetch_distance + line);
            Format::load(w, 0, header, weights[block][i]);
        }
    }
    return count;
}

// The whole work: two groups, the second perhaps partial, and at most panel_rows rows.
template <class Format>
void multiply_panel(Quantized<Format> kernel, const MatmulWork& work) {
    static_assert(panel_blocks % Format::sub_blocks == 0);
    Panel<panel_rows> panel;
    for (int64_t row = 0; row < work.rows; ++row) panel.sums[row][0] = panel.sums[row][1] = Vector::zero();
    const int64_t num_blocks = work.k / 32;
    for (int64_t block = 0; block < num_blocks; block += panel_blocks) {
        const int count = unpack_groups<Format>(work.packed, panel_groups, work.k, block, panel.weights);
        for (int64_t row = 0; row < work.rows; row += tile_rows) {
            const int64_t stride = work.rows - row < tile_rows ? work.rows - row : tile_rows;
            const uint8_t* tile = work.tiles + row * kernel.row_bytes(work.k);
            const uint8_t* x = tile + block * quantized_block_bytes * stride;
            TileRows rows{tile, stride, 0};
            if constexpr (!Format::has_halves) add_rows<Format, 8>(panel.weights, count, x, rows, panel.sums + row);
            add_rows<Format, 4>(panel.weights, count, x, rows, panel.sums + row);
            add_rows<Format, 2>(panel.weights, count, x, rows, panel.sums + row);
            add_rows<Format, 1>(panel.weights, count, x, rows, panel.sums + row);
        }
    }
    for (int64_t row = 0; row < work.rows; ++row) {
        store_pair<1>(panel.sums + row, work.bias, work.columns, work.y + row * work.ldy, 0);
    }
}

// Two dense groups times the rows of a tile from rows.first on, R at a time.
template <class Format, int R>
TURBOLM_INLINE void multiply_rows(const MatmulWork& work, TileRows& rows, float* y) {
    const int64_t group_bytes = Dense<Format>::group_bytes(work.k);
    for (; rows.stride - rows.first >= R; rows.first += R) {
        Float sums[R][panel_groups];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = Vector::zero();
        const float* x = reinterpret_cast<const float*>(rows.tile) + rows.first;
        const uint8_t* w = work.packed;
        for (int64_t left = work.k; left > 0; left -= Format::step, w += Format::block_bytes) {
            Float values[panel_groups][Format::step];
            Format::load(w, 0, values[0]);
            Format::load(w + group_bytes, 0, values[1]);
#pragma GCC unroll 2
            for (int i = 0; i < Format::step; ++i, x += rows.stride) {
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    const Float x_value = Vector::set(x[r]);
                    sums[r][0] = Vector::fma(values[0][i], x_value, sums[r][0]);
                    sums[r][1] = Vector::fma(values[1][i], x_value, sums[r][1]);
                }
            }
        }
        store_pair<R>(sums, work.bias, work.columns, y + rows.first * work.ldy, work.ldy);
    }
}

template <class Format>
void multiply_panel(Dense<Format> kernel, const MatmulWork& work) {
    for (int64_t row = 0; row < work.rows; row += tile_rows) {
        const int64_t stride = work.rows - row < tile_rows ? work.rows - row : tile_rows;
        TileRows rows{work.tiles + row * kernel.row_bytes(work.k), stride, 0};
        float* y = work.y + row * work.ldy;
        multiply_rows<Format, 8>(work, rows, y);
        multiply_rows<Format, 4>(work, rows, y);
        multiply_rows<Format, 2>(work, rows, y);
        multiply_rows<Format, 1>(work, rows, y);
    }
}

}  // namespace
}  // namespace turbolm
