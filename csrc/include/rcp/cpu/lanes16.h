// Sixteen float32 lanes on every instruction set: one register of AVX-512, two of AVX2, an array in plain C++.
#pragma once

#include "rcp/cpu/lanes16_scalar.h"
#if RCP_X86
#include "rcp/cpu/lanes16_avx2.h"
#include "rcp/cpu/lanes16_avx512.h"
#endif

#define RCP_KERNELS "rcp/cpu/lanes16_vector.h"
#include "rcp/cpu/each_isa.h"
