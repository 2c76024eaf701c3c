// The part of the CUDA runtime that a launcher calls, for host code compiled by nvcc without a runtime: kernel launches
// go to a function of the caller's, which executes their PTX (host.py).
#include <cuda_runtime_api.h>

#include <map>
#include <string>
#include <vector>

using Launch = int (*)(const char* kernel, const unsigned* grid, const unsigned* block, void** arguments, size_t shared,
                       int early);
using Fill = int (*)(void* address, int value, size_t count);
using Allocate = void* (*)(size_t count);
using Copy = int (*)(void* to, const void* from, size_t count, int kind);

namespace {

struct Configuration {
  dim3 grid, block;
  size_t shared;
  void* stream;
};

std::map<const void*, std::string>& kernels() {
  static std::map<const void*, std::string> names;
  return names;
}

std::vector<Configuration> configurations;
Launch launch = nullptr;
Fill fill = nullptr;
Allocate allocate = nullptr;
Copy copy = nullptr;
int multiprocessors = 0, capability = 0;
cudaError_t last_error = cudaSuccess;

cudaError_t remembered(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

}  // namespace

extern "C" {

void host_runtime_set(Launch on_launch, Fill on_fill, Allocate on_allocate, Copy on_copy, int sm_count,
                      int compute_capability) {
  launch = on_launch;
  fill = on_fill;
  allocate = on_allocate;
  copy = on_copy;
  multiprocessors = sm_count;
  capability = compute_capability;
  last_error = cudaSuccess;
}

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  kernels()[host] = name;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const Configuration top = configurations.back();
  configurations.pop_back();
  *grid = top.grid;
  *block = top.block;
  *shared = top.shared;
  *static_cast<void**>(stream) = top.stream;
  return cudaSuccess;
}

static cudaError_t start(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared, int early) {
  const unsigned grid_size[3] = {grid.x, grid.y, grid.z}, block_size[3] = {block.x, block.y, block.z};
  const auto found = kernels().find(function);
  if (found == kernels().end()) return remembered(cudaErrorInvalidDeviceFunction);
  const int error = launch(found->second.c_str(), grid_size, block_size, arguments, shared, early);
  return remembered(static_cast<cudaError_t>(error));
}

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t) {
  return start(function, grid, block, arguments, shared, 0);
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t stream) {
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, arguments, shared, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* configuration, const void* function, void** arguments) {
  int early = 0;
  for (unsigned i = 0; i < configuration->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = configuration->attrs[i];
    early |= attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization &&
             attribute.val.programmaticStreamSerializationAllowed;
  }
  return start(function, configuration->gridDim, configuration->blockDim, arguments, configuration->dynamicSmemBytes,
               early);
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute, int) {
  return remembered(kernels().count(function) ? cudaSuccess : cudaErrorInvalidDeviceFunction);
}

cudaError_t cudaMemsetAsync(void* address, int value, size_t count, cudaStream_t) {
  return remembered(static_cast<cudaError_t>(fill(address, value, count)));
}

cudaError_t cudaMemset(void* address, int value, size_t count) {
  return cudaMemsetAsync(address, value, count, nullptr);
}

cudaError_t cudaMalloc(void** address, size_t count) {
  *address = allocate(count);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t count, cudaMemcpyKind kind) {
  return remembered(static_cast<cudaError_t>(copy(to, from, count, kind)));
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t count, cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpy(to, from, count, kind);
}

// All is done by the time that a call returns, and memory lives as long as the caller wants it.
cudaError_t cudaFree(void*) {
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
  return last_error;
}

cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return last_error;
}

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  *stream = nullptr;
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t) {
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

cudaError_t cudaPeekAtLastError() {
  return last_error;
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "an error of the kernel that the executor has told of";
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = multiprocessors;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = capability / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = capability % 10;
      return cudaSuccess;
    default:
      return remembered(cudaErrorInvalidValue);
  }
}

}  // extern "C"
