#include "simd_avx512.h"

#include "kernels.h"

namespace turbolm {

extern const Kernels kernels_avx512;
const Kernels kernels_avx512 = TURBOLM_KERNELS;

}  // namespace turbolm
