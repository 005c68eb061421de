// x rounded to bf16, in the layout of matmul.h; for AVX512-BF16.
#pragma once

#include <immintrin.h>

#include "matmul.h"

namespace turbolm {
namespace {

struct Bf16Rows {
    static int64_t group_bytes(int64_t k) { return (k + 1) / 2 * 64; }
    static int64_t row_bytes(int64_t k) { return bf16_row_bytes(k); }
};

// Rows [first, last) of a tile of `rows` rows, from x[0] = its first row.
inline void lay_out_bf16(const float* x, int64_t ldx, int64_t k, int rows, int first, int last, uint8_t* tile) {
    for (int row = first; row < last; ++row) {
        const float* from = x + row * ldx;
        uint8_t* to = tile + 64 * row;
        for (int64_t left = k; left > 0; left -= 32, from += 32, to += 64 * rows) {
            const uint32_t mask = left >= 32 ? 0xffffffffu : (1u << left) - 1;
            const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from);
            const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), from + 16);
            const __m512bh both = _mm512_cvtne2ps_pbh(high, low);
            __builtin_memcpy(to, &both, 64);
        }
    }
}

}  // namespace
}  // namespace turbolm
