#include "rcp/cpu/kv_cache.h"

#include "binding.h"

namespace {

using namespace rcp;
using namespace rcp::binding;

// The two tensors of a cache, [batch, kv_heads, capacity, bytes] and [batch, kv_heads, capacity, 2].
struct Storage {
  KvShape shape;
  int64_t batch, kv_heads;

  Storage(const std::string& op, const std::string& prefix, const Tensor& codes, const Tensor& scales, int64_t head_dim)
      : shape{head_dim, 0} {
    const std::string codes_name = op + ": " + prefix + "codes", scales_name = op + ": " + prefix + "scales";
    if (codes.dim() != 4 || codes.size(3) != shape.row_bytes()) {
      fail(codes_name + " must be [batch, kv_heads, capacity, " + std::to_string(shape.row_bytes()) +
           "] for head_dim " + std::to_string(head_dim) + ", got shape " + shape_text(codes) +
           "; allocate it for this head_dim");
    }
    batch = codes.size(0);
    kv_heads = codes.size(1);
    shape.capacity = codes.size(2);
    check_tensor(codes, codes_name, ScalarType::Byte, {batch, kv_heads, shape.capacity, shape.row_bytes()});
    check_tensor(scales, scales_name, ScalarType::Half, {batch, kv_heads, shape.capacity, 2});
    if (!codes.is_contiguous() || !scales.is_contiguous()) {
      fail(codes_name + " and scales must be contiguous, got other strides; pass all of the cache, with its length");
    }
  }
};

// The type of x, activations of four dimensions.
FloatType check_four(const std::string& op, const std::string& name, const Tensor& x, const std::string& shape) {
  if (!x.is_cpu()) fail(op + ": " + name + " must be on the CPU like the other arguments; move it with .cpu()");
  if (x.dim() != 4 || x.size(3) < 1) {
    fail(op + ": " + name + " must be " + shape + " with head_dim at least 1, got shape " + shape_text(x) +
         "; reshape it");
  }
  return float_type(x, op + ": " + name);
}

void check_range(const std::string& op, const std::string& what, int64_t value, int64_t low, int64_t high,
                 const std::string& remedy) {
  if (value < low || value > high) {
    fail(op + ": " + what + " must be " + std::to_string(low) + " to " + std::to_string(high) + ", got " +
         std::to_string(value) + "; " + remedy);
  }
}

void kv_cache_append_cpu(const Tensor& x_in, Tensor codes, Tensor scales, int64_t from_held, double clip,
                         const std::optional<Tensor>& held) {
  const std::string op = "kv_cache_append";
  const int64_t position = positions_from(op, held, from_held);
  const FloatType type = check_four(op, "x", x_in, "[batch, kv_heads, tokens, head_dim]");
  check_clip(op, clip);
  const Storage storage(op, "", codes, scales, x_in.size(3));
  if (x_in.size(0) != storage.batch || x_in.size(1) != storage.kv_heads) {
    fail(op + ": x must have the batch and kv_heads of codes, " + shape_text(codes) + ", got shape " +
         shape_text(x_in) + "; append to the cache of the same layer and batch");
  }
  const int64_t tokens = x_in.size(2), heads = storage.kv_heads;
  check_range(op, "position + tokens", position + tokens, tokens, storage.shape.capacity,
              "position must not be negative, and a full cache must be allocated with a larger capacity");
  const Tensor x = x_in.stride(3) == 1 ? x_in : torch::stable::contiguous(x_in);
  const void* from = x.const_data_ptr();
  const int64_t batch_stride = x.stride(0), head_stride = x.stride(1), token_stride = x.stride(2);
  const auto row = [=](int64_t vector, int64_t token) {
    return advance(from, type, vector / heads * batch_stride + vector % heads * head_stride + token * token_stride);
  };
  FirstIndex bad;
  rcp::kv_cache_append(row, type, storage.batch * heads, tokens, storage.shape, static_cast<float>(clip), position,
                       mutable_data<uint8_t>(codes), mutable_data<uint16_t>(scales), bad, current_isa(), torch_pool());
  if (bad.any()) {
    fail(op + ": x must be finite and within float16's range, but batch " +
         std::to_string(bad.value() / tokens / heads) + ", head " + std::to_string(bad.value() / tokens % heads) +
         ", token " + std::to_string(bad.value() % tokens) + " holds NaN, Inf or more than 65504; find its source");
  }
}

void kv_cache_dequantize_cpu(const Tensor& codes, const Tensor& scales, Tensor out) {
  const std::string op = "kv_cache_dequantize";
  const FloatType type = check_four(op, "out", out, "[batch, kv_heads, length, head_dim]");
  const Storage storage(op, "", codes, scales, out.size(3));
  check_tensor(out, op + ": out", out.scalar_type(), {storage.batch, storage.kv_heads, out.size(2), out.size(3)});
  check_range(op, "the length of out", out.size(2), 0, storage.shape.capacity, "read only positions of the cache");
  if (!out.is_contiguous()) {
    fail(op + ": out must be contiguous, got shape " + shape_text(out) + " with other strides; use torch.empty");
  }
  rcp::kv_cache_dequantize(data<uint8_t>(codes), data<uint16_t>(scales), storage.batch * storage.kv_heads, out.size(2),
                           storage.shape, type, out.mutable_data_ptr(), current_isa(), torch_pool());
}

// Points the arguments into a mask of `width` positions, and returns the tensor that must be kept.
Tensor set_mask(const std::string& op, const Tensor& mask_in, int64_t heads, int64_t width, KvAttention& a) {
  const bool fits = mask_in.dim() == 4 && (mask_in.size(0) == a.batch || mask_in.size(0) == 1) &&
                    (mask_in.size(1) == heads || mask_in.size(1) == 1) && mask_in.size(2) == a.queries &&
                    mask_in.size(3) == width;
  if (!mask_in.is_cpu() || mask_in.scalar_type() != ScalarType::Bool || !fits) {
    fail(op + ": mask must be bool [batch or 1, heads or 1, " + std::to_string(a.queries) + ", " +
         std::to_string(width) + "] on the CPU, true where a query may attend, got " +
         torch::headeronly::toString(mask_in.scalar_type()) + " " + shape_text(mask_in) + "; slice or convert it");
  }
  const Tensor mask = width > 1 && mask_in.stride(3) != 1 ? torch::stable::contiguous(mask_in) : mask_in;
  a.mask = data<uint8_t>(mask);
  a.mask_batch = mask.size(0) == 1 ? 0 : mask.stride(0);
  a.mask_head = mask.size(1) == 1 ? 0 : mask.stride(1);
  a.mask_query = mask.stride(2);
  return mask;
}

Tensor kv_cache_attention_cpu(const Tensor& query_in, const Tensor& key_codes, const Tensor& key_scales,
                              const Tensor& value_codes, const Tensor& value_scales, int64_t from_held, double scale,
                              bool causal, int64_t window, const std::optional<Tensor>& mask_in,
                              const std::optional<Tensor>& held) {
  const std::string op = "kv_cache_attention";
  const int64_t length = positions_from(op, held, from_held);
  KvAttention a{};
  a.type = check_four(op, "query", query_in, "[batch, heads, queries, head_dim]");
  const Storage keys(op, "key_", key_codes, key_scales, query_in.size(3));
  const Storage values(op, "value_", value_codes, value_scales, query_in.size(3));
  check_tensor(value_codes, op + ": value_codes", ScalarType::Byte,
               {keys.batch, keys.kv_heads, keys.shape.capacity, keys.shape.row_bytes()});
  if (query_in.size(0) != keys.batch || keys.kv_heads < 1 || query_in.size(1) % keys.kv_heads != 0) {
    fail(op + ": query must have the batch of the cache and a multiple of its heads, " + shape_text(key_codes) +
         ", got shape " + shape_text(query_in) + "; pass the cache of the same layer");
  }
  a.batch = keys.batch;
  a.kv_heads = keys.kv_heads;
  a.groups = query_in.size(1) / keys.kv_heads;
  a.queries = query_in.size(2);
  a.length = length;
  check_range(op, "length", length, 0, keys.shape.capacity, "pass the number of positions appended so far");
  if (causal || window > 0) {
    check_range(op, "the number of queries", a.queries, 0, length,
                "causal attention and a window need each query's own position in the cache: append first");
  }
  if (window < 0) {
    fail(op + ": window must not be negative, got " + std::to_string(window) + "; 0 attends to all positions");
  }
  const Tensor query = as_contiguous(query_in);
  std::optional<Tensor> mask;
  // With `held` the shapes are the same in every step: the mask covers the capacity.
  const int64_t width = held.has_value() ? keys.shape.capacity : length;
  if (mask_in.has_value()) mask = set_mask(op, *mask_in, query.size(1), width, a);
  Tensor out = empty(with_last(query, query.size(3)), query.scalar_type());
  a.shape = keys.shape;
  a.query = query.const_data_ptr();
  a.out = out.mutable_data_ptr();
  a.key_codes = data<uint8_t>(key_codes);
  a.key_scales = data<uint16_t>(key_scales);
  a.value_codes = data<uint8_t>(value_codes);
  a.value_scales = data<uint16_t>(value_scales);
  a.scale = static_cast<float>(scale);
  a.causal = causal;
  a.window = window;
  if (!rcp::kv_cache_attention(a, current_isa(), torch_pool())) {
    fail(op + ": query must be finite, but holds NaN or Inf; find its source");
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rcp_kernels, CPU, m) {
  m.impl("kv_cache_append", TORCH_BOX(&kv_cache_append_cpu));
  m.impl("kv_cache_dequantize", TORCH_BOX(&kv_cache_dequantize_cpu));
  m.impl("kv_cache_attention", TORCH_BOX(&kv_cache_attention_cpu));
}
