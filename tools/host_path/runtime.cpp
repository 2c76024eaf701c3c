// The part of the CUDA runtime that lut_linear's binding calls, and two functions of torch, for a machine without a
// GPU. Launches are counted, and nothing runs.
#include <cuda_runtime_api.h>
#include <torch/headeronly/core/DeviceType.h>

#include <cstdint>
#include <cstring>

extern "C" {

// Beside torch's own definitions: the linker binds this library's calls to these.
int32_t aoti_torch_device_type_cuda() {
  return static_cast<int32_t>(c10::DeviceType::PrivateUse1);
}
int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

static int64_t launches = 0, fills = 0, fill_bytes = 0, last_grid[2] = {0, 0};
static int64_t captured = 0;

static cudaError_t count(dim3 grid) {
  ++launches;
  last_grid[0] = grid.x;
  last_grid[1] = grid.y;
  return cudaSuccess;
}

__attribute__((visibility("default"))) int64_t host_path_launches() {
  return launches;
}
__attribute__((visibility("default"))) int64_t host_path_fills() {
  return fills;
}
__attribute__((visibility("default"))) int64_t host_path_fill_bytes() {
  return fill_bytes;
}
// The grid of the last launch.
__attribute__((visibility("default"))) const int64_t* host_path_grid() {
  return last_grid;
}
// The stream captures a graph of that number from now on; 0: no capture.
__attribute__((visibility("default"))) void host_path_capture(int64_t graph) {
  captured = graph;
}
void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, void*, void*, void*, void*, int*) {}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3 grid, dim3, void**, size_t, cudaStream_t) {
  return count(grid);
}
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) {
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) {
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void*, dim3 grid, dim3, void**, size_t, cudaStream_t) {
  return count(grid);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* launch, const void*, void**) {
  return count(launch->gridDim);
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t) {
  ++fills;
  fill_bytes += static_cast<int64_t>(bytes);
  std::memset(address, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t*, const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t*) {
  *status = captured != 0 ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  if (id != nullptr) *id = static_cast<unsigned long long>(captured);
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) {
  return "an error of the stub";
}
const char* cudaGetErrorName(cudaError_t) {
  return "stub";
}
// An A100's.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 108 : attribute == cudaDevAttrComputeCapabilityMajor ? 8 : 0;
  return cudaSuccess;
}

}  // extern "C"
