// The PTX instructions that the kernels use directly: byte permutation, logic, tensor-core products, asynchronous
// copies.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace rcp::cuda::ptx {

// The logic is inline assembly. The compiler splits a plain `word & 0x33333333` that feeds prmt into one AND per 16
// bits. __byte_perm masks its selector, although the hardware ignores the bits beyond 16. Together they cost 2.2
// instructions a weight instead of 0.9.
__device__ __forceinline__ uint32_t bit_and(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("and.b32 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
// (a & b) | c
__device__ __forceinline__ uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
template <int SHIFT>
__device__ __forceinline__ uint32_t shift_right(uint32_t a) {
  uint32_t d;
  asm("shr.u32 %0, %1, %2;" : "=r"(d) : "r"(a), "n"(SHIFT));
  return d;
}
__device__ __forceinline__ uint32_t permute(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(low), "r"(high), "r"(selector));
  return d;
}

// d = A B + c: A is 16 x 32 and B 32 x 8 signed bytes, c and d are 16 x 8 int32. Lane 4 * gr + q holds rows gr, gr + 8
// and columns 2q, 2q + 1 of c. c and d are separate operands, because tied operands would first have to be filled with
// the start value. sm_75 multiplies the same fragments by four m8n8k16.
__device__ __forceinline__ void multiply(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                         const int (&c)[4]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
#else
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    int half[2];
    asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%4, %5};"
        : "=r"(half[0]), "=r"(half[1])
        : "r"(a[r]), "r"(b0), "r"(c[2 * r]), "r"(c[2 * r + 1]));
    asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%4, %5};"
        : "=r"(d[2 * r]), "=r"(d[2 * r + 1])
        : "r"(a[2 + r]), "r"(b1), "r"(half[0]), "r"(half[1]));
  }
#endif
}

// c += A B: A is 16 x 16 and B 16 x 8 float16, c is 16 x 8 float32. sm_75 takes two m16n8k8.
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  float d[4];
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
#else
  float half[4];
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};"
      : "=f"(half[0]), "=f"(half[1]), "=f"(half[2]), "=f"(half[3])
      : "r"(a[0]), "r"(a[1]), "r"(b0), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[2]), "r"(a[3]), "r"(b1), "f"(half[0]), "f"(half[1]), "f"(half[2]), "f"(half[3]));
#endif
#pragma unroll
  for (int i = 0; i < 4; ++i) c[i] = d[i];
}

__device__ __forceinline__ uint4 load_vector(const uint8_t* from) {
  return __ldg(reinterpret_cast<const uint4*>(from));
}

// sm_90 and newer: a launch may begin before the previous one in its stream has ended (programmatic dependent launch).
// Before wait_for_previous_launch a kernel must not write, nor read what a previous launch writes. After it, all
// previous launches have ended and their stores are visible. Without the attribute of launch() it waits for nothing.
#if __CUDA_ARCH__ >= 900
inline constexpr bool early_launch = true;
#else
inline constexpr bool early_launch = false;
#endif
__device__ __forceinline__ void wait_for_previous_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The next launch may begin once all blocks are here. It must come after wait_for_previous_launch: launches before the
// previous one have then ended too.
__device__ __forceinline__ void allow_next_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Copies 16 bytes from global to shared memory, past the L1 cache. sm_75 copies through a register.
__device__ __forceinline__ void copy_async(void* to_shared, const void* from_global) {
#if __CUDA_ARCH__ >= 800
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(to_shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from_global) : "memory");
#else
  *static_cast<uint4*>(to_shared) = __ldcg(static_cast<const uint4*>(from_global));
#endif
}
__device__ __forceinline__ void copy_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits for all copies except those of the last PENDING commits.
template <int PENDING>
__device__ __forceinline__ void copy_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

}  // namespace rcp::cuda::ptx
