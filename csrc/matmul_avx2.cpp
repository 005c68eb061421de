#include "matmul_avx2.h"
#include "matmul_table.h"

namespace turbolm {

constinit const MatmulKernels matmul_avx2 = make_kernels();

}  // namespace turbolm
