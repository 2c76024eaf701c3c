// kmeans_levels, clip_search, nearest_codes and gptq_round.
#include "native.h"
#include "rcp/cpu/clip_search.h"
#include "rcp/cpu/gptq_round.h"
#include "rcp/cpu/kmeans_levels.h"
#include "rcp/cpu/nearest_codes.h"

namespace {

struct Groups {
  Groups(const Array<float>& groups, const py::object& importance) : values(groups) {
    require(groups.ndim() == 2 && groups.shape(1) > 0, "groups must be [groups, length]");
    g.values = values.data();
    g.groups = groups.shape(0);
    g.length = groups.shape(1);
    if (!importance.is_none()) {
      weights = importance.cast<Array<float>>();
      require(weights.size() == groups.size(), "importance must have the shape of groups");
      g.importance = weights.data();
    }
  }
  Array<float> values, weights;
  rcp::LevelGroups g{};
};

constexpr float nan = std::numeric_limits<float>::quiet_NaN();

// Levels [groups, count], which start as NaN, and the first group that was refused.
py::tuple kmeans_levels(const Array<float>& groups, const py::object& importance, int count, int isa, int threads) {
  const Groups a(groups, importance);
  Array<float> levels({a.g.groups, int64_t{count}});
  std::fill_n(levels.mutable_data(), levels.size(), nan);
  rcp::FirstIndex bad;
  rcp::kmeans_levels(a.g, count, levels.mutable_data(), bad, isa_of(isa), thread_pool(threads));
  return py::make_tuple(levels, bad.any() ? bad.value() : a.g.groups);
}

// Ratios [groups, 2], which start as NaN, and the first group that was refused.
py::tuple clip_search(const Array<float>& groups, const py::object& importance, int count, int isa, int threads) {
  const Groups a(groups, importance);
  Array<float> ratios({a.g.groups, int64_t{2}});
  std::fill_n(ratios.mutable_data(), ratios.size(), nan);
  rcp::FirstIndex bad;
  rcp::clip_search(a.g, count, ratios.mutable_data(), bad, isa_of(isa), thread_pool(threads));
  return py::make_tuple(ratios, bad.any() ? bad.value() : a.g.groups);
}

// Codes, which start as 0xff.
Array<uint8_t> nearest_codes(const Array<float>& weight, const Array<float>& table, int64_t group_size, int bits,
                             bool packed, int isa, int threads) {
  const rcp::NearestCodes a{weight.data(), table.data(), weight.shape(0), weight.shape(1), group_size, bits};
  require(table.size() == a.rows * a.groups() << bits, "table must be [rows, groups, 2^bits]");
  Array<uint8_t> codes({a.rows, packed ? a.packed_bytes() : a.columns});
  std::fill_n(codes.mutable_data(), codes.size(), uint8_t{0xff});
  rcp::nearest_codes(a, packed, codes.mutable_data(), isa_of(isa), thread_pool(threads));
  return codes;
}

// The changed block, codes and errors; these start as 0xff and NaN.
py::tuple gptq_round(const Array<float>& block, const Array<float>& upper, const Array<float>& table, int64_t first,
                     int64_t last, int isa, int threads) {
  rcp::GptqRound a{};
  a.rows = block.shape(0);
  a.columns = block.shape(1);
  a.first = first;
  a.last = last;
  a.levels = static_cast<int>(table.shape(1));
  require(upper.size() == a.columns * a.columns, "upper must be [columns, columns]");
  require(table.shape(0) == a.rows, "table must be [rows, levels]");
  require(0 <= first && first <= last && last <= a.columns, "first and last must be columns");
  Array<float> changed({a.rows, a.columns}), errors({a.rows, last - first});
  Array<uint8_t> codes({a.rows, last - first});
  std::copy_n(block.data(), block.size(), changed.mutable_data());
  std::fill_n(errors.mutable_data(), errors.size(), nan);
  std::fill_n(codes.mutable_data(), codes.size(), uint8_t{0xff});
  a.block = changed.mutable_data();
  a.row_stride = a.columns;
  a.upper = upper.data();
  a.upper_stride = a.columns;
  a.table = table.data();
  a.codes = codes.mutable_data();
  a.errors = errors.mutable_data();
  rcp::gptq_round(a, isa_of(isa), thread_pool(threads));
  return py::make_tuple(changed, codes, errors);
}

}  // namespace

void add_levels(py::module_& m) {
  m.def("kmeans_levels", &kmeans_levels);
  m.def("clip_search", &clip_search);
  m.def("nearest_codes", &nearest_codes);
  m.def("gptq_round", &gptq_round);
}
