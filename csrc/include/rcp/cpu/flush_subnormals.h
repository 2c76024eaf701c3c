// Subnormal numbers as zero.
#pragma once

#include "rcp/cpu/isa.h"

namespace rcp {

// While an object of this class exists, its thread reads and writes subnormal numbers as zero: each costs a microcode
// assist otherwise. The destructor restores the caller's mode.
class FlushSubnormals {
 public:
#if RCP_X86
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040u); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  FlushSubnormals() {}
#endif
 public:
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;
};

}  // namespace rcp
