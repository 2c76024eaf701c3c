#include "rcp/cpu/nearest_codes.h"

#include "binding.h"

namespace {

using namespace rcp::binding;

Tensor nearest_codes_cpu(const Tensor& weight, const Tensor& table, int64_t group_size, bool packed) {
  const std::string op = "nearest_codes";
  if (weight.dim() != 2 || weight.size(1) == 0) {
    fail(op + ": weight must be [rows, columns] with at least one column, got " + shape_text(weight) +
         "; flatten leading dimensions");
  }
  check_tensor(weight, op + ": weight", ScalarType::Float, {weight.size(0), weight.size(1)});
  if (group_size < 1) {
    fail(op + ": group_size must be at least 1, got " + std::to_string(group_size) +
         "; pass the group_size of the table");
  }
  rcp::NearestCodes a{};
  a.rows = weight.size(0);
  a.columns = weight.size(1);
  const bool known = group_size == 32 || group_size == 64 || group_size == 128 || group_size == a.columns;
  if (packed && !known) {
    fail(op + ": group_size must be 32, 64, 128 or the number of columns for packed codes, got " +
         std::to_string(group_size) + "; pass packed=False");
  }
  // A row of packed codes is padded to whole groups.
  a.group_size = packed ? group_size : std::min(group_size, a.columns);
  const int64_t levels = table.dim() == 3 ? table.size(2) : 0;
  a.bits = levels == 4 ? 2 : levels == 8 ? 3 : 4;
  check_tensor(table, op + ": table", ScalarType::Float, {a.rows, a.groups(), int64_t{1} << a.bits});
  const Tensor weights = as_contiguous(weight), tables = as_contiguous(table);
  a.weight = data<float>(weights);
  a.table = data<float>(tables);
  Tensor codes = empty({a.rows, packed ? a.packed_bytes() : a.columns}, ScalarType::Byte);
  rcp::nearest_codes(a, packed, mutable_data<uint8_t>(codes), rcp::current_isa(), torch_pool());
  return codes;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rcp_kernels, CPU, m) {
  m.impl("nearest_codes", TORCH_BOX(&nearest_codes_cpu));
}
