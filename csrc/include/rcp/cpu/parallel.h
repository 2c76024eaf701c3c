// Threads are the caller's: the torch binding lends torch's own pool, the tests lend std::thread.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace rcp {

struct ThreadPool {
  int threads;  // 1: everything runs on the caller
  void (*run)(int workers, void (*body)(void* context),
              void* context);  // calls body(context) in `workers` threads, then joins
};

// Calls f(begin, end) over [0, count) in pieces of at most `piece`. Pieces are taken from a counter, not dealt out in
// halves: under load from other processes static halves wait for the slower one. f must write disjoint data per index,
// so that the result does not depend on who takes which piece.
template <class F>
void parallel_pieces(const ThreadPool& pool, int64_t count, int64_t piece, const F& f) {
  const int64_t pieces = (count + piece - 1) / piece;
  const int workers = static_cast<int>(std::min<int64_t>(pool.threads, pieces));
  if (workers <= 1) {
    if (count > 0) f(0, count);
    return;
  }
  struct Context {
    const F* f;
    int64_t count, piece;
    std::atomic<int64_t> next;
  } context{&f, count, piece, {0}};
  pool.run(
      workers,
      [](void* raw) {
        auto& c = *static_cast<Context*>(raw);
        for (;;) {
          const int64_t begin = c.next.fetch_add(c.piece, std::memory_order_relaxed);
          if (begin >= c.count) return;
          (*c.f)(begin, std::min(begin + c.piece, c.count));
        }
      },
      &context);
}

}  // namespace rcp
