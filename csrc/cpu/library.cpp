// The schemas of torch.ops.rcp_kernels, and an empty Python module. Its import registers all operators.
#include <Python.h>

#include <torch/csrc/stable/library.h>

#include "rcp/cpu/isa.h"

// The arguments of lut_linear and of lut_linear_fused.
#define LUT_LINEAR                                                                                                     \
  "Tensor x, Tensor weight, Tensor? bias, int out_features, int in_features, int bits, int group_size, int act_bits, " \
  "float clip=1.0, Tensor? rotation_base=None, Tensor? rotation_permutation=None, int rotation_group=0, "              \
  "Tensor? input_order=None"
// The arguments of the Walsh operators after x.
#define WALSH "Tensor? base, Tensor? permutation, int group_size, float scale, bool inverse"
// The arguments of the operators on a packed weight.
#define WEIGHT "Tensor weight, int out_features, int in_features, int bits, int group_size"

STABLE_TORCH_LIBRARY(rcp_kernels, m) {
  m.def("quantize_activation(Tensor x, int bits, float clip=1.0, bool packed=False) -> (Tensor, Tensor)");
  m.def("lut_linear(" LUT_LINEAR ") -> Tensor");
  m.def("lut_linear_fused(" LUT_LINEAR
        ", Tensor? norm_weight=None, float norm_eps=0.0, float norm_offset=0.0, int activation=0, "
        "Tensor? residual=None) -> Tensor");
  m.def(
      "pack_weight(Tensor codes, Tensor levels, Tensor scales, Tensor tensor_scale, int in_features, int bits, "
      "int group_size) -> Tensor");
  m.def("unpack_weight(" WEIGHT ") -> (Tensor codes, Tensor levels, Tensor scales, Tensor tensor_scale)");
  m.def("dequantize(" WEIGHT ", ScalarType dtype=float) -> Tensor");
  m.def("walsh_transform(Tensor x, " WALSH ") -> Tensor");
  m.def("walsh_transform_(Tensor(a!) x, " WALSH ") -> ()");
  m.def("walsh_quantize(Tensor x, " WALSH ", int bits, float clip=1.0, bool packed=False) -> (Tensor, Tensor)");
  m.def(
      "kv_cache_append(Tensor x, Tensor(a!) codes, Tensor(b!) scales, int position, float clip=1.0, "
      "Tensor? held=None) -> ()");
  m.def("kv_cache_dequantize(Tensor codes, Tensor scales, Tensor(a!) out) -> ()");
  m.def(
      "kv_cache_attention(Tensor query, Tensor key_codes, Tensor key_scales, Tensor value_codes, Tensor value_scales, "
      "int length, float scale, bool causal=True, int window=0, Tensor? mask=None, Tensor? held=None) -> Tensor");
  m.def("kmeans_levels(Tensor groups, int count, Tensor? importance=None) -> Tensor");
  m.def("clip_search(Tensor groups, int count, Tensor? importance=None) -> Tensor");
  m.def("nearest_codes(Tensor weight, Tensor table, int group_size, bool packed=False) -> Tensor");
  m.def(
      "gptq_round(Tensor(a!) block, Tensor upper, Tensor table, int first, int last) -> (Tensor codes, Tensor errors)");
  m.def(
      "decode_attention(Tensor qkv, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values, int length, "
      "float scale, Tensor? held=None) -> Tensor");
  m.def("plain_read(Tensor buffer, int streams) -> int");
  m.def("cpu_isa() -> int");
  m.def("cpu_isa_supported() -> int");
  m.def("set_cpu_isa(int isa) -> int");
}

namespace {

int64_t cpu_isa() {
  return static_cast<int64_t>(rcp::current_isa());
}
int64_t cpu_isa_supported() {
  return static_cast<int64_t>(rcp::supported_isa());
}
int64_t set_cpu_isa(int64_t isa) {
  return static_cast<int64_t>(rcp::set_isa(isa));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rcp_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("cpu_isa_supported", TORCH_BOX(&cpu_isa_supported));
  m.impl("set_cpu_isa", TORCH_BOX(&set_cpu_isa));
}

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
  static PyModuleDef module{PyModuleDef_HEAD_INIT, "_C", "Native ops of rcp_kernels; see torch.ops.rcp_kernels.", -1};
  return PyModule_Create(&module);
}
