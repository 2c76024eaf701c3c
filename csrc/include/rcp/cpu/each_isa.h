// Includes the file named by RCP_KERNELS once for each instruction set, inside its namespace, with RCP_TARGET set to
// its function target attribute. A target attribute cannot depend on a template parameter, so kernels are included, not
// instantiated. Such a file has no include guard. Every lane sees the same operations in the same order on every
// instruction set, so the results agree bit for bit.
#include "rcp/cpu/isa.h"

namespace rcp::scalar {
#define RCP_TARGET
#include RCP_KERNELS
#undef RCP_TARGET
}  // namespace rcp::scalar

#if RCP_X86
namespace rcp::avx2 {
#define RCP_TARGET RCP_AVX2
#include RCP_KERNELS
#undef RCP_TARGET
}  // namespace rcp::avx2

namespace rcp::avx512 {
#define RCP_TARGET RCP_AVX512
#include RCP_KERNELS
#undef RCP_TARGET
}  // namespace rcp::avx512
#endif
#undef RCP_KERNELS
