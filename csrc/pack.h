// Packed weight matrices: the layout that the matrix kernels read.
//
// A matrix [n, k] is cut into groups of 16 output rows (the last one padded with zero rows) and
// every group into blocks along k. One block of one group is contiguous, and the blocks of a group
// follow each other, so a thread reads its groups as one forward stream. Inside a block, four
// neighbouring values of k of one row form a "quad", and a quad of all 16 rows is 64 bytes: one
// 512-bit load (or two 256-bit or four 128-bit ones) whose 32-bit lane r belongs to row r, as the
// integer dot-product instructions of x86 and Arm want it. The layout does not depend on the
// instruction set.
//
//   quads(8)     256 bytes: quads 0..3 of 32 values in the low nibbles, quads 4..7 in the high ones
//   bytes(8)     512 bytes: quads 0..7
//   high bits    64 bytes: bit j of a byte is the highest bit of quad j
//   f16[16]      32 bytes: one half float of each row;  u8[16], i8[16] alike
//
//   q4_0, iq4_nl   block 32    f16 d | quads
//   q4_1           block 32    f16 d | f16 m | quads
//   q5_0           block 32    f16 d | quads | high bits
//   q5_1           block 32    f16 d | f16 m | quads | high bits
//   q8_0           block 32    f16 d | bytes (value + 128)
//   q2_k           block 256   f16 d | f16 dmin | 8 × (u8 scale + 16 min of values 0..15 | of 16..31 |
//                              2 × 64 bytes: bits 2j, 2j+1 are quad j (then j + 4))
//   q3_k           block 256   f16 d | 8 × (i8 scale of values 0..15 | of 16..31 | as q2_k | bits 2 of
//                              the quads, as high bits)
//   q4_k           block 256   f16 d | f16 dmin | 8 × (u8 scale | u8 min | quads)
//   q5_k           block 256   f16 d | f16 dmin | 8 × (u8 scale | u8 min | quads | high bits)
//   q6_k           block 256   f16 d | 8 × (i8 scale of values 0..15 | of 16..31 | quads |
//                              2 × 64 bytes: bits 2j, 2j+1 are bits 4, 5 of quad j (then j + 4))
//   iq4_xs         block 256   f16 d | 8 × (i8 scale | quads)
//   f32, f16       block 1     16 values
//   bf16           block 2     16 pairs of values
#pragma once

#include <cstddef>
#include <cstdint>

namespace turbolm {

enum class Format : int32_t {
    f32 = 0, f16 = 1, bf16 = 2,
    q4_0 = 3, q4_1 = 4, q5_0 = 5, q5_1 = 6, q8_0 = 7, iq4_nl = 8,
    q4_k = 9, q5_k = 10, q6_k = 11, iq4_xs = 12, q2_k = 13, q3_k = 14,
};
constexpr int num_formats = 15;
constexpr int group_rows = 16;

struct FormatLayout {
    int32_t values;        // of k, in a block
    int32_t source_bytes;  // one row of a block, as GGUF files and dense tensors have it
    int32_t packed_bytes;  // 16 rows of a block
    bool is_dense;         // multiplied with float activations, not with quantized ones
};

const FormatLayout& format_layout(Format format);

// Values of the 4-bit code book of iq4_nl and iq4_xs.
constexpr int8_t iq4_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

static inline int64_t num_groups(int64_t n) { return (n + group_rows - 1) / group_rows; }
static inline int64_t num_blocks(Format format, int64_t k) {
    const int64_t values = format_layout(format).values;
    return (k + values - 1) / values;
}
static inline int64_t group_bytes(Format format, int64_t k) {
    return num_blocks(format, k) * format_layout(format).packed_bytes;
}

// Packs groups [first, last) of the matrix: `source` is row 16 * first, `target` its group. Rows
// from `n` on are zero. Dense sources have rows of k values; k is a multiple of the block elsewhere.
void pack_groups(Format format, const uint8_t* source, int64_t n, int64_t k, int64_t first, int64_t last,
                 uint8_t* target);

// One row of a packed matrix as k floats, times `scale`.
void unpack_row(Format format, const uint8_t* packed, int64_t k, int64_t row, float scale, float* target);

}  // namespace turbolm
