#include "lut_linear_kernels.h"

template cudaError_t rcp::cuda::lut_linear_of_bits<4>(const rcp::cuda::LutLinearCall&, const rcp::cuda::LutLinearPlan&);
