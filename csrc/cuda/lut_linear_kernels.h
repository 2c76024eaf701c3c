// The kernels of lut_linear are compiled for each width of weights in a file of its own, csrc/cuda/lut_linear_w*.cu:
// whoever includes this does not compile them again.
#pragma once

#include "rcp/cuda/lut_linear.cuh"

extern template cudaError_t rcp::cuda::integer::launch_bits<2>(const rcp::cuda::LutLinearArguments&, int);
extern template cudaError_t rcp::cuda::integer::launch_bits<3>(const rcp::cuda::LutLinearArguments&, int);
extern template cudaError_t rcp::cuda::integer::launch_bits<4>(const rcp::cuda::LutLinearArguments&, int);
extern template cudaError_t rcp::cuda::lut_linear_a16<2>(const rcp::cuda::LutLinearArguments&, int, int);
extern template cudaError_t rcp::cuda::lut_linear_a16<3>(const rcp::cuda::LutLinearArguments&, int, int);
extern template cudaError_t rcp::cuda::lut_linear_a16<4>(const rcp::cuda::LutLinearArguments&, int, int);
