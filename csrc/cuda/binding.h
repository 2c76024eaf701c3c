// Shared by the bindings of all CUDA ops: the device, its current stream, and errors of the runtime.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <atomic>
#include <string>
#include <vector>

#include "binding/tensors.h"

namespace rcp::binding {

inline void check_cuda(const std::string& op, cudaError_t error) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(op + ": CUDA error " + cudaGetErrorName(error) + " (" + cudaGetErrorString(error) +
                           "); the library was built with CUDA " + std::to_string(CUDART_VERSION / 1000) + "." +
                           std::to_string(CUDART_VERSION % 1000 / 10) + ", see docs/build.md");
}

inline int device_attribute(const std::string& op, cudaDeviceAttr attribute, int device) {
  int value = 0;
  check_cuda(op, cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

// Makes the device of a tensor the current device for as long as this object lives; torch's current stream there.
class CudaCall {
 public:
  CudaCall(const std::string& op, const Tensor& t, const std::string& what)
      : device(checked(op, t, what)), guard_(device.index()) {
    void* current = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device.index(), &current));
    stream = static_cast<cudaStream_t>(current);
    // Asked once per device: the driver answers more slowly than a kernel launches. Racing threads store the same
    // value.
    static std::array<std::atomic<int>, 64> known{};
    const std::size_t index = static_cast<std::size_t>(device.index());
    int packed = index < known.size() ? known[index].load(std::memory_order_relaxed) : 0;
    if (packed == 0) {
      const int capability = 10 * device_attribute(op, cudaDevAttrComputeCapabilityMajor, device.index()) +
                             device_attribute(op, cudaDevAttrComputeCapabilityMinor, device.index());
      packed = capability << 16 | device_attribute(op, cudaDevAttrMultiProcessorCount, device.index());
      if (index < known.size()) known[index].store(packed, std::memory_order_relaxed);
    }
    sm_count = packed & 0xffff;
    compute_capability = packed >> 16;
    if (compute_capability < 75) {
      fail(op + ": the kernels need a GPU of compute capability 7.5 or later, got " +
           std::to_string(compute_capability / 10) + "." + std::to_string(compute_capability % 10) + " (" +
           device_text(device) + "); use the CPU there");
    }
  }

  Tensor empty(const std::vector<int64_t>& shape, ScalarType dtype) const {
    return rcp::binding::empty(shape, dtype, device);
  }

  const Device device;
  cudaStream_t stream = nullptr;
  int sm_count = 0, compute_capability = 0;

 private:
  static Device checked(const std::string& op, const Tensor& t, const std::string& what) {
    if (!t.is_cuda()) {
      fail(op + ": " + what + " must be on the GPU like the other arguments, got " + device_text(t.device()) +
           "; move it with .to()");
    }
    return t.device();
  }

  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace rcp::binding
