// One register of float32 lanes, on every instruction set.
#pragma once

#include "rcp/cpu/lanes_scalar.h"
#if RCP_X86
#include "rcp/cpu/lanes_avx2.h"
#include "rcp/cpu/lanes_avx512.h"
#endif
