#include "lut_linear_kernels.h"

template cudaError_t rcp::cuda::integer::launch_bits<2>(const rcp::cuda::LutLinearArguments&, int);
template cudaError_t rcp::cuda::lut_linear_a16<2>(const rcp::cuda::LutLinearArguments&, int, int);
