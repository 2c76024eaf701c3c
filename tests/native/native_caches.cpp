// kv_cache_append, kv_cache_dequantize, kv_cache_attention and decode_attention.
#include "native.h"
#include "rcp/cpu/decode_attention.h"
#include "rcp/cpu/kv_cache.h"

namespace {

// x is raw bytes [vectors, tokens, head_dim] of the type. Returns codes and scales of [vectors, capacity], which start
// as 0xff, and the first vector * tokens + token that could not be stored.
py::tuple kv_cache_append(const Array<uint8_t>& x, const std::string& type_name, int64_t vectors, int64_t tokens,
                          int64_t head_dim, int64_t capacity, int64_t position, float clip, int isa, int threads) {
  const rcp::FloatType type = float_type(type_name);
  const rcp::KvShape shape{head_dim, capacity};
  require(x.size() == vectors * tokens * head_dim * static_cast<int64_t>(rcp::float_size(type)),
          "x must have vectors * tokens * head_dim elements");
  require(position >= 0 && position + tokens <= capacity, "no room");
  Array<uint8_t> codes({vectors, capacity, shape.row_bytes()});
  Array<uint16_t> scales({vectors, capacity, int64_t{2}});
  std::fill_n(codes.mutable_data(), codes.size(), uint8_t{0xff});
  std::fill_n(scales.mutable_data(), scales.size(), uint16_t{0xffff});
  const auto row = [&](int64_t vector, int64_t token) {
    return rcp::advance(x.data(), type, (vector * tokens + token) * head_dim);
  };
  rcp::FirstIndex bad;
  rcp::kv_cache_append(row, type, vectors, tokens, shape, clip, position, codes.mutable_data(), scales.mutable_data(),
                       bad, isa_of(isa), thread_pool(threads));
  return py::make_tuple(codes, scales, bad.any() ? bad.value() : -1);
}

rcp::KvShape checked_cache(const Array<uint8_t>& codes, const Array<uint16_t>& scales, int64_t head_dim) {
  const rcp::KvShape shape{head_dim, codes.shape(1)};
  require(codes.ndim() == 3 && codes.shape(2) == shape.row_bytes(), "codes must be [vectors, capacity, bytes]");
  require(scales.size() == codes.shape(0) * codes.shape(1) * 2, "scales must be [vectors, capacity, 2]");
  return shape;
}

Array<uint8_t> kv_cache_dequantize(const Array<uint8_t>& codes, const Array<uint16_t>& scales, int64_t head_dim,
                                   int64_t length, const std::string& type_name, int isa, int threads) {
  const rcp::FloatType type = float_type(type_name);
  const rcp::KvShape shape = checked_cache(codes, scales, head_dim);
  Array<uint8_t> out(codes.shape(0) * length * head_dim * static_cast<int64_t>(rcp::float_size(type)));
  std::fill_n(out.mutable_data(), out.size(), uint8_t{0xff});
  rcp::kv_cache_dequantize(codes.data(), scales.data(), codes.shape(0), length, shape, type, out.mutable_data(),
                           isa_of(isa), thread_pool(threads));
  return out;
}

// query and the result are raw bytes [vectors * groups, queries, head_dim]; a batch of one, vectors are its heads. The
// mask is [queries, length] or None. Returns None where the query is not finite.
py::object kv_cache_attention(const Array<uint8_t>& query, const std::string& type_name, int64_t groups,
                              int64_t queries, int64_t head_dim, const Array<uint8_t>& key_codes,
                              const Array<uint16_t>& key_scales, const Array<uint8_t>& value_codes,
                              const Array<uint16_t>& value_scales, int64_t length, float scale, bool causal,
                              int64_t window, const py::object& mask, int isa, int threads) {
  rcp::KvAttention a{};
  a.type = float_type(type_name);
  a.shape = checked_cache(key_codes, key_scales, head_dim);
  checked_cache(value_codes, value_scales, head_dim);
  a.batch = 1;
  a.kv_heads = key_codes.shape(0);
  a.groups = groups;
  a.queries = queries;
  a.length = length;
  require(length <= a.shape.capacity && value_codes.size() == key_codes.size(), "length must fit both caches");
  require(query.size() == a.kv_heads * groups * queries * head_dim * static_cast<int64_t>(rcp::float_size(a.type)),
          "query must have kv_heads * groups * queries * head_dim elements");
  Array<uint8_t> out(query.size()), mask_array;
  std::fill_n(out.mutable_data(), out.size(), uint8_t{0xff});
  if (!mask.is_none()) {
    mask_array = mask.cast<Array<uint8_t>>();
    require(mask_array.size() == queries * length, "mask must be [queries, length]");
    a.mask = mask_array.data();
    a.mask_query = length;
  }
  a.query = query.data();
  a.out = out.mutable_data();
  a.key_codes = key_codes.data();
  a.key_scales = key_scales.data();
  a.value_codes = value_codes.data();
  a.value_scales = value_scales.data();
  a.scale = scale;
  a.causal = causal;
  a.window = window;
  if (!rcp::kv_cache_attention(a, isa_of(isa), thread_pool(threads))) {
    return py::none();
  }
  return std::move(out);
}

// qkv is raw bytes [batch, heads + 2 * kv_heads, dim], cosine and sine [rows, dim] with one row or one a sequence,
// the caches [batch, kv_heads, capacity, dim]. Returns the outputs, which start as NaN, and the caches after the
// call.
py::tuple decode_attention(const Array<uint8_t>& qkv, const Array<uint8_t>& cosine, const Array<uint8_t>& sine,
                           const Array<uint8_t>& keys, const Array<uint8_t>& values, const std::string& type_name,
                           int64_t batch, int64_t heads, int64_t kv_heads, int64_t dim, int64_t capacity,
                           int64_t length, float scale, int isa, int threads) {
  rcp::DecodeAttention a{};
  a.type = float_type(type_name);
  const int64_t element = static_cast<int64_t>(rcp::float_size(a.type));
  require(qkv.size() == batch * (heads + 2 * kv_heads) * dim * element, "qkv has the wrong size");
  require(keys.size() == batch * kv_heads * capacity * dim * element && values.size() == keys.size(), "caches");
  require(cosine.size() == sine.size() && length < capacity && heads % kv_heads == 0 && dim % 2 == 0, "arguments");
  require(cosine.size() == dim * element || cosine.size() == batch * dim * element, "tables");
  Array<uint8_t> out(batch * heads * dim * element), new_keys(keys.size()), new_values(values.size());
  std::fill_n(out.mutable_data(), out.size(), uint8_t{0xff});
  std::copy_n(keys.data(), keys.size(), new_keys.mutable_data());
  std::copy_n(values.data(), values.size(), new_values.mutable_data());
  const int64_t stride = cosine.size() == dim * element ? 0 : dim;
  a.qkv = qkv.data();
  a.cosine = cosine.data();
  a.sine = sine.data();
  a.cosine_stride = a.sine_stride = stride;
  a.keys = new_keys.mutable_data();
  a.values = new_values.mutable_data();
  a.batch = batch;
  a.heads = heads;
  a.kv_heads = kv_heads;
  a.dim = dim;
  a.capacity = capacity;
  a.length = length;
  a.scale = scale;
  a.out = out.mutable_data();
  rcp::decode_attention(a, isa_of(isa), thread_pool(threads));
  return py::make_tuple(out, new_keys, new_values);
}

}  // namespace

void add_caches(py::module_& m) {
  m.def("kv_cache_append", &kv_cache_append);
  m.def("kv_cache_dequantize", &kv_cache_dequantize);
  m.def("kv_cache_attention", &kv_cache_attention);
  m.def("decode_attention", &decode_attention);
}
