#include "rcp/cpu/decode_attention.h"

#include <cmath>

#include "binding.h"

namespace {

using namespace rcp;
using namespace rcp::binding;

void check_cache(const Tensor& t, const std::string& what, ScalarType dtype, int64_t batch, int64_t dim) {
  if (t.dim() != 4) {
    fail(what + " must have 4 dimensions, [batch, kv_heads, capacity, head_dim], got shape " + shape_text(t) +
         "; pass the storage of the cache");
  }
  check_tensor(t, what, dtype, {batch, t.size(1), t.size(2), dim});
  if (!t.is_contiguous()) fail(what + " must be contiguous, got shape " + shape_text(t) + " with other strides");
}

Tensor decode_attention_cpu(const Tensor& qkv_in, const Tensor& cosine_in, const Tensor& sine_in, Tensor keys,
                            Tensor values, int64_t length, double scale) {
  const std::string where = "decode_attention: ";
  DecodeAttention a{};
  a.type = float_type(qkv_in, where + "qkv");
  if (qkv_in.dim() != 3 || qkv_in.size(1) != 1) {
    fail(where + "qkv must have shape [batch, 1, features], got " + shape_text(qkv_in) + "; pass one token");
  }
  if (keys.dim() != 4) fail(where + "keys must have 4 dimensions, got shape " + shape_text(keys) + "; pass a cache");
  const ScalarType dtype = qkv_in.scalar_type();
  a.batch = qkv_in.size(0);
  a.kv_heads = keys.size(1);
  a.capacity = keys.size(2);
  a.dim = keys.size(3);
  a.length = length;
  a.scale = static_cast<float>(scale);
  check_cache(keys, where + "keys", dtype, a.batch, a.dim);
  check_tensor(values, where + "values", dtype, {a.batch, a.kv_heads, a.capacity, a.dim});
  if (!values.is_contiguous()) fail(where + "values must be contiguous, got other strides; pass the cache's storage");
  const int64_t features = qkv_in.size(2);
  a.heads = a.dim < 1 || features % a.dim ? 0 : features / a.dim - 2 * a.kv_heads;
  if (a.kv_heads < 1 || a.heads < 1 || a.heads % a.kv_heads || a.dim % 2) {
    fail(where + "qkv must have heads + 2 * kv_heads times head_dim features, with heads a multiple of kv_heads and " +
         "head_dim even, got " + std::to_string(features) + " features, " + std::to_string(a.kv_heads) +
         " kv_heads and head_dim " + std::to_string(a.dim) + "; pass the outputs of q, k and v side by side");
  }
  if (length < 0 || length >= a.capacity) {
    fail(where + "length must be from 0 to capacity - 1 (" + std::to_string(a.capacity - 1) + "), got " +
         std::to_string(length) + "; reserve more storage first");
  }
  if (!std::isfinite(scale)) fail(where + "scale must be finite, got " + std::to_string(scale) + "; use dim ** -0.5");
  for (const Tensor* table : {&cosine_in, &sine_in}) {
    const int64_t rows = table->dim() == 3 ? table->size(0) : 0;
    if (rows != 1 && rows != a.batch) {
      fail(where + "cos and sin must have shape [batch or 1, 1, head_dim], got " + shape_text(*table) +
           "; pass those of one position");
    }
    check_tensor(*table, where + (table == &cosine_in ? "cos" : "sin"), dtype, {rows, 1, a.dim});
  }
  const Tensor qkv = torch::stable::contiguous(qkv_in), cosine = torch::stable::contiguous(cosine_in),
               sine = torch::stable::contiguous(sine_in);
  Tensor out = empty({a.batch, 1, a.heads * a.dim}, dtype);
  a.qkv = qkv.const_data_ptr();
  a.cosine = cosine.const_data_ptr();
  a.sine = sine.const_data_ptr();
  a.cosine_stride = cosine.size(0) == 1 ? 0 : a.dim;
  a.sine_stride = sine.size(0) == 1 ? 0 : a.dim;
  a.keys = keys.mutable_data_ptr();
  a.values = values.mutable_data_ptr();
  a.out = out.mutable_data_ptr();
  rcp::decode_attention(a, current_isa(), torch_pool());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rcp_kernels, CPU, m) {
  m.impl("decode_attention", TORCH_BOX(&decode_attention_cpu));
}
