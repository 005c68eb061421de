#include "simd_generic.h"

#include "kernels.h"

namespace turbolm {

extern const Kernels kernels_generic;
const Kernels kernels_generic = TURBOLM_KERNELS;

}  // namespace turbolm
