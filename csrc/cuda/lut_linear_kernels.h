// The kernels of lut_linear are compiled in a file of its own for each width of weights, csrc/cuda/lut_linear_w*.cu. A
// file that includes this header does not compile them again.
#pragma once

#include "rcp/cuda/lut_linear.cuh"

namespace rcp::cuda {

extern template cudaError_t lut_linear_of_bits<2>(const LutLinearCall&, const LutLinearPlan&);
extern template cudaError_t lut_linear_of_bits<3>(const LutLinearCall&, const LutLinearPlan&);
extern template cudaError_t lut_linear_of_bits<4>(const LutLinearCall&, const LutLinearPlan&);

}  // namespace rcp::cuda
