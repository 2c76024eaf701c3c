// Checks of tensors, shared by the bindings of all devices and operators.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "rcp/float_types.h"

namespace rcp::binding {

using torch::headeronly::ScalarType;
using torch::stable::Device;
using torch::stable::Tensor;

[[noreturn]] inline void fail(const std::string& message) {
  throw std::invalid_argument(message);
}

inline std::optional<FloatType> float_type_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return FloatType::float32;
    case ScalarType::Half:
      return FloatType::float16;
    case ScalarType::BFloat16:
      return FloatType::bfloat16;
    default:
      return std::nullopt;
  }
}

inline FloatType float_type(const Tensor& t, const std::string& what) {
  const std::optional<FloatType> type = float_type_of(t.scalar_type());
  if (!type) {
    fail(what + " must be float32, float16 or bfloat16, got " + torch::headeronly::toString(t.scalar_type()) +
         "; convert it with .to()");
  }
  return *type;
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Not torch's own contiguous(), which is a call through the dispatcher even where there is nothing to copy.
inline Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline std::string shape_text(const Tensor& t) {
  std::string text = "[";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + std::to_string(t.size(d));
  return text + "]";
}

// For "must be on the CPU", "must be on cuda:0".
inline std::string device_text(const Device& device) {
  if (device.type() == torch::headeronly::DeviceType::CPU) return "the CPU";
  if (device.type() == torch::headeronly::DeviceType::CUDA) return "cuda:" + std::to_string(device.index());
  return "a device that is neither CPU nor CUDA";
}

inline bool is_on(const Tensor& t, const Device& device) {
  if (device.type() == torch::headeronly::DeviceType::CPU) return t.is_cpu();
  return t.is_cuda() && t.get_device_index() == device.index();
}

inline void check_clip(const std::string& op, double clip) {
  if (!(clip > 0.0 && clip <= 1.0)) {
    fail(op + ": clip must be in (0, 1], got " + std::to_string(clip) + "; 1.0 keeps the largest value");
  }
}

inline void check_tensor(const Tensor& t, const std::string& what, ScalarType dtype, const std::vector<int64_t>& shape,
                         const Device& device) {
  if (!is_on(t, device)) {
    fail(what + " must be on " + device_text(device) + " like the other arguments, got " + device_text(t.device()) +
         "; move it with .to()");
  }
  if (t.scalar_type() != dtype) {
    fail(what + " must be " + torch::headeronly::toString(dtype) + ", got " +
         torch::headeronly::toString(t.scalar_type()) + "; store it unconverted");
  }
  bool same = t.dim() == static_cast<int64_t>(shape.size());
  std::string wanted = "[";
  for (std::size_t d = 0; d < shape.size(); ++d) {
    same = same && t.size(static_cast<int64_t>(d)) == shape[d];
    wanted += (d ? ", " : "") + std::to_string(shape[d]);
  }
  if (!same)
    fail(what + " must have shape " + wanted + "], got " + shape_text(t) + "; pass the whole tensor of the same layer");
}

// A contiguous tensor. Not torch::stable::empty, which looks the operator up by its name in every call.
inline Tensor empty(const std::vector<int64_t>& shape, ScalarType dtype, const Device& device) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (std::size_t d = shape.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(shape[d], 1);
  }
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(),
                                                         strides.data(), to<int32_t>(from(dtype)),
                                                         to<int32_t>(from(device.type())), device.index(), &made));
  return Tensor(made);
}

// The size of the last dimension, the features of a token.
inline int64_t last_size(const std::string& op, const Tensor& x) {
  if (x.dim() < 1) fail(op + ": x must have at least one dimension, got a scalar; use x[None]");
  return x.size(x.dim() - 1);
}

// The shape of x with its last dimension replaced.
inline std::vector<int64_t> with_last(const Tensor& x, int64_t last) {
  const auto sizes = x.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape.back() = last;
  return shape;
}

}  // namespace rcp::binding
