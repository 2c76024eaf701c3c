#include "rcp/cpu/decode_attention.h"

#include <cmath>

#include "binding.h"

namespace {

using namespace rcp;
using namespace rcp::binding;

// Fills the sizes of `a` from the tensors, and checks them.
void check_arguments(const Tensor& qkv, const Tensor& cosine, const Tensor& sine, const Tensor& keys,
                     const Tensor& values, DecodeAttention& a) {
  const std::string where = "decode_attention: ";
  a.type = float_type(qkv, where + "qkv");
  const ScalarType dtype = qkv.scalar_type();
  if (qkv.dim() != 3 || qkv.size(1) != 1) {
    fail(where + "qkv must have shape [batch, 1, features], got " + shape_text(qkv) + "; pass one token");
  }
  if (keys.dim() != 4) {
    fail(where + "keys must have 4 dimensions, [batch, kv_heads, capacity, head_dim], got shape " + shape_text(keys) +
         "; pass the storage of the cache");
  }
  a.batch = qkv.size(0);
  a.kv_heads = keys.size(1);
  a.capacity = keys.size(2);
  a.dim = keys.size(3);
  check_tensor(keys, where + "keys", dtype, {a.batch, a.kv_heads, a.capacity, a.dim});
  check_tensor(values, where + "values", dtype, {a.batch, a.kv_heads, a.capacity, a.dim});
  if (!keys.is_contiguous() || !values.is_contiguous()) {
    fail(where + "keys and values must be contiguous, got other strides; pass the storage of the cache");
  }
  const int64_t features = qkv.size(2);
  a.heads = a.dim < 1 || features % a.dim ? 0 : features / a.dim - 2 * a.kv_heads;
  if (a.kv_heads < 1 || a.heads < 1 || a.heads % a.kv_heads || a.dim % 2) {
    fail(where + "qkv must have heads + 2 * kv_heads times head_dim features, with heads a multiple of kv_heads and " +
         "head_dim even, got " + std::to_string(features) + " features, " + std::to_string(a.kv_heads) +
         " kv_heads and head_dim " + std::to_string(a.dim) + "; concatenate the outputs of q, k and v");
  }
  if (a.length < 0 || a.length >= a.capacity) {
    fail(where + "length must be from 0 to capacity - 1 (" + std::to_string(a.capacity - 1) + "), got " +
         std::to_string(a.length) + "; allocate a larger capacity");
  }
  if (!std::isfinite(a.scale)) {
    fail(where + "scale must be finite, got " + std::to_string(a.scale) + "; use dim ** -0.5");
  }
  for (const Tensor* table : {&cosine, &sine}) {
    const int64_t rows = table->dim() == 3 ? table->size(0) : 0;
    if (rows != 1 && rows != a.batch) {
      fail(where + "cos and sin must have shape [batch or 1, 1, head_dim], got " + shape_text(*table) +
           "; pass those of one position");
    }
    check_tensor(*table, where + (table == &cosine ? "cos" : "sin"), dtype, {rows, 1, a.dim});
  }
}

Tensor decode_attention_cpu(const Tensor& qkv_in, const Tensor& cosine_in, const Tensor& sine_in, Tensor keys,
                            Tensor values, int64_t from_held, double scale, const std::optional<Tensor>& held) {
  DecodeAttention a{};
  a.length = positions_from("decode_attention", held, from_held);
  a.scale = static_cast<float>(scale);
  check_arguments(qkv_in, cosine_in, sine_in, keys, values, a);
  const Tensor qkv = as_contiguous(qkv_in), cosine = as_contiguous(cosine_in), sine = as_contiguous(sine_in);
  Tensor out = empty({a.batch, 1, a.heads * a.dim}, qkv.scalar_type());
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
