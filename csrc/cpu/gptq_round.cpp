#include "rcp/cpu/gptq_round.h"

#include "binding.h"

namespace {

using namespace rcp::binding;

std::tuple<Tensor, Tensor> gptq_round_cpu(Tensor block, const Tensor& upper, const Tensor& table, int64_t first,
                                          int64_t last) {
  const std::string op = "gptq_round";
  if (block.dim() != 2) {
    fail(op + ": block must be [rows, columns], got " + shape_text(block) + "; pass some columns of a weight");
  }
  rcp::GptqRound a{};
  a.rows = block.size(0);
  a.columns = block.size(1);
  check_tensor(block, op + ": block", ScalarType::Float, {a.rows, a.columns});
  check_tensor(upper, op + ": upper", ScalarType::Float, {a.columns, a.columns});
  if (a.columns > 1 && (block.stride(1) != 1 || upper.stride(1) != 1)) {
    fail(op + ": neighbouring columns of block and upper must lie side by side, got strides " +
         std::to_string(block.stride(1)) + " and " + std::to_string(upper.stride(1)) + "; pass contiguous tensors");
  }
  if (first < 0 || last < first || last > a.columns) {
    fail(op + ": 0 <= first <= last <= columns must hold, got first " + std::to_string(first) + ", last " +
         std::to_string(last) + " of " + std::to_string(a.columns) + " columns; count them from the block's start");
  }
  const int64_t levels = table.dim() == 2 ? table.size(1) : 0;
  if (levels < 2 || levels > 16) {
    fail(op + ": table must be [rows, levels] with 2 to 16 levels, got " + shape_text(table) +
         "; pass the values of one group");
  }
  check_tensor(table, op + ": table", ScalarType::Float, {a.rows, levels});
  const Tensor tables = as_contiguous(table);
  Tensor codes = empty({a.rows, last - first}, ScalarType::Byte);
  Tensor errors = empty({a.rows, last - first}, ScalarType::Float);
  a.block = mutable_data<float>(block);
  a.row_stride = block.stride(0);
  a.upper = data<float>(upper);
  a.upper_stride = upper.stride(0);
  a.table = data<float>(tables);
  a.first = first;
  a.last = last;
  a.levels = static_cast<int>(levels);
  a.codes = mutable_data<uint8_t>(codes);
  a.errors = mutable_data<float>(errors);
  rcp::gptq_round(a, rcp::current_isa(), torch_pool());
  return {codes, errors};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rcp_kernels, CPU, m) {
  m.impl("gptq_round", TORCH_BOX(&gptq_round_cpu));
}
