#include "simd_avx2.h"

#include "kernels.h"

namespace turbolm {

extern const Kernels kernels_avx2;
const Kernels kernels_avx2 = TURBOLM_KERNELS;

}  // namespace turbolm
