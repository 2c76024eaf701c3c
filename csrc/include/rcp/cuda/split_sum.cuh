// Sums over the splits of the columns (grid.y): each block writes its sums to memory, and the last block to arrive adds
// the sums of all splits in their order. This takes one launch and no float atomics. Two runs agree bit for bit.
#pragma once

#include <cuda_runtime.h>

namespace rcp::cuda {

// Called by all threads of a block after their sums are written. True in the last block of an output block: it may then
// read the sums of every split. `counter` belongs to the output block; it is zero before the launch and after it.
__device__ __forceinline__ bool arrives_last(unsigned* counter) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicInc(counter, gridDim.y - 1) == gridDim.y - 1;
  __syncthreads();
  if (last) __threadfence();
  return last;
}

}  // namespace rcp::cuda
