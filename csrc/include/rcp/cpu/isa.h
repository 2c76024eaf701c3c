// The instruction set (ISA) of the CPU kernels. It is chosen at run time: one binary serves every x86-64 CPU, and the
// plain C++ kernels serve every other CPU. Nothing in this package is compiled with -march.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#define RCP_X86 1
#define RCP_AVX2 __attribute__((target("avx2,fma,f16c")))
#define RCP_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")))
#define RCP_AMX __attribute__((target("amx-tile,amx-int8,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")))
#else
#define RCP_X86 0
#endif

// The member of rcp::avx512, rcp::avx2 or rcp::scalar that serves `isa`; amx uses avx512. each_isa.h fills these
// namespaces.
#if RCP_X86
#define RCP_FOR_ISA(isa, ...)                               \
  ((isa) >= ::rcp::Isa::avx512 ? ::rcp::avx512::__VA_ARGS__ \
   : (isa) == ::rcp::Isa::avx2 ? ::rcp::avx2::__VA_ARGS__   \
                               : ::rcp::scalar::__VA_ARGS__)
#else
#define RCP_FOR_ISA(isa, ...) (static_cast<void>(isa), ::rcp::scalar::__VA_ARGS__)
#endif
#define RCP_INLINE __attribute__((always_inline)) inline

namespace rcp {

enum class Isa : int { scalar = 0, avx2 = 1, avx512 = 2, amx = 3 };

inline const char* isa_name(Isa isa) {
  static const char* const names[] = {"scalar", "avx2", "avx512", "amx"};
  return names[static_cast<int>(isa)];
}

namespace detail {

#if RCP_X86
// AMX needs support by the CPU (CPUID leaf 7) and by the OS (XCR0 bits 17 and 18). On Linux the process must also ask
// for it (arch_prctl): otherwise the first tile instruction raises SIGILL.
inline bool amx_usable() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tile = d & (1u << 24), int8 = d & (1u << 25);
  if (!tile || !int8 || !__get_cpuid(1, &a, &b, &c, &d) || !(c & (1u << 27))) return false;
  unsigned lo = 0, hi = 0;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  if ((lo & 0x60000u) != 0x60000u) return false;
#if defined(__linux__)
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

// lut_linear_avx512_bf16.h needs these two beside AVX-512. Zen 4, Sapphire Rapids and later CPUs have them.
inline bool bf16_usable() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
}

inline bool is_intel() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(0, &a, &b, &c, &d) && b == 0x756e6547u;  // "Genu"
}
#endif

inline Isa detect() {
#if RCP_X86
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")))
    return Isa::scalar;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni");
  if (!avx512) return Isa::avx2;
  return amx_usable() ? Isa::amx : Isa::avx512;
#else
  return Isa::scalar;
#endif
}

}  // namespace detail

// The best ISA that this CPU and operating system run.
inline Isa supported_isa() {
  static const Isa isa = detail::detect();
  return isa;
}

inline Isa checked_isa(Isa isa, const std::string& asked_by) {
  if (static_cast<int>(isa) > static_cast<int>(supported_isa())) {
    throw std::invalid_argument(asked_by + ": this CPU runs at most the " + isa_name(supported_isa()) +
                                " kernels, got " + isa_name(isa) + "; choose a lower ISA");
  }
  return isa;
}

namespace detail {

inline Isa isa_from_environment() {
  const char* text = std::getenv("RCP_ISA");
  if (text == nullptr || *text == '\0') return supported_isa();
  for (int i = 0; i <= 3; ++i) {
    if (std::string(text) == isa_name(static_cast<Isa>(i)))
      return checked_isa(static_cast<Isa>(i), std::string("RCP_ISA=") + text);
  }
  throw std::invalid_argument(std::string("RCP_ISA must be scalar, avx2, avx512 or amx, got '") + text +
                              "'; unset it to let the CPU decide");
}

// -1 until the first call: a wrong RCP_ISA fails there, not in the import.
inline std::atomic<int> chosen_isa{-1};

}  // namespace detail

inline Isa current_isa() {
  int isa = detail::chosen_isa.load(std::memory_order_relaxed);
  if (isa < 0) {
    isa = static_cast<int>(detail::isa_from_environment());
    detail::chosen_isa.store(isa, std::memory_order_relaxed);
  }
  return static_cast<Isa>(isa);
}

// For tests and benchmarks: switches the whole process. Returns the ISA that was in use.
inline Isa set_isa(int64_t isa) {
  if (isa < 0 || isa > 3) {
    throw std::invalid_argument("set_cpu_isa: isa must be 0 (scalar), 1 (avx2), 2 (avx512) or 3 (amx), got " +
                                std::to_string(isa));
  }
  const Isa before = current_isa();
  detail::chosen_isa.store(static_cast<int>(checked_isa(static_cast<Isa>(isa), "set_cpu_isa")),
                           std::memory_order_relaxed);
  return before;
}

}  // namespace rcp
