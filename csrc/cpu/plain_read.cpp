#include "rcp/cpu/plain_read.h"

#include "binding.h"

namespace {

using namespace rcp::binding;

int64_t plain_read_cpu(const Tensor& buffer, int64_t streams) {
  if (!buffer.is_contiguous()) fail("plain_read: buffer must be contiguous, got other strides; call .contiguous()");
  if (streams < 1 || streams > 64) {
    fail("plain_read: streams must be 1 to 64, got " + std::to_string(streams) + "; 1 reads in order");
  }
  const int64_t bytes = buffer.numel() * static_cast<int64_t>(buffer.element_size());
  return rcp::plain_read(data<uint8_t>(buffer), bytes, streams, rcp::current_isa(), torch_pool());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rcp_kernels, CPU, m) {
  m.impl("plain_read", TORCH_BOX(&plain_read_cpu));
}
