// y = x · Wᵀ + bias with packed weights (pack.h) and float activations.
//
// Quantized weights are multiplied with activations rounded to 8 bits: every 32 values of a row of
// x share one float scale (largest magnitude · 1/127). Products are summed exactly in int32 within a
// block, and blocks are summed in float32 in the order of k. That order depends on nothing else:
// a row of y is bitwise the same whatever the other rows, the number of rows and of threads, and
// the instruction set (but for the portable kernels on processors without fused multiply-add).
// Dense weights are multiplied with x itself, in float32, in the order of k.
//
// But bf16 weights, where the processor multiplies pairs of bf16 (avx512bf16, amx): there x is rounded to
// bf16 too, to nearest even, and numbers below the smallest normal float32 count as zero. Products are
// exact and sums float32, in the instruction's own order: pairs of k in turn (avx512bf16), or the even and
// the odd ones of 32 values in turn, then both added to the sum (amx). Each of these sets uses its one
// instruction for any number of rows, so the rule above holds, but for equality between instruction sets.
#pragma once

#include <cstddef>
#include <cstdint>

#include "pack.h"
#include "team.h"

namespace turbolm {

// Rows [offset, offset + n) of a layer's output: one packed matrix.
struct LinearPart {
    Format format;
    int64_t n;
    const uint8_t* packed;  // num_groups(n) * group_bytes(format, k) bytes, 64-byte aligned
    const float* bias;      // [n] or null
};

// A layer: matrices over the same input whose outputs stand side by side.
struct Linear {
    int64_t k;
    int64_t n;  // sum of the parts' n
    int32_t num_parts;
    const LinearPart* parts;
};

struct MatmulArgs {
    const Linear* linear;
    const float* x;  // [rows, k], row stride ldx
    int64_t ldx;
    int64_t rows;
    float* y;  // [rows, n], row stride ldy
    int64_t ldy;
    uint8_t* workspace;  // matmul_workspace(...) bytes, 64-byte aligned, shared by the team
};

// Bytes that `matmul` needs for inputs of up to `max_rows` rows of k values.
int64_t matmul_workspace(int64_t k, int64_t max_rows, int num_threads);

// Entered by all threads. x must be complete (barrier before); y is complete after the next barrier.
// The workspace may be used again after that barrier too.
void matmul(const MatmulArgs& args, const Team& team);

// Rows of a packed table as floats, times `scale`: y[i] = table[ids[i]]. Entered by all threads.
void embedding(const LinearPart& table, int64_t k, const int32_t* ids, int64_t count, float scale, float* y,
               int64_t ldy, const Team& team);

// --- what each instruction set provides (matmul_<isa>.cpp) ---

constexpr int tile_rows = 16;  // activations are laid out in tiles of so many rows; the last has the rest
constexpr float smallest_maximum = 1e-30f;  // a block of x below this counts as zero
constexpr float inverse_127 = 1.0f / 127.0f;

// A range of groups times a range of tiles.
struct MatmulWork {
    const uint8_t* packed;  // first group
    int64_t columns;        // outputs: 16 for each group, less where n ends
    int64_t k;
    const uint8_t* tiles;  // first tile
    int64_t rows;          // in these tiles
    const float* bias;     // of the first column, or null
    float* y;              // first row and column
    int64_t ldy;
};

struct MatmulKernels {
    // Rows [first, last) of a tile of `rows` rows, from x[0] = its first row.
    void (*quantize)(const float* x, int64_t ldx, int64_t k, int rows, int first, int last, uint8_t* tile);
    void (*multiply[num_formats])(const MatmulWork& work);
};

// Products with bf16 weights on instructions for them.
struct Bf16Kernels {
    void (*lay_out)(const float* x, int64_t ldx, int64_t k, int rows, int first, int last, uint8_t* tile);
    void (*multiply)(const MatmulWork& work);
};

// Quantized rows: for each 32 of k, rows × 32 int8, then five arrays of `rows` entries: float scale,
// float scale * sum, int32 -128 * sum (of all 32 values, of the first and of the last 16).
constexpr int64_t quantized_block_bytes = 52;  // per row
// Dense rows: for each k, `rows` floats.
static inline int64_t dense_row_bytes(int64_t k) { return 4 * (k + k % 2); }
static inline int64_t quantized_row_bytes(int64_t k) { return k / 32 * quantized_block_bytes; }
// Rows of bf16: for each 32 of k, rows × 32 bf16; the last 32 are filled with zeros.
static inline int64_t bf16_row_bytes(int64_t k) { return (k + 31) / 32 * 64; }

extern const MatmulKernels matmul_generic, matmul_avx2, matmul_avxvnni, matmul_avx512, matmul_avx512vnni, matmul_neon;
// For min_tile_rows rows and more, quantized formats alone: the same results as matmul_avx512vnni.
extern const MatmulKernels matmul_amx;
constexpr int64_t min_tile_rows = 32;  // fewer are faster without (docs/log.md)
extern const Bf16Kernels bf16_avx512, bf16_amx;

}  // namespace turbolm
