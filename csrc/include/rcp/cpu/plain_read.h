// Reads memory and does nothing else. Benchmarks compare kernels that wait for memory with it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "rcp/cpu/isa.h"
#include "rcp/cpu/parallel.h"

namespace rcp {

namespace detail {

inline int64_t sum_words(const uint8_t* data, int64_t bytes) {
  int64_t sum = 0;
  for (int64_t i = 0; i + 8 <= bytes; i += 8) {
    int64_t word;
    std::memcpy(&word, data + i, 8);
    sum = static_cast<int64_t>(static_cast<uint64_t>(sum) + static_cast<uint64_t>(word));
  }
  return sum;
}

#if RCP_X86
RCP_AVX512 inline int64_t sum_words_avx512(const uint8_t* data, int64_t bytes, int64_t streams) {
  const int64_t stream = bytes / streams / 512 * 512;
  __m512i sum[8];
  for (__m512i& s : sum) s = _mm512_setzero_si512();
  for (int64_t at = 0; at < stream; at += 512) {
    for (int64_t s = 0; s < streams; ++s) {
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i)
        sum[i] = _mm512_add_epi64(sum[i], _mm512_loadu_si512(data + s * stream + at + 64 * i));
    }
  }
  for (int i = 1; i < 8; ++i) sum[0] = _mm512_add_epi64(sum[0], sum[i]);
  // Not _mm512_reduce_add_epi64: it adds signed numbers, and this sum wraps.
  alignas(64) uint64_t lanes[8];
  _mm512_store_si512(lanes, sum[0]);
  uint64_t total = static_cast<uint64_t>(sum_words(data + stream * streams, bytes - stream * streams));
  for (const uint64_t lane : lanes) total += lane;
  return static_cast<int64_t>(total);
}
#endif

}  // namespace detail

// The sum of the 8-byte words. Each thread reads a contiguous part, in `streams` sequential streams.
inline int64_t plain_read(const uint8_t* data, int64_t bytes, int64_t streams, Isa isa, const ThreadPool& pool) {
  const int64_t part = std::max<int64_t>(4096, (bytes / std::max(pool.threads, 1) + 4095) / 4096 * 4096);
  std::atomic<uint64_t> total{0};
  parallel_pieces(pool, bytes, part, [&](int64_t begin, int64_t end) {
    int64_t sum = 0;
#if RCP_X86
    if (isa >= Isa::avx512) {
      sum = detail::sum_words_avx512(data + begin, end - begin, streams);
    } else
#endif
    {
      sum = detail::sum_words(data + begin, end - begin);
    }
    total.fetch_add(static_cast<uint64_t>(sum));
  });
  (void)isa;
  (void)streams;
  return static_cast<int64_t>(total.load());
}

}  // namespace rcp
