// One launch of lut_linear without torch: random weights and activations, checked against a double-precision loop.
//
//   nvcc -O3 -std=c++17 -arch=sm_80 -I csrc/include examples/cuda/lut_linear.cu -o lut_linear
//   ./lut_linear [rows columns bits act_bits tokens [group_size]]
//
// Float32 activations, and act_bits 16 only with -DWITH_ACT_BITS_16: so the program consists of instructions that
// simulators of PTX know.
//
// Prints "## max err ...". Exit code 0, 1 if the error is outside the bound of docs/numerics.md, 2 without a GPU.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#ifdef WITH_ACT_BITS_16
#include "rcp/cuda/lut_linear_a16.cuh"
#endif
#include "rcp/cuda/lut_linear_integer.cuh"

namespace {

uint32_t state = 12345;
uint32_t next_random() {
  state = state * 1664525u + 1013904223u;
  return state >> 8;
}
float uniform() {
  return static_cast<float>(next_random()) * 0x1p-24f;
}

bool check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) std::printf("%s: %s\n", what, cudaGetErrorString(error));
  return error == cudaSuccess;
}

// A copy on the device, never freed: the program ends.
template <class T>
bool to_device(const std::vector<T>& host, T** device) {
  return check(cudaMalloc(device, host.size() * sizeof(T)), "cudaMalloc") &&
         check(cudaMemcpy(*device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
}

template <int BITS>
cudaError_t launch(const rcp::cuda::LutLinearArguments& a, int sm_count, int capability) {
#ifdef WITH_ACT_BITS_16
  if (a.act_bits == 16) return rcp::cuda::lut_linear_a16<BITS>(a, sm_count, capability);
#endif
  static_cast<void>(capability);
  if (a.act_bits == 16) return cudaErrorNotSupported;
  return rcp::cuda::integer::launch_bits<BITS, static_cast<int>(rcp::FloatType::float32)>(a, sm_count);
}

}  // namespace

int main(int argc, char** argv) {
  const auto argument = [&](int i, int64_t otherwise) { return argc > i ? std::atoll(argv[i]) : otherwise; };
  const int64_t rows = argument(1, 2048), columns = argument(2, 4096), tokens = argument(5, 1);
  const int bits = static_cast<int>(argument(3, 2)), act_bits = static_cast<int>(argument(4, 4));
  const int64_t group_size = argument(6, 128);
  const bool group_fits = group_size == 32 || group_size == 64 || group_size == 128 || group_size == columns;
  if (rows < 1 || columns < 1 || tokens < 1 || bits < 2 || bits > 4 || !group_fits ||
      (act_bits != 4 && act_bits != 8 && act_bits != 16)) {
    std::printf("lut_linear [rows columns bits 2|3|4 act_bits 4|8|16 tokens [group_size 32|64|128|columns]]\n");
    return 1;
  }
#ifndef WITH_ACT_BITS_16
  if (act_bits == 16) {
    std::printf("lut_linear: act_bits 16 is left out here, compile with -DWITH_ACT_BITS_16\n");
    return 1;
  }
#endif
  const rcp::cuda::CudaLayout layout{rows, columns, group_size, bits};
  const int64_t groups = layout.groups(), row_bytes = layout.canonical_row_bytes();
  const int levels = layout.levels();
  std::vector<uint8_t> codes(static_cast<size_t>(rows * row_bytes));
  std::vector<int8_t> tables(static_cast<size_t>(rows * groups * levels));
  std::vector<uint16_t> scales(static_cast<size_t>(rows * groups));
  std::vector<float> x(static_cast<size_t>(tokens * columns));
  for (auto& code : codes) code = static_cast<uint8_t>(next_random());
  for (size_t i = 0; i < tables.size(); ++i) {  // ascending, and different in every group
    const int step = 254 / (levels - 1), place = static_cast<int>(i) % levels;
    tables[i] = static_cast<int8_t>(-127 + place * step + static_cast<int>(next_random() % (step / 2)));
  }
  for (auto& scale : scales) scale = rcp::float_to_half(1.0f + uniform());
  for (auto& value : x) value = uniform() + uniform() + uniform() - 1.5f;
  const float tensor_scale = 0x1p-14f;
  std::vector<uint8_t> blob(static_cast<size_t>(layout.total_bytes()));
  rcp::cuda::pack_weight_host(layout, codes.data(), tables.data(), scales.data(), tensor_scale, blob.data());

  int device = 0, sm_count = 0, major = 0, minor = 0;
  if (!check(cudaGetDevice(&device), "cudaGetDevice") ||
      !check(cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, device), "multiprocessors") ||
      !check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "capability") ||
      !check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "capability")) {
    return 2;
  }
  std::vector<float> y(static_cast<size_t>(tokens * rows), NAN);
  uint8_t* weight_on_device = nullptr;
  float *x_on_device = nullptr, *y_on_device = nullptr;
  rcp::cuda::LutLinearArguments a{};
  a.x_type = rcp::FloatType::float32;
  a.tokens = tokens, a.rows = rows, a.columns = columns;
  a.bits = bits, a.group_size = static_cast<int>(group_size), a.act_bits = act_bits, a.clip = 1.0f;
  size_t workspace_bytes = rcp::cuda::lut_linear_integer_workspace_bytes(a, sm_count);
  size_t counter_bytes = rcp::cuda::lut_linear_integer_counter_bytes(a);
#ifdef WITH_ACT_BITS_16
  if (act_bits == 16) {
    workspace_bytes = rcp::cuda::lut_linear_a16_workspace_bytes(a, sm_count);
    counter_bytes = rcp::cuda::lut_linear_a16_counter_bytes(a, sm_count);
  }
#endif
  const std::vector<uint32_t> counters(counter_bytes / 4 + 1, 0u);
  uint32_t* counters_on_device = nullptr;
  if (!to_device(blob, &weight_on_device) || !to_device(x, &x_on_device) || !to_device(y, &y_on_device) ||
      !to_device(counters, &counters_on_device) ||
      !check(cudaMalloc(&a.workspace, workspace_bytes + 16), "cudaMalloc")) {
    return 2;
  }
  a.weight = weight_on_device, a.x = x_on_device, a.y = y_on_device, a.counters = counters_on_device;
  const int capability = 10 * major + minor;
  const cudaError_t launched = bits == 2   ? launch<2>(a, sm_count, capability)
                               : bits == 3 ? launch<3>(a, sm_count, capability)
                                           : launch<4>(a, sm_count, capability);
  if (!check(launched, "lut_linear") || !check(cudaDeviceSynchronize(), "lut_linear") ||
      !check(cudaMemcpy(y.data(), y_on_device, y.size() * sizeof(float), cudaMemcpyDeviceToHost), "cudaMemcpy")) {
    return 2;
  }

  double worst = 0.0, worst_of_bound = 0.0;
  std::vector<double> q(static_cast<size_t>(columns));
  for (int64_t m = 0; m < tokens; ++m) {
    const float* token = x.data() + m * columns;
    double scale = 1.0;
    if (act_bits == 16) {
      for (int64_t k = 0; k < columns; ++k) q[static_cast<size_t>(k)] = token[k];
    } else {
      const float qmax = act_bits == 4 ? 7.0f : 127.0f;
      float amax = 0.0f;
      for (int64_t k = 0; k < columns; ++k) amax = std::fmax(amax, std::fabs(token[k]));
      const float s = amax / qmax, r = s < 0x1p-120f ? 0.0f : 1.0f / s;
      scale = s < 0x1p-120f ? 0.0 : s;
      for (int64_t k = 0; k < columns; ++k) {
        const float product = token[k] * r;  // rounded to float before rint, as the contract has it
        q[static_cast<size_t>(k)] = std::nearbyint(product);
      }
    }
    for (int64_t n = 0; n < rows; ++n) {
      double sum = 0.0, magnitude = 0.0;
      for (int64_t g = 0; g < groups; ++g) {
        double inner = 0.0, inner_magnitude = 0.0;
        const int8_t* table = tables.data() + (n * groups + g) * levels;
        for (int64_t k = g * group_size; k < columns && k < (g + 1) * group_size; ++k) {
          const unsigned code = rcp::cuda::detail::canonical_code(codes.data() + n * row_bytes, row_bytes, k, bits);
          inner += q[static_cast<size_t>(k)] * table[code];
          inner_magnitude += std::fabs(q[static_cast<size_t>(k)] * table[code]);
        }
        const double factor = scale * tensor_scale * rcp::half_to_float(scales[static_cast<size_t>(n * groups + g)]);
        sum += factor * inner;
        magnitude += factor * (act_bits == 16 ? inner_magnitude : std::fabs(inner));
      }
      const double error = std::fabs(y[static_cast<size_t>(m * rows + n)] - sum);
      const double roundings = act_bits == 16 ? groups + group_size / 4.0 + 5.0 : groups + 3.0;
      if (!(error <= worst)) worst = error;
      if (!(error <= worst_of_bound * (magnitude * roundings * 0x1p-24))) {
        worst_of_bound = error / (magnitude * roundings * 0x1p-24);
      }
    }
  }
  std::printf("## max err %.3g, %.3f of the bound: W%dA%d, %lld x %lld, G %lld, M %lld\n", worst, worst_of_bound, bits,
              act_bits, static_cast<long long>(rows), static_cast<long long>(columns),
              static_cast<long long>(group_size), static_cast<long long>(tokens));
  return worst_of_bound <= 1.0 ? 0 : 1;
}
