#include "matmul_avx512.h"
#include "matmul_table.h"

namespace turbolm {

constinit const MatmulKernels matmul_avx512vnni = make_kernels();

}  // namespace turbolm
