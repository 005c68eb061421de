#include "simd_neon.h"

#include "kernels.h"

namespace turbolm {

extern const Kernels kernels_neon;
const Kernels kernels_neon = TURBOLM_KERNELS;

}  // namespace turbolm
