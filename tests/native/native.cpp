// The CPU kernels without torch in the process, for property tests and for the sanitizers.
#include "native.h"

#include "rcp/cpu/lut_linear.h"
#include "rcp/cpu/pack_weight.h"
#include "rcp/cpu/plain_read.h"
#include "rcp/cpu/quantize_activation.h"
#include "rcp/cpu/walsh_transform.h"
#if RCP_X86
#include "soft_tiles.h"
#endif

namespace {

// x is raw bytes: [tokens, columns] of the type.
py::tuple quantize_activation(const Array<uint8_t>& x, const std::string& type_name, int64_t tokens, int64_t columns,
                              int bits, float clip, int isa) {
  const rcp::FloatType type = float_type(type_name);
  require(x.size() == tokens * columns * static_cast<int64_t>(rcp::float_size(type)),
          "x must have tokens * columns elements");
  Array<int8_t> q({tokens, columns});
  Array<float> scales(tokens);
  Array<int64_t> sums(tokens);
  const rcp::QuantizeKernels& kernels = RCP_FOR_ISA(isa_of(isa), quantize_kernels);
  const float qmax = rcp::quantization_maximum(bits);
  bool all_finite = true;
  for (int64_t m = 0; m < tokens; ++m) {
    const void* row = rcp::advance(x.data(), type, m * columns);
    const rcp::TokenScale token = rcp::token_scale(kernels, row, type, columns, qmax, clip);
    all_finite = all_finite && token.finite;
    scales.mutable_at(m) = token.scale;
    int8_t* out = q.mutable_data() + m * columns;
    kernels.quantize[type](row, columns, token.inverse, qmax, out);
    sums.mutable_at(m) = kernels.sum(out, columns);
  }
  return py::make_tuple(q, scales, sums, all_finite);
}

Array<uint8_t> pack_nibbles(const Array<int8_t>& q) {
  Array<uint8_t> packed((q.size() + 1) / 2);
  rcp::pack_nibbles(q.data(), q.size(), packed.mutable_data());
  return packed;
}

Array<uint8_t> pack_weight(const Array<uint8_t>& codes, const Array<int8_t>& levels, const Array<uint16_t>& scales,
                           float tensor_scale, int64_t columns, int bits, int64_t group_size, int threads) {
  rcp::WeightShape shape = rcp::checked_shape("native", codes.shape(0), columns, bits, group_size);
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
  rcp::WeightShape shape = rcp::checked_shape("native", rows, columns, bits, group_size);
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
rcp::LutLinearPlan soft_plan_for() {
  return {rcp::amx::lut_linear_many<BITS, rcp::amx::SoftTiles>, rcp::ActivationOrder::rows, 1, 16};
}

// The AMX plan with its instructions computed in software, at any number of tokens.
rcp::LutLinearPlan soft_amx_plan(rcp::Isa isa, int bits, int64_t tokens, int act_bits, rcp::FloatType type) {
  if (act_bits == 16) return rcp::lut_linear_plan(isa, bits, tokens, act_bits, type);
  if (bits == 2) return soft_plan_for<2>();
  if (bits == 3) return soft_plan_for<3>();
  return soft_plan_for<4>();
}
#endif

// The usual plan, but with the four streams of Intel on every CPU.
rcp::LutLinearPlan four_stream_plan(rcp::Isa isa, int bits, int64_t tokens, int act_bits, rcp::FloatType type) {
  rcp::LutLinearPlan plan = rcp::lut_linear_plan(isa, bits, tokens, act_bits, type);
  plan.streams = 4;
  return plan;
}

// The usual plan for float32 x: bfloat16 x is widened, as on a CPU without AVX512-BF16.
rcp::LutLinearPlan widened_plan(rcp::Isa isa, int bits, int64_t tokens, int act_bits, rcp::FloatType) {
  return rcp::lut_linear_plan(isa, bits, tokens, act_bits, rcp::FloatType::float32);
}

decltype(rcp::lut_linear_plan)* plan_of(const std::string& variant) {
  if (variant == "four streams") return four_stream_plan;
  if (variant == "widened") return widened_plan;
#if RCP_X86
  if (variant == "soft amx") return soft_amx_plan;
#endif
  require(variant.empty(), "variant must be 'four streams', 'widened', 'soft amx' (x86-64) or empty");
  return rcp::lut_linear_plan;
}

// Returns raw bytes [tokens, rows] of the type; they start as 0xff, which is NaN in all three types.
Array<uint8_t> lut_linear(const Array<uint8_t>& x, const std::string& type_name, const Array<uint8_t>& packed,
                          const py::object& bias, int64_t tokens, int64_t rows, int64_t columns, int bits,
                          int64_t group_size, int act_bits, float clip, int isa, int threads,
                          const std::string& variant, const py::object& input_order, const py::object& norm_weight,
                          float norm_epsilon, float norm_offset, int activation, const py::object& residual) {
  rcp::LutLinear a{};
  a.shape = rcp::checked_shape("native", rows, columns, bits, group_size);
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
  const rcp::Isa chosen = isa_of(isa);
  const rcp::ThreadPool pool = thread_pool(threads);
  py::gil_scoped_release release;
  rcp::lut_linear(a, chosen, pool, plan_of(variant));
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
  const rcp::Isa chosen = isa_of(isa);
  rcp::walsh_transform(t, in_place ? y.data() : x.data(), y.mutable_data(), type, blocks, chosen, thread_pool(threads));
  return y;
}

int64_t plain_read(const Array<uint8_t>& data, int64_t streams, int isa, int threads) {
  return rcp::plain_read(data.data(), data.size(), streams, isa_of(isa), thread_pool(threads));
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
  m.def("plain_read", &plain_read);
  add_caches(m);
  add_levels(m);
}
