// One launch of lut_linear without torch: random weights and activations, checked against a double-precision loop.
//
//   nvcc -O3 -std=c++17 -arch=sm_80 -I csrc/include examples/cuda/lut_linear.cu -o lut_linear
//   ./lut_linear [rows columns bits act_bits tokens [group_size [row_tiles]]]
//
// row_tiles: of a block of the kernel for one token, instead of the plan's choice.
//
// Float32 activations. act_bits 16 only with -DWITH_ACT_BITS_16: without it the program consists of instructions that
// simulators of PTX know.
//
// Prints "## max err ...". Exit code 0; 1 if the error is outside the bound of docs/numerics.md; 2 without a GPU.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#define RCP_NO_REDUX
#ifdef WITH_ACT_BITS_16
#include "rcp/cuda/lut_linear_a16.cuh"
#endif
#include "rcp/cuda/lut_linear_integer.cuh"
#include "rcp/cuda/pack_weight.cuh"

namespace {

constexpr float tensor_scale = 0x1p-14f;

uint32_t state = 12345;
uint32_t next_random() {
  state = state * 1664525u + 1013904223u;
  return state >> 8;
}
float uniform() {
  return static_cast<float>(next_random()) * 0x1p-24f;
}

bool check(cudaError_t error, const char* call) {
  if (error != cudaSuccess) std::printf("%s: %s\n", call, cudaGetErrorString(error));
  return error == cudaSuccess;
}

// A copy on the device, never freed: the program ends.
template <class T, class Pointer>
bool to_device(const std::vector<T>& host, Pointer* device) {
  T* memory = nullptr;
  const bool done =
      check(cudaMalloc(&memory, host.size() * sizeof(T)), "cudaMalloc") &&
      check(cudaMemcpy(memory, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  *device = memory;
  return done;
}

// A random layer in the canonical format (docs/format.md), and its input.
struct Layer {
  rcp::cuda::CudaLayout layout;
  int64_t tokens;
  std::vector<uint8_t> codes;
  std::vector<int8_t> tables;
  std::vector<uint16_t> scales;
  std::vector<float> x;

  Layer(const rcp::cuda::CudaLayout& shape, int64_t m)
      : layout(shape),
        tokens(m),
        codes(static_cast<size_t>(shape.rows * shape.canonical_row_bytes())),
        tables(static_cast<size_t>(shape.rows * shape.groups() * shape.levels())),
        scales(static_cast<size_t>(shape.rows * shape.groups())),
        x(static_cast<size_t>(m * shape.columns)) {
    const int levels = shape.levels();
    for (auto& code : codes) code = static_cast<uint8_t>(next_random());
    for (size_t i = 0; i < tables.size(); ++i) {  // ascending, and different in every group
      const int step = 254 / (levels - 1), place = static_cast<int>(i) % levels;
      tables[i] = static_cast<int8_t>(-127 + place * step + static_cast<int>(next_random() % (step / 2)));
    }
    for (auto& scale : scales) scale = rcp::float_to_half(1.0f + uniform());
    for (auto& value : x) value = uniform() + uniform() + uniform() - 1.5f;
  }

  unsigned code(int64_t n, int64_t k) const {
    unsigned value = 0;
    for (int64_t b = 0; b < layout.bits; ++b) {
      const int64_t bit = k * layout.bits + b;
      value |= (codes[static_cast<size_t>(n * layout.canonical_row_bytes() + bit / 8)] >> bit % 8 & 1u) << b;
    }
    return value;
  }
};

cudaError_t launch(const rcp::cuda::LutLinearCall& call, const rcp::cuda::LutLinearPlan& plan) {
  using namespace rcp::cuda;
#ifdef WITH_ACT_BITS_16
  if (call.act_bits == 16) {
    return call.bits == 2   ? lut_linear_a16<2>(call, plan)
           : call.bits == 3 ? lut_linear_a16<3>(call, plan)
                            : lut_linear_a16<4>(call, plan);
  }
#endif
  return call.bits == 2   ? lut_linear_integer<2>(call, plan)
         : call.bits == 3 ? lut_linear_integer<3>(call, plan)
                          : lut_linear_integer<4>(call, plan);
}

// Packs the weight and multiplies on the device.
bool run(const Layer& layer, int act_bits, int row_tiles, std::vector<float>* y) {
  int device = 0, sm_count = 0, major = 0, minor = 0;
  if (!check(cudaGetDevice(&device), "cudaGetDevice") ||
      !check(cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, device), "multiprocessors") ||
      !check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "capability") ||
      !check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "capability")) {
    return false;
  }
  rcp::cuda::PackWeightCall pack{};
  pack.layout = layer.layout, pack.tensor_scale = tensor_scale;
  rcp::cuda::LutLinearCall call{};
  call.x_type = rcp::FloatType::float32, call.clip = 1.0f;
  call.tokens = layer.tokens, call.rows = layer.layout.rows, call.columns = layer.layout.columns;
  call.bits = layer.layout.bits, call.group_size = static_cast<int>(layer.layout.group_size), call.act_bits = act_bits;
  rcp::cuda::LutLinearPlan plan = rcp::cuda::plan_lut_linear(call, sm_count, 10 * major + minor);
  if (row_tiles > 0) {
    const bool early = plan.early_launch;
    plan = rcp::cuda::plan_detail::gemv_plan(layer.layout, plan.kernel, 1, row_tiles, layer.layout.units());
    plan.early_launch = early;
  }
  std::printf("%lld x %lld blocks of %d row tiles, %d multiprocessors\n", static_cast<long long>(plan.grid_x),
              static_cast<long long>(plan.grid_y), plan.row_tiles, sm_count);
  const std::vector<unsigned> counters(plan.counter_bytes / 4 + 1, 0u);
  if (!to_device(layer.codes, &pack.codes) || !to_device(layer.tables, &pack.levels) ||
      !to_device(layer.scales, &pack.scales) || !to_device(layer.x, &call.x) || !to_device(*y, &call.y) ||
      !to_device(counters, &call.counters) ||
      !check(cudaMalloc(&pack.blob, static_cast<size_t>(layer.layout.total_bytes())), "cudaMalloc") ||
      !check(cudaMalloc(&call.workspace, plan.workspace_bytes() + 16), "cudaMalloc")) {
    return false;
  }
  call.weight = pack.blob;
  return check(rcp::cuda::pack_weight(pack), "pack_weight") && check(launch(call, plan), "lut_linear") &&
         check(cudaDeviceSynchronize(), "lut_linear") &&
         check(cudaMemcpy(y->data(), call.y, y->size() * sizeof(float), cudaMemcpyDeviceToHost), "cudaMemcpy");
}

// Token m as the op sees it, and its scale: quantized, or as it is with act_bits 16.
double quantize(const Layer& layer, int64_t m, int act_bits, std::vector<double>* q) {
  const float* token = layer.x.data() + m * layer.layout.columns;
  if (act_bits == 16) {
    for (size_t k = 0; k < q->size(); ++k) (*q)[k] = token[k];
    return 1.0;
  }
  const float qmax = act_bits == 4 ? 7.0f : 127.0f;
  float amax = 0.0f;
  for (size_t k = 0; k < q->size(); ++k) amax = std::fmax(amax, std::fabs(token[k]));
  const float s = amax / qmax, r = s < 0x1p-120f ? 0.0f : 1.0f / s;
  for (size_t k = 0; k < q->size(); ++k) {
    const float product = token[k] * r;  // rounded to float before rint, as in docs/numerics.md
    (*q)[k] = std::nearbyint(product);
  }
  return s < 0x1p-120f ? 0.0 : s;
}

// Prints the largest error and returns it as a fraction of the bound.
double compare(const Layer& layer, int act_bits, const std::vector<float>& y) {
  const rcp::cuda::CudaLayout& shape = layer.layout;
  const int64_t groups = shape.groups();
  const double roundings = act_bits == 16 ? groups + shape.group_size / 4.0 + 5.0 : groups + 3.0;
  double worst = 0.0, worst_of_bound = 0.0;
  std::vector<double> q(static_cast<size_t>(shape.columns));
  for (int64_t m = 0; m < layer.tokens; ++m) {
    const double scale = quantize(layer, m, act_bits, &q);
    for (int64_t n = 0; n < shape.rows; ++n) {
      double sum = 0.0, magnitude = 0.0;
      for (int64_t g = 0; g < groups; ++g) {
        double inner = 0.0, inner_magnitude = 0.0;
        for (int64_t k = g * shape.group_size; k < shape.columns && k < (g + 1) * shape.group_size; ++k) {
          const int8_t level = layer.tables[static_cast<size_t>((n * groups + g) * shape.levels() + layer.code(n, k))];
          inner += q[static_cast<size_t>(k)] * level;
          inner_magnitude += std::fabs(q[static_cast<size_t>(k)] * level);
        }
        const uint16_t group_scale = layer.scales[static_cast<size_t>(n * groups + g)];
        const double factor = scale * tensor_scale * rcp::half_to_float(group_scale);
        sum += factor * inner;
        magnitude += factor * (act_bits == 16 ? inner_magnitude : std::fabs(inner));
      }
      const double error = std::fabs(y[static_cast<size_t>(m * shape.rows + n)] - sum);
      const double bound = magnitude * roundings * 0x1p-24;
      if (!(error <= worst)) worst = error;
      if (!(error <= worst_of_bound * bound)) worst_of_bound = error / bound;
    }
  }
  std::printf("## max err %.3g, %.3f of the bound: W%dA%d, %lld x %lld, G %lld, M %lld\n", worst, worst_of_bound,
              shape.bits, act_bits, static_cast<long long>(shape.rows), static_cast<long long>(shape.columns),
              static_cast<long long>(shape.group_size), static_cast<long long>(layer.tokens));
  return worst_of_bound;
}

}  // namespace

int main(int argc, char** argv) {
  const auto argument = [&](int i, int64_t otherwise) { return argc > i ? std::atoll(argv[i]) : otherwise; };
  const int64_t rows = argument(1, 2048), columns = argument(2, 4096), tokens = argument(5, 1);
  const int bits = static_cast<int>(argument(3, 2)), act_bits = static_cast<int>(argument(4, 4));
  const int64_t group_size = argument(6, 128), row_tiles = argument(7, 0);
  const bool group_fits = group_size == 32 || group_size == 64 || group_size == 128 || group_size == columns;
  if (rows < 1 || columns < 1 || tokens < 1 || bits < 2 || bits > 4 || !group_fits ||
      (act_bits != 4 && act_bits != 8 && act_bits != 16) || row_tiles < 0 || row_tiles > 16 ||
      (row_tiles > 0 && (tokens > 1 || act_bits == 16 || columns > 16384))) {
    std::printf(
        "lut_linear [rows columns bits 2|3|4 act_bits 4|8|16 tokens [group_size 32|64|128|columns\n"
        "           [row_tiles 1..16: one token, act_bits 4 or 8, up to 16384 columns]]]\n");
    return 1;
  }
#ifndef WITH_ACT_BITS_16
  if (act_bits == 16) {
    std::printf("lut_linear: act_bits must be 4 or 8, got 16; compile with -DWITH_ACT_BITS_16\n");
    return 1;
  }
#endif
  const Layer layer({rows, columns, group_size, bits}, tokens);
  std::vector<float> y(static_cast<size_t>(tokens * rows), NAN);
  if (!run(layer, act_bits, static_cast<int>(row_tiles), &y)) return 2;
  return compare(layer, act_bits, y) <= 1.0 ? 0 : 1;
}
