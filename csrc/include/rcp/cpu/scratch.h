// The working memory of one call, which is split into parts at 64-byte boundaries.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace rcp {

class Scratch {
 public:
  explicit Scratch(int64_t bytes) : base_(std::aligned_alloc(64, static_cast<std::size_t>((bytes + 63) / 64 * 64))) {
    if (base_ == nullptr) throw std::bad_alloc();
  }
  template <class T>
  T* take(int64_t count) {
    T* part = reinterpret_cast<T*>(static_cast<char*>(base_.get()) + used_);
    used_ += size_of<T>(count);
    return part;
  }
  template <class T>
  static int64_t size_of(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> base_;
  int64_t used_ = 0;
};

}  // namespace rcp
