// All kernels of an instruction set: included by matmul_<isa>.cpp after its `Vector`.
#pragma once

#include "matmul_kernel.h"

#ifdef TURBOLM_MATMUL_PANELS
#include "matmul_panel.h"
#endif

namespace turbolm {
namespace {

template <class Kernel>
void multiply(const MatmulWork& work) {
    int64_t done = 0;
#ifdef TURBOLM_MATMUL_PANELS
    if constexpr (has_panels<Kernel>) {
        constexpr int64_t width = panel_groups * group_rows;
        for (; work.rows >= min_panel_rows && work.columns - done > group_rows; done += width) {
            const int64_t columns = work.columns - done < width ? work.columns - done : width;
            for (int64_t row = 0; row < work.rows; row += panel_rows) {
                const int64_t rows = work.rows - row < panel_rows ? work.rows - row : panel_rows;
                multiply_panel(Kernel{}, part_of<Kernel>(work, done, columns, row, rows));
            }
        }
    }
#endif
    for (; done < work.columns; done += group_rows) {
        const int64_t columns = work.columns - done < group_rows ? work.columns - done : group_rows;
        multiply_group<Kernel>(part_of<Kernel>(work, done, columns, 0, work.rows));
    }
}

void quantize(const float* x, int64_t ldx, int64_t k, int rows, int first, int last, uint8_t* tile) {
    const int64_t stride = rows;
    for (int64_t row = first; row < last; ++row) {
        const float* from = x + row * ldx;
        uint8_t* block = tile;
        for (int64_t done = 0; done < k; done += 32, from += 32, block += quantized_block_bytes * stride) {
            int32_t low, high;
            const float scale = Vector::quantize_block(from, reinterpret_cast<int8_t*>(block) + 32 * row, &low, &high);
            float* scales = reinterpret_cast<float*>(block + 32 * stride) + row;
            int32_t* zeros = reinterpret_cast<int32_t*>(scales + 2 * stride);
            scales[0] = scale;
            scales[stride] = scale * static_cast<float>(low + high);
            zeros[0] = -128 * (low + high);
            zeros[stride] = -128 * low;
            zeros[2 * stride] = -128 * high;
        }
    }
}

constexpr MatmulKernels make_kernels() {
    return {
        quantize,
        {multiply<Dense<F32>>, multiply<Dense<F16>>, multiply<Dense<Bf16>>, multiply<Quantized<Q4_0>>,
         multiply<Quantized<Q4_1>>, multiply<Quantized<Q5_0>>, multiply<Quantized<Q5_1>>, multiply<Quantized<Q8_0>>,
         multiply<Quantized<Iq4Nl>>, multiply<Quantized<Q4_K>>, multiply<Quantized<Q5_K>>, multiply<Quantized<Q6_K>>,
         multiply<Quantized<Iq4Xs>>, multiply<Quantized<Q2_K>>, multiply<Quantized<Q3_K>>},
    };
}

}  // namespace
}  // namespace turbolm
