// numpy in, numpy out: the CPU kernels without torch in the process, for property tests and for the sanitizers.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <thread>

#include "rcp/cpu/clip_search.h"
#include "rcp/cpu/decode_attention.h"
#include "rcp/cpu/gptq_round.h"
#include "rcp/cpu/kmeans_levels.h"
#include "rcp/cpu/kv_cache.h"
#include "rcp/cpu/lut_linear.h"
#include "rcp/cpu/nearest_codes.h"
#include "rcp/cpu/plain_read.h"
#include "rcp/cpu/walsh_transform.h"
#if RCP_X86
#include "soft_tiles.h"
#endif

namespace py = pybind11;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

// Threads are started for every call, so that the thread sanitizer and the address sanitizer see them end.
rcp::ThreadPool thread_pool(int threads) {
  return {threads, [](int workers, void (*body)(void*), void* context) {
            std::vector<std::thread> others;
            for (int i = 1; i < workers; ++i) others.emplace_back(body, context);
            body(context);
            for (std::thread& t : others) t.join();
          }};
}

rcp::FloatType float_type(const std::string& name) {
  if (name == "float32") return rcp::FloatType::float32;
  if (name == "float16") return rcp::FloatType::float16;
  if (name == "bfloat16") return rcp::FloatType::bfloat16;
  throw std::invalid_argument("float type must be float32, float16 or bfloat16, got " + name);
}

void require(bool holds, const char* rule) {
  if (!holds) throw std::invalid_argument(rule);
}

// x is raw bytes: [tokens, columns] of the type.
py::tuple quantize_activation(const Array<uint8_t>& x, const std::string& type_name, int64_t tokens, int64_t columns,
                              int bits, float clip, int isa) {
  const rcp::FloatType type = float_type(type_name);
  require(x.size() == tokens * columns * static_cast<int64_t>(rcp::float_size(type)),
          "x must have tokens * columns elements");
  Array<int8_t> q({tokens, columns});
  Array<float> scales(tokens);
  Array<int64_t> sums(tokens);
  const rcp::QuantizeKernels kernels = rcp::quantize_kernels(rcp::checked_isa(static_cast<rcp::Isa>(isa), "isa"));
  const float qmax = rcp::quantization_maximum(bits);
  bool all_finite = true;
  for (int64_t m = 0; m < tokens; ++m) {
    const void* row = rcp::advance(x.data(), type, m * columns);
    bool finite = true;
    const float scale = rcp::token_scale(kernels, row, type, columns, qmax, clip, finite);
    all_finite = all_finite && finite;
    scales.mutable_at(m) = scale;
    int8_t* out = q.mutable_data() + m * columns;
    kernels.quantize(row, type, columns, scale > 0.0f ? 1.0f / scale : 0.0f, qmax, out);
    sums.mutable_at(m) = kernels.sum(out, columns);
  }
  return py::make_tuple(q, scales, sums, all_finite);
}

Array<uint8_t> pack_nibbles(const Array<int8_t>& q) {
  Array<uint8_t> packed((q.size() + 1) / 2);
  rcp::pack_nibbles(q.data(), q.size(), packed.mutable_data());
  return packed;
}

rcp::WeightShape checked_shape(int64_t rows, int64_t columns, int bits, int64_t group_size) {
  const rcp::WeightShape shape{rows, columns, group_size, bits};
  shape.check("native");
  return shape;
}

Array<uint8_t> pack_weight(const Array<uint8_t>& codes, const Array<int8_t>& levels, const Array<uint16_t>& scales,
                           float tensor_scale, int64_t columns, int bits, int64_t group_size, int threads) {
  rcp::WeightShape shape = checked_shape(codes.shape(0), columns, bits, group_size);
  shape.uniform = levels.ndim() == 3 && levels.shape(2) == 1;
  require(codes.ndim() == 2 && codes.shape(1) == shape.canonical_row_bytes(), "codes have the wrong shape");
  require(levels.size() == shape.rows * shape.groups() * shape.stored_levels(), "levels have the wrong shape");
  require(scales.size() == shape.rows * shape.groups(), "scales have the wrong shape");
  Array<uint8_t> packed(shape.packed_bytes());
  rcp::pack_weight(shape, codes.data(), levels.data(), scales.data(), tensor_scale, packed.mutable_data(),
                   thread_pool(threads));
  return packed;
}

py::tuple unpack_weight(const Array<uint8_t>& packed, int64_t rows, int64_t columns, int bits, int64_t group_size,
                        int threads) {
  rcp::WeightShape shape = checked_shape(rows, columns, bits, group_size);
  const float tensor_scale = rcp::check_packed("unpack_weight", shape, packed.data(), packed.size());
  Array<uint8_t> codes({shape.rows, shape.canonical_row_bytes()});
  Array<int8_t> levels({shape.rows, shape.groups(), int64_t{shape.levels()}});
  Array<uint16_t> scales({shape.rows, shape.groups()});
  rcp::unpack_weight(shape, packed.data(), codes.mutable_data(), levels.mutable_data(), scales.mutable_data(),
                     thread_pool(threads));
  return py::make_tuple(codes, levels, scales, tensor_scale);
}

#if RCP_X86
template <int BITS>
rcp::detail::Plan soft_plan_for() {
  return {rcp::amx::lut_linear_many<BITS, rcp::amx::SoftTiles>, rcp::ActivationOrder::rows, 1, 16};
}

// The AMX plan with its instructions computed in software, at any number of tokens.
rcp::detail::Plan soft_amx_plan(rcp::Isa isa, int bits, int64_t tokens, int act_bits, rcp::FloatType type) {
  if (act_bits == 16) return rcp::detail::plan(isa, bits, tokens, act_bits, type);
  if (bits == 2) return soft_plan_for<2>();
  if (bits == 3) return soft_plan_for<3>();
  return soft_plan_for<4>();
}
#endif

// The usual plan, but walking four row blocks at once as on Intel, whatever this CPU is.
rcp::detail::Plan four_stream_plan(rcp::Isa isa, int bits, int64_t tokens, int act_bits, rcp::FloatType type) {
  rcp::detail::Plan plan = rcp::detail::plan(isa, bits, tokens, act_bits, type);
  plan.streams = 4;
  return plan;
}

// The usual plan of float32 activations: bfloat16 ones are widened, as on a CPU without AVX512-BF16.
rcp::detail::Plan widened_plan(rcp::Isa isa, int bits, int64_t tokens, int act_bits, rcp::FloatType) {
  return rcp::detail::plan(isa, bits, tokens, act_bits, rcp::FloatType::float32);
}

// Returns raw bytes [tokens, rows] of the type; they start as 0xff, which is NaN in all three types.
Array<uint8_t> lut_linear(const Array<uint8_t>& x, const std::string& type_name, const Array<uint8_t>& packed,
                          const py::object& bias, int64_t tokens, int64_t rows, int64_t columns, int bits,
                          int64_t group_size, int act_bits, float clip, int isa, int threads,
                          const std::string& variant, const py::object& input_order, const py::object& norm_weight,
                          float norm_epsilon, float norm_offset, int activation, const py::object& residual) {
  rcp::LutLinearArguments a{};
  a.shape = checked_shape(rows, columns, bits, group_size);
  a.type = float_type(type_name);
  const int64_t element = static_cast<int64_t>(rcp::float_size(a.type));
  a.activation = static_cast<rcp::GatedActivation>(activation);
  require(x.size() == tokens * a.inputs() * element, "x must have tokens * columns elements, or twice as many");
  a.tensor_scale = rcp::check_packed("lut_linear", a.shape, packed.data(), packed.size());
  a.packed = packed.data();
  a.x = x.data();
  a.tokens = tokens;
  a.act_bits = act_bits;
  a.clip = clip;
  Array<float> bias_array;
  if (!bias.is_none()) {
    bias_array = bias.cast<Array<float>>();
    require(bias_array.size() == rows, "bias must have one element per row");
    a.bias = bias_array.data();
    a.bias_type = rcp::FloatType::float32;
  }
  Array<int64_t> order_array;
  if (!input_order.is_none()) {
    order_array = input_order.cast<Array<int64_t>>();
    require(order_array.size() == columns, "input_order must have one element per column");
    for (int64_t k = 0; k < columns; ++k) {
      require(order_array.data()[k] >= 0 && order_array.data()[k] < columns, "input_order must hold columns");
    }
    a.input_order = order_array.data();
  }
  Array<float> norm_array;
  if (!norm_weight.is_none()) {
    norm_array = norm_weight.cast<Array<float>>();
    require(norm_array.size() == columns, "norm_weight must have one element per column");
    a.norm = {norm_array.data(), rcp::FloatType::float32, norm_epsilon, norm_offset};
  }
  Array<uint8_t> residual_array;
  if (!residual.is_none()) {
    residual_array = residual.cast<Array<uint8_t>>();
    require(residual_array.size() == tokens * rows * element, "residual must have tokens * rows elements");
    a.residual = residual_array.data();
  }
  Array<uint8_t> y(tokens * rows * element);
  std::fill_n(y.mutable_data(), y.size(), uint8_t{0xff});
  a.y = y.mutable_data();
  const rcp::Isa chosen = rcp::checked_isa(static_cast<rcp::Isa>(isa), "isa");
  const rcp::ThreadPool pool = thread_pool(threads);
  py::gil_scoped_release release;
  if (variant == "four streams") {
    rcp::lut_linear(a, chosen, pool, four_stream_plan);
    return y;
  }
  if (variant == "widened") {
    rcp::lut_linear(a, chosen, pool, widened_plan);
    return y;
  }
#if RCP_X86
  if (variant == "soft amx") {
    rcp::lut_linear(a, chosen, pool, soft_amx_plan);
    return y;
  }
#endif
  require(variant.empty(), "variant must be 'four streams', 'widened', 'soft amx' (x86-64) or empty");
  rcp::lut_linear(a, chosen, pool);
  return y;
}

// x and the result are raw bytes [blocks, n]; the result starts as NaN. base and permutation may be None.
Array<uint8_t> walsh_transform(const Array<uint8_t>& x, const std::string& type_name, int64_t blocks, int64_t n,
                               int64_t m, const py::object& base, const py::object& permutation, float scale,
                               bool inverse, int isa, int threads, bool in_place) {
  const rcp::FloatType type = float_type(type_name);
  require(x.size() == blocks * n * static_cast<int64_t>(rcp::float_size(type)), "x must have blocks * n elements");
  int bits = 0;
  while ((m << bits) < n) ++bits;
  require((m << bits) == n && bits <= rcp::max_walsh_bits, "n must be m * 2^k");
  Array<float> base_array;
  Array<int32_t> order_array;
  if (!base.is_none()) base_array = base.cast<Array<float>>();
  if (!permutation.is_none()) order_array = permutation.cast<Array<int32_t>>();
  require(base.is_none() || base_array.size() == m * m, "base must be [m, m]");
  require(permutation.is_none() || order_array.size() == n, "permutation must be [n]");
  const rcp::WalshTransform t{n,
                              m,
                              bits,
                              base.is_none() ? nullptr : base_array.data(),
                              permutation.is_none() ? nullptr : order_array.data(),
                              scale,
                              inverse};
  Array<uint8_t> y(x.size());
  if (in_place) {
    std::copy_n(x.data(), x.size(), y.mutable_data());
  } else {
    std::fill_n(y.mutable_data(), y.size(), uint8_t{0xff});
  }
  const rcp::Isa chosen = rcp::checked_isa(static_cast<rcp::Isa>(isa), "isa");
  rcp::walsh_transform(t, in_place ? y.data() : x.data(), y.mutable_data(), type, blocks, chosen, thread_pool(threads));
  return y;
}

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
  const int64_t bad = rcp::kv_cache_append(row, type, vectors, tokens, shape, clip, position, codes.mutable_data(),
                                           scales.mutable_data(), rcp::checked_isa(static_cast<rcp::Isa>(isa), "isa"),
                                           thread_pool(threads));
  return py::make_tuple(codes, scales, bad);
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
                           rcp::checked_isa(static_cast<rcp::Isa>(isa), "isa"), thread_pool(threads));
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
  if (!rcp::kv_cache_attention(a, rcp::checked_isa(static_cast<rcp::Isa>(isa), "isa"), thread_pool(threads))) {
    return py::none();
  }
  return std::move(out);
}

struct Groups {
  Groups(const Array<float>& groups, const py::object& importance) : values(groups) {
    require(groups.ndim() == 2 && groups.shape(1) > 0, "groups must be [groups, length]");
    g.values = values.data();
    g.groups = groups.shape(0);
    g.length = groups.shape(1);
    if (!importance.is_none()) {
      weights = importance.cast<Array<float>>();
      require(weights.size() == groups.size(), "importance must have the shape of groups");
      g.importance = weights.data();
    }
  }
  Array<float> values, weights;
  rcp::LevelGroups g{};
};

constexpr float nan = std::numeric_limits<float>::quiet_NaN();

// Levels [groups, count], which start as NaN, and the first group that was refused.
py::tuple kmeans_levels(const Array<float>& groups, const py::object& importance, int count, int isa, int threads) {
  const Groups a(groups, importance);
  Array<float> levels({a.g.groups, int64_t{count}});
  std::fill_n(levels.mutable_data(), levels.size(), nan);
  rcp::FirstBad bad(a.g.groups);
  rcp::kmeans_levels(a.g, count, levels.mutable_data(), bad, rcp::checked_isa(static_cast<rcp::Isa>(isa), "isa"),
                     thread_pool(threads));
  return py::make_tuple(levels, bad.first());
}

// Ratios [groups, 2], which start as NaN, and the first group that was refused.
py::tuple clip_search(const Array<float>& groups, const py::object& importance, int count, int isa, int threads) {
  const Groups a(groups, importance);
  Array<float> ratios({a.g.groups, int64_t{2}});
  std::fill_n(ratios.mutable_data(), ratios.size(), nan);
  rcp::FirstBad bad(a.g.groups);
  rcp::clip_search(a.g, count, ratios.mutable_data(), bad, rcp::checked_isa(static_cast<rcp::Isa>(isa), "isa"),
                   thread_pool(threads));
  return py::make_tuple(ratios, bad.first());
}

// Codes, which start as 0xff.
Array<uint8_t> nearest_codes(const Array<float>& weight, const Array<float>& table, int64_t group_size, int bits,
                             bool packed, int isa, int threads) {
  const rcp::NearestCodes a{weight.data(), table.data(), weight.shape(0), weight.shape(1), group_size, bits};
  require(table.size() == a.rows * a.groups() << bits, "table must be [rows, groups, 2^bits]");
  Array<uint8_t> codes({a.rows, packed ? a.packed_bytes() : a.columns});
  std::fill_n(codes.mutable_data(), codes.size(), uint8_t{0xff});
  rcp::nearest_codes(a, packed, codes.mutable_data(), rcp::checked_isa(static_cast<rcp::Isa>(isa), "isa"),
                     thread_pool(threads));
  return codes;
}

// The changed block, codes and errors; these start as 0xff and NaN.
py::tuple gptq_round(const Array<float>& block, const Array<float>& upper, const Array<float>& table, int64_t first,
                     int64_t last, int isa, int threads) {
  rcp::GptqRound a{};
  a.rows = block.shape(0);
  a.columns = block.shape(1);
  a.first = first;
  a.last = last;
  a.levels = static_cast<int>(table.shape(1));
  require(upper.size() == a.columns * a.columns, "upper must be [columns, columns]");
  require(table.shape(0) == a.rows, "table must be [rows, levels]");
  require(0 <= first && first <= last && last <= a.columns, "first and last must be columns");
  Array<float> changed({a.rows, a.columns}), errors({a.rows, last - first});
  Array<uint8_t> codes({a.rows, last - first});
  std::copy_n(block.data(), block.size(), changed.mutable_data());
  std::fill_n(errors.mutable_data(), errors.size(), nan);
  std::fill_n(codes.mutable_data(), codes.size(), uint8_t{0xff});
  a.block = changed.mutable_data();
  a.row_stride = a.columns;
  a.upper = upper.data();
  a.upper_stride = a.columns;
  a.table = table.data();
  a.codes = codes.mutable_data();
  a.errors = errors.mutable_data();
  rcp::gptq_round(a, rcp::checked_isa(static_cast<rcp::Isa>(isa), "isa"), thread_pool(threads));
  return py::make_tuple(changed, codes, errors);
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
  rcp::decode_attention(a, rcp::checked_isa(static_cast<rcp::Isa>(isa), "isa"), thread_pool(threads));
  return py::make_tuple(out, new_keys, new_values);
}

int64_t plain_read(const Array<uint8_t>& data, int64_t streams, int isa, int threads) {
  return rcp::plain_read(data.data(), data.size(), streams, static_cast<rcp::Isa>(isa), thread_pool(threads));
}

}  // namespace

PYBIND11_MODULE(rcp_native, m) {
  m.def("isa_supported", [] { return static_cast<int>(rcp::supported_isa()); });
  m.def("set_isa", [](int isa) { return static_cast<int>(rcp::set_isa(isa)); });
  m.def("current_isa", [] { return static_cast<int>(rcp::current_isa()); });
  m.def("half_to_float", py::vectorize([](uint16_t h) { return rcp::half_to_float(h); }));
  m.def("float_to_half", py::vectorize([](float f) { return rcp::float_to_half(f); }));
  m.def("bfloat_to_float", py::vectorize([](uint16_t h) { return rcp::bfloat_to_float(h); }));
  m.def("float_to_bfloat", py::vectorize([](float f) { return rcp::float_to_bfloat(f); }));
  m.def("quantize_activation", &quantize_activation);
  m.def("pack_nibbles", &pack_nibbles);
  m.def("pack_weight", &pack_weight);
  m.def("unpack_weight", &unpack_weight);
  m.def("lut_linear", &lut_linear, py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(),
        py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(),
        py::arg("input_order") = py::none(), py::arg("norm_weight") = py::none(), py::arg("norm_epsilon") = 0.0f,
        py::arg("norm_offset") = 0.0f, py::arg("activation") = 0, py::arg("residual") = py::none());
  m.def("walsh_transform", &walsh_transform);
  m.def("kv_cache_append", &kv_cache_append);
  m.def("kv_cache_dequantize", &kv_cache_dequantize);
  m.def("kv_cache_attention", &kv_cache_attention);
  m.def("kmeans_levels", &kmeans_levels);
  m.def("clip_search", &clip_search);
  m.def("nearest_codes", &nearest_codes);
  m.def("gptq_round", &gptq_round);
  m.def("decode_attention", &decode_attention);
  m.def("plain_read", &plain_read);
}
