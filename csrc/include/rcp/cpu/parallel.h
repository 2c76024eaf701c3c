// Work on several threads. The caller owns them: the torch binding passes torch's pool, the tests use std::thread.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>

namespace rcp {

struct ThreadPool {
  int threads;  // 1: everything runs on the calling thread
  // Calls body(context) in `workers` threads, then joins them.
  void (*run)(int workers, void (*body)(void* context), void* context);

  // This pool, or the calling thread alone where the work is too small for another: waking one costs 5 to 10 us.
  ThreadPool serial_if(bool small) const { return small ? ThreadPool{1, nullptr} : *this; }
};

// Calls f(begin, end) over [0, count) in pieces of at most `piece`. Threads take pieces from a counter: with halves
// dealt out in advance, all wait for the slowest thread when other processes run. f must write disjoint data for each
// index; then the result does not depend on the thread that takes a piece.
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

// The smallest index that any thread has reported, in whatever order they do.
class FirstIndex {
 public:
  void report(int64_t index) {
    int64_t seen = value_.load(std::memory_order_relaxed);
    while (index < seen && !value_.compare_exchange_weak(seen, index)) {
    }
  }
  int64_t value() const { return value_.load(); }
  bool any() const { return value() != none; }

 private:
  static constexpr int64_t none = std::numeric_limits<int64_t>::max();
  std::atomic<int64_t> value_{none};
};

}  // namespace rcp
