// Products with few rows, written once over the `Vector` of an instruction set.
//
// A file matmul_<isa>.cpp defines `struct Vector` in an unnamed namespace, includes matmul_table.h and
// exports `make_kernels()`. Everything here has internal linkage on purpose: the same source is
// compiled with several sets of flags, and the linker must never merge the results. For the same
// reason no inline function of another header is called here, the standard library's included.
//
// Vector: 32-bit lanes, one per output row; all members static.
//   lanes                   4, 8 or 16
//   row_steps[]             numbers of rows of x to compute at once, falling, down to 1
//   Float, Int, Bytes       lanes floats; lanes int32; 4 * lanes bytes
//   start<zero>(p)          integer sums for bytes with this zero point; *p is -128 * sum(x)
//   add_products<largest>(low, high, w, x)   for several rows of x, 32 int8 apart: adds to low[row] each
//                           lane's products of w's quads 0..3 with x, to high[row] those of 4..7;
//                           no byte of w exceeds `largest`
//   load_some(p, n), store_some(p, v, n)   the first n lanes; n may be below 0 or above `lanes`
//   insert<s, mask>(q, b)   q | ((b << s) & mask), bytewise; s may be negative
//   broadcast, dot_quads, min_panel_byte     where TURBOLM_MATMUL_PANELS is defined (matmul_panel.h)
//   set(v)                  a float or an int32 in all lanes, as float
//   load_u4_pairs(p, l, h)  low and high halves of `lanes` bytes, as floats
//   quantize_block(x, q)    32 floats to int8; returns the scale and the sums of both halves
#pragma once

#include "matmul.h"
#include "matmul_formats.h"

#define TURBOLM_INLINE inline __attribute__((always_inline))  // sums must stay in registers

namespace turbolm {
namespace {

constexpr int parts = group_rows / Vector::lanes;  // vectors that cover a group
constexpr int num_row_steps = sizeof(Vector::row_steps) / sizeof(Vector::row_steps[0]);
constexpr int64_t prefetch_distance = 4096;  // bytes ahead in the stream of weights; measured

// The tile seen from its rows [first, first + R).
struct TileRows {
    const uint8_t* tile;
    int64_t stride;  // rows in the tile
    int64_t first;
};

// Sums of R rows for the 16 columns of a group.
template <int R>
struct Sums {
    Float of[R][parts];

    TURBOLM_INLINE void clear() {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int part = 0; part < parts; ++part) of[r][part] = Vector::zero();
        }
    }
};

// The two halves of the dot products of `count` rows, from row `first` on. Two chains of 4 for each
// of two rows keep enough independent instructions in flight.
template <class Format, int count>
struct Dots {
    Int low[count], high[count];

    TURBOLM_INLINE Dots(const Unpacked& w, const int8_t* x, const int32_t* zeros, int64_t stride) {
#pragma GCC unroll 2
        for (int r = 0; r < count; ++r) {
            low[r] = Vector::start<Format::zero>(zeros + (Format::has_halves ? stride : 0) + r);
            high[r] = Vector::start<Format::has_halves ? Format::zero : 0>(zeros + 2 * stride + r);
        }
        Vector::add_products<Format::largest>(low, high, w.quads, x);
    }
};

// The sum of a row after one block. `dots`: products of the bytes with x, less the zero point, of all 32
// values or of each half; `scale`: the row's in the block of x, whose other factors are `stride` apart.
template <class Format>
TURBOLM_INLINE Float add_block(Float sum, const Int* dots, const Unpacked& w, const float* scale, int64_t stride) {
    const Float x_scale = Vector::set(scale[0]);
    if constexpr (Format::has_halves) {
        Float product = Vector::multiply(Vector::to_float(dots[0]), w.scale[0]);
        product = Vector::fma(Vector::to_float(dots[1]), w.scale[1], product);
        if constexpr (Format::has_minimum) {
            const int32_t* halves = reinterpret_cast<const int32_t*>(scale + 3 * stride);  // -128 * sum(x)
            const Float part = Vector::set(-1.0f / 128);
            product = Vector::fma(Vector::multiply(w.minimum[0], part), Vector::set(halves[0]), product);
            product = Vector::fma(Vector::multiply(w.minimum[1], part), Vector::set(halves[stride]), product);
        }
        return Vector::fma(product, x_scale, sum);
    }
    sum = Vector::fma(Vector::multiply(Vector::to_float(dots[0]), x_scale), w.scale[0], sum);
    if constexpr (Format::has_minimum) sum = Vector::fma(w.minimum[0], Vector::set(scale[stride]), sum);
    return sum;
}

template <class Format, int R>
TURBOLM_INLINE void multiply_block(const Unpacked& w, int part, const uint8_t* block, const TileRows& rows,
                                   Sums<R>& sums) {
    const int64_t stride = rows.stride;
    const int8_t* x = reinterpret_cast<const int8_t*>(block) + 32 * rows.first;
    const float* scale = reinterpret_cast<const float*>(block + 32 * stride) + rows.first;
    const int32_t* zeros = reinterpret_cast<const int32_t*>(scale + 2 * stride);
    constexpr int step = R % 2 == 0 ? 2 : 1;
#pragma GCC unroll 16
    for (int first = 0; first < R; first += step) {
        const Dots<Format, step> dots(w, x + 32 * first, zeros + first, stride);
#pragma GCC unroll 2
        for (int r = 0; r < step; ++r) {
            Float& sum = sums.of[first + r][part];
            if constexpr (Format::has_halves) {
                const Int halves[] = {dots.low[r], dots.high[r]};
                sum = add_block<Format>(sum, halves, w, scale + first + r, stride);
            } else {
                const Int dot = Vector::add(dots.low[r], dots.high[r]);
                sum = add_block<Format>(sum, &dot, w, scale + first + r, stride);
            }
        }
    }
}

template <class Format>
struct Quantized {
    static int64_t group_bytes(int64_t k) {
        const int64_t blocks = k / (32 * Format::sub_blocks);
        return blocks * (Format::header_bytes + Format::sub_blocks * Format::sub_bytes);
    }
    static int64_t row_bytes(int64_t k) { return quantized_row_bytes(k); }

    template <int R>
    static TURBOLM_INLINE void multiply(const uint8_t* w, int64_t k, const TileRows& rows, Sums<R>& sums) {
        const uint8_t* x = rows.tile;
        const int64_t x_bytes = quantized_block_bytes * rows.stride;
        for (int64_t left = k; left > 0; left -= 32 * Format::sub_blocks) {
            Header headers[parts];
            for (int part = 0; part < parts; ++part) headers[part] = Format::header(w, part);
            w += Format::header_bytes;
            for (int sub = 0; sub < Format::sub_blocks; ++sub) {
                for (int line = 0; line < Format::sub_bytes; line += 64) Vector::prefetch(w + prefetch_distance + line);
#pragma GCC unroll 4
                for (int part = 0; part < parts; ++part) {
                    Unpacked unpacked;
                    Format::load(w, part, headers[part], unpacked);
                    multiply_block<Format, R>(unpacked, part, x, rows, sums);
                }
                w += Format::sub_bytes;
                x += x_bytes;
            }
        }
    }
};

template <class Format>
struct Dense {
    static int64_t group_bytes(int64_t k) { return (k + Format::step - 1) / Format::step * Format::block_bytes; }
    static int64_t row_bytes(int64_t k) { return dense_row_bytes(k); }

    template <int R>
    static TURBOLM_INLINE void multiply(const uint8_t* w, int64_t k, const TileRows& rows, Sums<R>& sums) {
        const float* x = reinterpret_cast<const float*>(rows.tile) + rows.first;
        for (int64_t left = k; left > 0; left -= Format::step, w += Format::block_bytes) {
            Vector::prefetch(w + prefetch_distance);
#pragma GCC unroll 4
            for (int part = 0; part < parts; ++part) {
                Float values[Format::step];
                Format::load(w, part, values);
                for (int i = 0; i < Format::step; ++i) {
#pragma GCC unroll 16
                    for (int r = 0; r < R; ++r) {
                        Float& sum = sums.of[r][part];
                        sum = Vector::fma(values[i], Vector::set(x[i * rows.stride + r]), sum);
                    }
                }
            }
            x += Format::step * rows.stride;
        }
    }
};

// Adds the bias and stores `columns` (at most 16) of R rows.
template <int R>
TURBOLM_INLINE void store(const Sums<R>& sums, const float* bias, int64_t columns, float* y, int64_t ldy) {
#pragma GCC unroll 4
    for (int part = 0; part < parts; ++part) {
        const int64_t first = Vector::lanes * part;
        const Float add = bias == nullptr ? Vector::zero() : Vector::load_some(bias + first, columns - first);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const Float sum = bias == nullptr ? sums.of[r][part] : Vector::add(sums.of[r][part], add);
            Vector::store_some(y + r * ldy + first, sum, columns - first);
        }
    }
}

// One group times the rows of one tile from rows.first on, as many at once as the registers hold.
template <class Kernel, int step = 0>
inline void multiply_tile(const MatmulWork& work, float* y, TileRows rows) {
    constexpr int R = Vector::row_steps[step];
    for (; rows.stride - rows.first >= R; rows.first += R) {
        Sums<R> sums;
        sums.clear();
        Kernel::template multiply<R>(work.packed, work.k, rows, sums);
        store<R>(sums, work.bias, work.columns, y + rows.first * work.ldy, work.ldy);
    }
    if constexpr (step + 1 < num_row_steps) multiply_tile<Kernel, step + 1>(work, y, rows);
}

// One group times all rows.
template <class Kernel>
void multiply_group(const MatmulWork& work) {
    for (int64_t row = 0; row < work.rows; row += tile_rows) {
        const int64_t count = work.rows - row < tile_rows ? work.rows - row : tile_rows;
        const TileRows rows{work.tiles + row * Kernel::row_bytes(work.k), count, 0};
        multiply_tile<Kernel>(work, work.y + row * work.ldy, rows);
    }
}

// The part of the work with `columns` columns from `column` on and `rows` rows from `row` on.
template <class Kernel>
MatmulWork part_of(const MatmulWork& work, int64_t column, int64_t columns, int64_t row, int64_t rows) {
    MatmulWork part = work;
    part.packed += column / group_rows * Kernel::group_bytes(work.k);
    part.columns = columns;
    part.tiles += row * Kernel::row_bytes(work.k);
    part.rows = rows;
    if (work.bias != nullptr) part.bias += column;
    part.y += row * work.ldy + column;
    return part;
}

}  // namespace
}  // namespace turbolm
