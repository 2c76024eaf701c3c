// A second device for tests on machines without a GPU, registered as PyTorch's PrivateUse1 backend.
//
// Its memory is host memory, and every operator runs the CPU kernel on that memory. Tensors say device "emulated:0".
// An operator that gets tensors of both devices raises, as it does on a card. Allocated bytes are counted.

#include <ATen/EmptyTensor.h>
#include <ATen/InferSize.h>
#include <ATen/TensorUtils.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

namespace {

const c10::Device kDevice(c10::DeviceType::PrivateUse1, 0);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kDevice.type(); }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// Bytes that live tensors hold now, and the most that they held since the last reset.
std::atomic<size_t> allocated{0}, peak{0};

// The size stands in front of the data, because a deleter is only given the pointer.
constexpr size_t kHeader = 64;

void release(void* data) {
  char* block = static_cast<char*>(data) - kHeader;
  size_t size;
  std::memcpy(&size, block, sizeof size);
  allocated -= size;
  std::free(block);
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    if (size == 0) return {nullptr, nullptr, &release_nothing, kDevice};
    char* block = static_cast<char*>(std::aligned_alloc(64, (size + kHeader + 63) / 64 * 64));
    TORCH_CHECK(block != nullptr, "emulated device: out of memory, ", size, " bytes");
    std::memcpy(block, &size, sizeof size);
    const size_t now = allocated += size;
    size_t seen = peak;
    while (seen < now && !peak.compare_exchange_weak(seen, now)) {
    }
    return {block + kHeader, block + kHeader, &release, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t size) const override { std::memcpy(to, from, size); }

 private:
  static void release_nothing(void*) {}
};
Allocator allocator;
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &allocator);

const c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

at::Tensor empty(c10::SymIntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(sizes), &allocator, kKeys, c10::dtype_or_default(dtype),
                                   format);
}

at::Tensor empty_strided(c10::SymIntArrayRef sizes, c10::SymIntArrayRef strides, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides), &allocator,
                                           kKeys, c10::dtype_or_default(dtype));
}

// The same memory as a CPU tensor: an in-place or out= kernel writes straight into the device tensor.
at::Tensor on_cpu(const at::Tensor& tensor) {
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), tensor.options().device(at::kCPU));
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& to, bool) {
  at::Tensor source = self.is_cpu() ? self : on_cpu(self);
  at::Tensor target = to.is_cpu() ? to : on_cpu(to);
  target.copy_(source);
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& to) {
  if (to.sizes() != self.sizes()) to.resize_(self.sizes());
  return copy_from(self, to, false);
}

at::Tensor as_strided(const at::Tensor& self, c10::SymIntArrayRef sizes, c10::SymIntArrayRef strides,
                      std::optional<c10::SymInt> offset) {
  auto result = at::detail::make_tensor<at::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(self.storage()),
                                                        self.key_set(), self.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides),
                                                      offset ? offset->expect_int() : self.storage_offset());
  return result;
}

at::Tensor view(const at::Tensor& self, c10::SymIntArrayRef asked) {
  auto inferred = at::infer_size(C10_AS_INTARRAYREF_SLOW(asked), self.numel());
  at::DimVector sizes(inferred.begin(), inferred.end());
  auto strides = at::detail::computeStride(self.sizes(), self.strides(), sizes);
  TORCH_CHECK(strides.has_value(), "view size is not compatible with the input's size and stride");
  return as_strided(self, c10::fromIntArrayRefSlow(sizes), c10::fromIntArrayRefSlow(*strides), std::nullopt);
}

at::Tensor reshape_alias(const at::Tensor& self, c10::SymIntArrayRef sizes, c10::SymIntArrayRef strides) {
  return as_strided(self, sizes, strides, std::nullopt);
}

at::Scalar local_scalar(const at::Tensor& self) {
  return on_cpu(self).item();
}

void resize_bytes(const c10::Storage& storage, size_t size) {
  auto* impl = storage.unsafeGetStorageImpl();
  auto data = allocator.allocate(size);
  if (impl->data() && size) std::memcpy(data.get(), impl->data(), std::min(size, impl->nbytes()));
  impl->set_data_ptr(std::move(data));
  impl->set_nbytes(size);
}

const at::Tensor& resize(const at::Tensor& self, c10::SymIntArrayRef sizes, std::optional<at::MemoryFormat>) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(sizes));
  const size_t size = (self.numel() + self.storage_offset()) * self.element_size();
  if (impl->storage().nbytes() < size) resize_bytes(impl->storage(), size);
  return self;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage storage, c10::SymInt offset, c10::SymIntArrayRef sizes,
                        c10::SymIntArrayRef strides) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  if (strides.empty() && !sizes.empty()) {
    impl->set_storage_offset(offset.expect_int());
    impl->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(sizes));
  } else {
    impl->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides), offset.expect_int());
  }
  return self;
}

at::Tensor& set_whole_storage(at::Tensor& self, at::Storage storage) {
  const auto size = static_cast<int64_t>(storage.nbytes() / self.element_size());
  return set_storage(self, std::move(storage), 0, c10::SymInt(size), {});
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("as_strided", &as_strided);
  m.impl("view", &view);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("_local_scalar_dense", &local_scalar);
  m.impl("resize_", &resize);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
}

using Pairs = std::vector<std::pair<at::Tensor, at::Tensor>>;

// The result of a CPU kernel as a tensor of the device: the argument that it is, or a copy.
at::Tensor on_device(const at::Tensor& result, const std::vector<at::Tensor>& arguments, const Pairs& empties) {
  if (!result.defined() || !result.is_cpu()) return result;
  for (const auto& [stand_in, real] : empties)
    if (stand_in.is_same(result)) return real;
  for (const at::Tensor& argument : arguments)
    if (argument.numel() && result.numel() && argument.data_ptr() == result.data_ptr() &&
        argument.sizes() == result.sizes() && argument.strides() == result.strides())
      return argument;
  at::Tensor copy = at::empty_strided(result.sizes(), result.strides(), result.options().device(kDevice));
  if (result.numel()) on_cpu(copy).copy_(result);
  return copy;
}

// Every operator without a kernel above: run the CPU kernel on the same memory.
void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const size_t first = stack->size() - op.schema().arguments().size();
  std::vector<at::Tensor> arguments;
  Pairs empties;  // tensors that may grow, and the CPU tensors that stand in for them
  bool cpu = false;
  auto replace = [&](const at::Tensor& tensor, bool out = false) -> at::Tensor {
    if (!tensor.defined()) return tensor;
    if (!tensor.is_privateuseone()) {
      cpu |= tensor.is_cpu() && tensor.dim() > 0;
      return tensor;
    }
    arguments.push_back(tensor);
    if (tensor.numel() && !out) return on_cpu(tensor);
    if (out) {  // a kernel may resize its out= tensor, and then again: smooth_l1_loss does
      empties.emplace_back(at::empty({0}, tensor.options().device(at::kCPU)), tensor);
      return empties.back().first;
    }
    empties.emplace_back(at::empty(tensor.sizes(), tensor.options().device(at::kCPU)), tensor);
    return empties.back().first;
  };
  for (size_t i = first; i < stack->size(); ++i) {
    c10::IValue& value = (*stack)[i];
    if (value.isTensor()) {
      const c10::Argument& argument = op.schema().arguments()[i - first];
      const bool written = argument.alias_info() && argument.alias_info()->isWrite();
      value = replace(value.toTensor(), argument.kwarg_only() && written);
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(replace(tensor));
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor> tensor : value.toOptionalTensorList())
        list.push_back(tensor ? std::optional<at::Tensor>(replace(*tensor)) : tensor);
      value = list;
    } else if (value.isDevice() && value.toDevice().is_privateuseone()) {
      value = c10::Device(c10::DeviceType::CPU);
    }
  }
  // A card takes indices of the CPU in these two.
  const std::string& name = op.schema().name();
  TORCH_CHECK(!cpu || arguments.empty() || name == "aten::index" || name == "aten::index_put_",
              "Expected all tensors to be on the same device: ", name);
  op.callBoxed(stack);
  for (auto& [stand_in, real] : empties) {
    if (real.sizes() != stand_in.sizes()) real.resize_(stand_in.sizes());
    if (real.numel()) on_cpu(real).copy_(stand_in);
  }
  for (size_t i = stack->size() - op.schema().returns().size(); i < stack->size(); ++i) {
    c10::IValue& value = (*stack)[i];
    if (value.isTensor()) {
      value = on_device(value.toTensor(), arguments, empties);
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(on_device(tensor, arguments, empties));
      value = list;
    }
  }
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

// torch.autocast: the products compute in the lower precision, all other operators in the dtype of their arguments.
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(mm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(bmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(addmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(scaled_dot_product_attention, lower_precision_fp)
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isAvailable() const override { return true; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override { resize_bytes(storage, size); }
};
const bool registered = (at::RegisterPrivateUse1HooksInterface(new Hooks), true);

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("memory_allocated", [] { return allocated.load(); });
  m.def("max_memory_allocated", [] { return peak.load(); });
  m.def("reset_peak_memory_stats", [] { peak = allocated.load(); });
}
