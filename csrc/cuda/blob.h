// Checks of the blob that pack_weight makes for CUDA.
#pragma once

#include <cstdint>
#include <cstring>

#include "binding/pack_weight.h"
#include "rcp/cuda/weight_layout.h"

namespace rcp::binding {

inline cuda::CudaLayout cuda_layout(const WeightShape& shape) {
  return {shape.rows, shape.columns, shape.group_size, shape.bits};
}

// A CPU blob has a multiple of 32 bytes and the CUDA layout a multiple of 128. With the tail their sizes never agree.
inline int64_t blob_bytes(const WeightShape& shape) {
  constexpr int64_t tail = 16;
  return cuda_layout(shape).total_bytes() + tail;
}

inline void check_blob_size(const std::string& op, const Tensor& weight, const WeightShape& shape) {
  if (reinterpret_cast<uintptr_t>(weight.const_data_ptr()) % 16 != 0) {
    fail(op + ": weight must start at a multiple of 16 bytes, got a view at another offset; pass the whole tensor");
  }
  if (weight.numel() == blob_bytes(shape)) return;
  const std::string got = std::to_string(weight.numel());
  WeightShape uniform = shape;
  uniform.uniform = true;
  const bool for_cpu = weight.numel() == shape.packed_bytes() || weight.numel() == uniform.packed_bytes();
  fail(op + ": weight must have " + std::to_string(blob_bytes(shape)) + " bytes, packed for CUDA in this shape, got " +
       got + (for_cpu ? ", which is packed for the CPU" : "") +
       "; move the layer with .to(), which packs its weight again, or pack the canonical weight there");
}

// Checks the header like check_packed of the CPU. Waits for the device.
inline void check_header(const std::string& op, const Tensor& weight, const WeightShape& shape) {
  Tensor blob = weight;
  const Tensor copy = torch::stable::to(torch::stable::narrow(blob, 0, 0, sizeof(cuda::WeightHeader)),
                                        Device(torch::headeronly::DeviceType::CPU));
  cuda::WeightHeader header;
  std::memcpy(&header, copy.const_data_ptr(), sizeof header);
  if (std::memcmp(header.magic, cuda::weight_magic, sizeof header.magic) != 0) {
    fail(op + ": weight is not packed for CUDA (wrong magic in its header); make it with pack_weight on this device");
  }
  if (header.layout_version != cuda::weight_layout_version) {
    fail(op + ": weight has CUDA layout version " + std::to_string(header.layout_version) +
         ", this build reads version " + std::to_string(cuda::weight_layout_version) +
         "; repack it from the canonical format");
  }
  check_packed_with(op, shape, {header.rows, header.columns, header.group_size, static_cast<int>(header.bits)});
  if (header.shape_hash != cuda_layout(shape).shape_hash()) {
    fail(op + ": weight must have the shape hash of its version and shape, got a header that disagrees with itself; " +
         "pack the canonical weight again");
  }
}

}  // namespace rcp::binding
