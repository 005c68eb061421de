// Products on the tile registers of AMX.
//
// Quantized weights: as matmul_panel.h has it, weights are unpacked once for many rows, here to signed
// bytes. A tile product gives the exact integer sums of 16 rows × 16 columns over one block of 32 (or over
// its halves), and vectors add them to the float sums, by the function that all other kernels use. Tiles
// work on the next block while vectors work on this one.
//
// bf16 weights are tiles as they are packed; sums stay in tiles from the first value of k to the last.

#include "tiles_amx.h"

#include "matmul_avx512.h"
#include "matmul_kernel.h"
#include "matmul_panel.h"
#include "rows_bf16.h"

namespace turbolm {
namespace {

constexpr int panel_tiles = 8;  // of rows, for which weights are unpacked once

using TilePanel = Panel<panel_tiles * tile_rows>;
using Products = Int[tile_rows];

// --- quantized weights ---

template <class Format>
void configure_quantized(int rows) {
    constexpr int values = Format::has_halves ? 16 : 32;
    const TileShapes::Shape sum{rows, 64}, x{rows, values}, w{values / 4, 64};
    configure_tiles({{sum, sum, x, x, w, w, sum, sum}});
}

// Integer sums of one block of a tile of x, for each half of it where the format has halves.
template <class Format>
TURBOLM_INLINE void multiply_tile_block(const Unpacked& w, const uint8_t* x, Products* products) {
    zero_tile<0>();
    load_tile<4>(w.quads, 64);
    load_tile<2>(x, 32);
    dot_int8<0, 2, 4>();
    store_tile<0>(products[0], 64);
    if constexpr (Format::has_halves) {
        zero_tile<1>();
        load_tile<5>(w.quads + 4, 64);
        load_tile<3>(x + 16, 32);
        dot_int8<1, 3, 5>();
        store_tile<1>(products[1], 64);
    }
}

// Adds to the sums of a tile some blocks of one group; x is the tile's first of these blocks. Of `all` 16
// rows the sums stay in registers.
template <class Format, bool all>
TURBOLM_INLINE void add_tile(const TilePanel& panel, int group, int blocks, const uint8_t* x, int rows,
                             Float (*sums)[panel_groups]) {
    constexpr int halves = Format::has_halves ? 2 : 1;
    const int64_t stride = all ? tile_rows : rows;
    alignas(64) Products products[2][halves];
    Float kept[tile_rows];
    if constexpr (all) {
#pragma GCC unroll 16
        for (int r = 0; r < tile_rows; ++r) kept[r] = sums[r][group];
    }
    multiply_tile_block<Format>(panel.weights[0][group], x, products[0]);
    for (int block = 0; block < blocks; ++block) {
        const uint8_t* next = x + quantized_block_bytes * stride;
        if (block + 1 < blocks) {
            multiply_tile_block<Format>(panel.weights[block + 1][group], next, products[(block + 1) % 2]);
        }
        const Unpacked& w = panel.weights[block][group];
        const float* scale = reinterpret_cast<const float*>(x + 32 * stride);
        const Products* of_block = products[block % 2];
        const auto add = [&](Float sum, int r) __attribute__((always_inline)) {
            Int dots[halves];
            for (int half = 0; half < halves; ++half) dots[half] = of_block[half][r];
            return add_block<Format>(sum, dots, w, scale + r, stride);
        };
        if constexpr (all) {
#pragma GCC unroll 16
            for (int r = 0; r < tile_rows; ++r) kept[r] = add(kept[r], r);
        } else {
            for (int r = 0; r < rows; ++r) sums[r][group] = add(sums[r][group], r);
        }
        x = next;
    }
    if constexpr (all) {
#pragma GCC unroll 16
        for (int r = 0; r < tile_rows; ++r) sums[r][group] = kept[r];
    }
}

// Bytes less the zero point: int8.
template <class Format>
void make_signed(TilePanel& panel, int blocks, int groups) {
    if constexpr (Format::zero == 0) return;
    const __m512i zero = _mm512_set1_epi8(static_cast<char>(Format::zero));
    for (int block = 0; block < blocks; ++block) {
        for (int group = 0; group < groups; ++group) {
            for (Bytes& quad : panel.weights[block][group].quads) quad = _mm512_sub_epi8(quad, zero);
        }
    }
}

void store_sums(const Float (*sums)[panel_groups], const MatmulWork& work, int groups) {
    for (int64_t row = 0; row < work.rows; ++row) {
        for (int group = 0; group < groups; ++group) {
            const int64_t first = group_rows * group;
            Sums<1> of_group;
            of_group.of[0][0] = sums[row][group];
            store<1>(of_group, work.bias == nullptr ? nullptr : work.bias + first, work.columns - first,
                     work.y + row * work.ldy + first, 0);
        }
    }
}

// The whole work: up to two groups and panel_tiles tiles.
template <class Format>
void multiply_tile_panel(const MatmulWork& work) {
    TilePanel panel;
    const int groups = work.columns > group_rows ? 2 : 1;
    const int64_t whole = work.rows / tile_rows * tile_rows;
    const int rest = static_cast<int>(work.rows - whole);
    for (int64_t row = 0; row < work.rows; ++row) panel.sums[row][0] = panel.sums[row][1] = Vector::zero();
    for (int64_t block = 0; block < work.k / 32; block += panel_blocks) {
        const int count = unpack_groups<Format>(work.packed, groups, work.k, block, panel.weights);
        make_signed<Format>(panel, count, groups);
        const uint8_t* x = work.tiles + block * quantized_block_bytes * tile_rows;
        if (whole > 0) configure_quantized<Format>(tile_rows);
        for (int64_t row = 0; row < whole; row += tile_rows, x += quantized_row_bytes(work.k) * tile_rows) {
            for (int group = 0; group < groups; ++group) {
                add_tile<Format, true>(panel, group, count, x, tile_rows, panel.sums + row);
            }
        }
        if (rest == 0) continue;
        configure_quantized<Format>(rest);
        x = work.tiles + quantized_row_bytes(work.k) * whole + block * quantized_block_bytes * rest;
        for (int group = 0; group < groups; ++group) {
            add_tile<Format, false>(panel, group, count, x, rest, panel.sums + whole);
        }
    }
    store_sums(panel.sums, work, groups);
}

template <class Format>
void multiply_quantized(const MatmulWork& work) {
    constexpr int64_t width = panel_groups * group_rows, height = panel_tiles * tile_rows;
    for (int64_t column = 0; column < work.columns; column += width) {
        const int64_t columns = work.columns - column < width ? work.columns - column : width;
        for (int64_t row = 0; row < work.rows; row += height) {
            const int64_t rows = work.rows - row < height ? work.rows - row : height;
            multiply_tile_panel<Format>(part_of<Quantized<Format>>(work, column, columns, row, rows));
        }
    }
    release_tiles();
}

// --- bf16 weights ---

constexpr int bf16_block_bytes = 1024;  // of a group: 32 values of k

// Tiles 0..3: sums of two tiles of rows × two groups. 4, 5: x. 6, 7: weights.
template <int tiles, int groups>
TURBOLM_INLINE void add_products(const uint8_t* const* x, const uint8_t* const* w) {
    load_tile<6>(w[0], 64);
    load_tile<4>(x[0], 64);
    dot_bf16<0, 4, 6>();
    if constexpr (tiles == 2) {
        load_tile<5>(x[1], 64);
        dot_bf16<2, 5, 6>();
    }
    if constexpr (groups == 2) {
        load_tile<7>(w[1], 64);
        dot_bf16<1, 4, 7>();
        if constexpr (tiles == 2) dot_bf16<3, 5, 7>();
    }
}

// Two groups of bf16 weights: whole blocks where they are packed, and a copy of the rest, up to 32 with zeros.
struct Bf16Columns {
    const uint8_t* packed[panel_groups];
    alignas(64) uint8_t rest[panel_groups][bf16_block_bytes];

    Bf16Columns(const MatmulWork& work, int groups) {
        const int64_t group_bytes = Bf16Rows::group_bytes(work.k), whole = work.k / 32 * bf16_block_bytes;
        for (int group = 0; group < groups; ++group) {
            packed[group] = work.packed + group * group_bytes;
            __builtin_memset(rest[group], 0, bf16_block_bytes);
            __builtin_memcpy(rest[group], packed[group] + whole, static_cast<size_t>(group_bytes - whole));
        }
    }
};

// Up to two tiles of rows times up to two groups: the whole work.
template <int tiles, int groups>
void multiply_tiles(const MatmulWork& work, const Bf16Columns& columns, bool is_first) {
    const int last_rows = static_cast<int>(work.rows - (tiles - 1) * tile_rows);  // of the last tile
    const int first_rows = tiles == 2 ? tile_rows : last_rows;
    const TileShapes::Shape first{first_rows, 64}, last{last_rows, 64}, w{16, 64};
    configure_tiles({{first, first, last, last, first, last, w, w}});
    const uint8_t* x[] = {work.tiles, work.tiles + tile_rows * bf16_row_bytes(work.k)};
    const uint8_t* at[] = {columns.packed[0], groups == 2 ? columns.packed[1] : nullptr};
    for (int64_t left = work.k; left >= 32; left -= 32) {
        if (is_first) {  // later rows find the weights in the caches
            for (int group = 0; group < groups; ++group) {
                for (int line = 0; line < bf16_block_bytes; line += 64) {
                    Vector::prefetch(at[group] + prefetch_distance + line);
                }
            }
        }
        add_products<tiles, groups>(x, at);
        x[0] += 64 * first_rows;
        x[1] += 64 * last_rows;
        for (int group = 0; group < groups; ++group) at[group] += bf16_block_bytes;
    }
    if (work.k % 32 != 0) {
        const uint8_t* rest[] = {columns.rest[0], columns.rest[1]};
        add_products<tiles, groups>(x, rest);
    }
    Float sums[2 * tile_rows][panel_groups];
    constexpr int64_t stride = sizeof(sums[0]);
    store_tile<0>(&sums[0][0], stride);
    if constexpr (groups == 2) store_tile<1>(&sums[0][1], stride);
    if constexpr (tiles == 2) {
        store_tile<2>(&sums[tile_rows][0], stride);
        if constexpr (groups == 2) store_tile<3>(&sums[tile_rows][1], stride);
    }
    store_sums(sums, work, groups);
}

void multiply_bf16(const MatmulWork& work) {
    constexpr int64_t width = panel_groups * group_rows, height = 2 * tile_rows;
    for (int64_t column = 0; column < work.columns; column += width) {
        const int64_t columns = work.columns - column < width ? work.columns - column : width;
        const int groups = columns > group_rows ? 2 : 1;
        const Bf16Columns weights(part_of<Bf16Rows>(work, column, columns, 0, work.rows), groups);
        for (int64_t row = 0; row < work.rows; row += height) {
            const int64_t rows = work.rows - row < height ? work.rows - row : height;
            const MatmulWork part = part_of<Bf16Rows>(work, column, columns, row, rows);
            const auto multiply_one = groups == 2 ? multiply_tiles<1, 2> : multiply_tiles<1, 1>;
            const auto multiply_two = groups == 2 ? multiply_tiles<2, 2> : multiply_tiles<2, 1>;
            (rows > tile_rows ? multiply_two : multiply_one)(part, weights, row == 0);
        }
    }
    release_tiles();
}

}  // namespace

constinit const MatmulKernels matmul_amx = {
    nullptr,  // as matmul_avx512vnni
    {nullptr, nullptr, nullptr, multiply_quantized<Q4_0>, multiply_quantized<Q4_1>, multiply_quantized<Q5_0>,
     multiply_quantized<Q5_1>, multiply_quantized<Q8_0>, multiply_quantized<Iq4Nl>, multiply_quantized<Q4_K>,
     multiply_quantized<Q5_K>, multiply_quantized<Q6_K>, multiply_quantized<Iq4Xs>, multiply_quantized<Q2_K>,
     multiply_quantized<Q3_K>},
};

constinit const Bf16Kernels bf16_amx = {lay_out_bf16, multiply_bf16};

}  // namespace turbolm
