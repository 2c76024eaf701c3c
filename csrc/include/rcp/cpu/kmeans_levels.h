// Lloyd's algorithm in one dimension on each group of weights, with or without an importance of each weight.
//
// A group is sorted once. Its clusters are then intervals of the sorted order, and their means are differences of
// prefix sums. Sums are float64, in the order of the sorted weights; equal weights keep their order. The result is the
// same on every CPU and with any number of threads, and equal to the reference in plain torch.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "rcp/cpu/lanes.h"
#include "rcp/cpu/level_groups.h"
#include "rcp/cpu/scratch.h"

namespace rcp {

inline constexpr int kmeans_iterations = 20;

// The exchanges of Batcher's odd-even merge sort of n numbers, as pairs of indices.
struct SortingNetwork {
  explicit SortingNetwork(int64_t n) {
    for (int64_t p = 1; p < n; p *= 2) {
      for (int64_t k = p; k >= 1; k /= 2) {
        for (int64_t j = k % p; j + k < n; j += 2 * k) {
          for (int64_t i = 0; i < std::min(k, n - j - k); ++i) {
            if ((i + j) / (2 * p) == (i + j + k) / (2 * p)) {
              pairs.push_back({static_cast<uint16_t>(i + j), static_cast<uint16_t>(i + j + k)});
            }
          }
        }
      }
    }
  }
  struct Pair {
    uint16_t low, high;
  };
  std::vector<Pair> pairs;
};

// Sorts `lanes` groups at once, one a lane: keys [length][lanes].
struct SortKernels {
  int64_t lanes;
  void (*sort32)(const SortingNetwork& network, int32_t* keys);
  void (*sort64)(const SortingNetwork& network, int64_t* keys);
};

}  // namespace rcp

#define RCP_KERNELS "rcp/cpu/kmeans_levels_vector.h"
#include "rcp/cpu/each_isa.h"

namespace rcp {

namespace detail {

// An integer that orders as the float does; 0 and -0 give one integer. key_value is the inverse, with 0 for -0.
inline int32_t order_key(float value) {
  const int32_t bits = static_cast<int32_t>(bits_of(value + 0.0f));
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
inline float key_value(int32_t key) {
  return float_of(static_cast<uint32_t>(key ^ ((key >> 31) & 0x7fffffff)));
}

// With an importance, the key also holds the weight's index: keys are then distinct, and equal weights keep their
// order.
inline int64_t indexed_key(float value, int64_t index) {
  return static_cast<int64_t>(order_key(value)) * (int64_t{1} << 32) + index;
}

// Working memory of one group.
class Lloyd {
 public:
  Lloyd(int64_t length, int count)
      : n_(length),
        count_(count),
        mass_(static_cast<std::size_t>(length + 1)),
        moment_(mass_.size()),
        values_(mass_.size()),
        centers_(static_cast<std::size_t>(count)),
        edges_(static_cast<std::size_t>(count + 1)),
        moved_(static_cast<std::size_t>(count)) {}

  float* values() { return values_.data(); }

  // importance(i) is that of the i-th sorted weight. values() must hold the sorted weights.
  template <class Importance>
  void prefix_sums(const Importance& importance) {
    double mass = 0.0, moment = 0.0;
    for (int64_t i = 0; i < n_; ++i) {
      const double m = importance(i);
      mass += m;
      moment += m * static_cast<double>(values_[i]);
      mass_[i + 1] = mass;
      moment_[i + 1] = moment;
    }
  }

  template <bool WEIGHTED>
  void run(float* levels) {
    start();
    for (int iteration = 0; iteration < kmeans_iterations; ++iteration) {
      if (!move_edges(iteration == 0)) break;
      move_centers<WEIGHTED>(iteration == 0);
    }
    for (int c = 0; c < count_; ++c) levels[c] = static_cast<float>(centers_[c]);
  }

 private:
  void start() {
    const double low = values_[0], high = values_[n_ - 1];
    for (int c = 0; c < count_; ++c) {
      const double position = (c + 0.5) / count_;
      const double median = values_[static_cast<int64_t>(position * static_cast<double>(n_))];
      centers_[c] = 0.5 * (median + low + (high - low) * position);
    }
    edges_[0] = 0;
    edges_[count_] = n_;
  }

  // Each edge is the first weight that is not below the midpoint of two centers. An edge between two centers that did
  // not move does not move. Returns whether any edge moved.
  bool move_edges(bool first) {
    bool moved = first;
    edge_moved_.assign(static_cast<std::size_t>(count_ + 1), first);
    for (int c = 1; c < count_; ++c) {
      if (!first && !moved_[c - 1] && !moved_[c]) continue;
      const float bound = static_cast<float>((centers_[c] + centers_[c - 1]) * 0.5);
      int64_t edge;
      if (first) {
        edge = std::lower_bound(values(), values() + n_, bound) - values();
      } else {
        edge = edges_[c];
        while (edge > 0 && values_[edge - 1] >= bound) --edge;
        while (edge < n_ && values_[edge] < bound) ++edge;
        edge_moved_[c] = edge != edges_[c];
        moved = moved || edge_moved_[c];
      }
      edges_[c] = edge;
    }
    return moved;
  }

  template <bool WEIGHTED>
  void move_centers(bool first) {
    for (int c = 0; c < count_; ++c) {
      moved_[c] = false;
      if (!first && !edge_moved_[c] && !edge_moved_[c + 1]) continue;
      const int64_t begin = edges_[c], end = edges_[c + 1];
      double mean;
      if constexpr (WEIGHTED) {
        const double inside = mass_[end] - mass_[begin];
        if (!(inside > 0.0)) continue;
        mean = (moment_[end] - moment_[begin]) / inside;
        // Where a cluster has little mass, rounding could put its mean outside of it.
        mean = std::max(mean, static_cast<double>(values_[std::min(begin, n_ - 1)]));
        mean = std::min(mean, static_cast<double>(values_[std::max<int64_t>(end - 1, 0)]));
      } else {
        // An empty cluster keeps its center. Its neighbours' means stay on their sides of it, so centers stay sorted.
        if (end <= begin) continue;
        mean = (moment_[end] - moment_[begin]) / static_cast<double>(end - begin);
      }
      moved_[c] = mean != centers_[c];
      centers_[c] = mean;
    }
  }

  int64_t n_;
  int count_;
  std::vector<double> mass_, moment_;
  std::vector<float> values_;
  std::vector<double> centers_;
  std::vector<int64_t> edges_;
  std::vector<char> moved_, edge_moved_;
};

// Sorting sixteen groups at once by a network of n log^2 n exchanges beats std::sort for short groups only.
inline constexpr int64_t longest_network = 256;

template <bool WEIGHTED>
void kmeans_levels(const LevelGroups& g, int count, float* levels, FirstIndex& bad, Isa isa, const ThreadPool& pool) {
  using Key = std::conditional_t<WEIGHTED, int64_t, int32_t>;
  const SortKernels& kernels = RCP_FOR_ISA(isa, sort_kernels);
  const int64_t lanes = g.length <= longest_network ? kernels.lanes : 1, n = g.length;
  const SortingNetwork network(lanes > 1 ? n : 0);
  const int64_t tiles = (g.groups + lanes - 1) / lanes;
  parallel_pieces(pool, tiles, std::max<int64_t>(1, (1 << 14) / (n * lanes)), [&](int64_t begin, int64_t end) {
    Scratch scratch(Scratch::size_of<Key>(n * lanes));
    Key* keys = scratch.take<Key>(n * lanes);
    Lloyd lloyd(n, count);
    for (int64_t first = begin * lanes; first < std::min(end * lanes, g.groups); first += lanes) {
      for (int64_t lane = 0; lane < lanes; ++lane) {
        // Lanes beyond the last group repeat it. Their result is not used.
        const float* values = g.values + std::min(first + lane, g.groups - 1) * n;
        for (int64_t i = 0; i < n; ++i) {
          if constexpr (WEIGHTED) {
            keys[i * lanes + lane] = indexed_key(values[i], i);
          } else {
            keys[i * lanes + lane] = order_key(values[i]);
          }
        }
      }
      if (lanes == 1) {
        std::sort(keys, keys + n);
      } else if constexpr (WEIGHTED) {
        kernels.sort64(network, keys);
      } else {
        kernels.sort32(network, keys);
      }
      for (int64_t lane = 0; lane < std::min(lanes, g.groups - first); ++lane) {
        const int64_t group = first + lane;
        if (!g.valid(group)) {
          bad.report(group);
          continue;
        }
        for (int64_t i = 0; i < n; ++i) {
          const Key key = keys[i * lanes + lane];
          lloyd.values()[i] = key_value(static_cast<int32_t>(WEIGHTED ? static_cast<int64_t>(key) >> 32 : key));
        }
        if constexpr (WEIGHTED) {
          const float* importance = g.importance + group * n;
          const bool none = std::all_of(importance, importance + n, [](float x) { return x == 0.0f; });
          lloyd.prefix_sums([&](int64_t i) {
            return none ? 1.0 : static_cast<double>(importance[keys[i * lanes + lane] & 0xffffffff]);
          });
        } else {
          lloyd.prefix_sums([](int64_t) { return 1.0; });
        }
        lloyd.run<WEIGHTED>(levels + group * count);
      }
    }
  });
}

}  // namespace detail

// Writes levels [groups, count], ascending. Those of a group that `bad` reports are not written.
inline void kmeans_levels(const LevelGroups& g, int count, float* levels, FirstIndex& bad, Isa isa,
                          const ThreadPool& pool) {
  // A second thread pays from about a thousand weights (20 us) on.
  const ThreadPool threads = pool.serial_if(g.groups * g.length < (1 << 12));
  if (g.importance != nullptr) {
    detail::kmeans_levels<true>(g, count, levels, bad, isa, threads);
  } else {
    detail::kmeans_levels<false>(g, count, levels, bad, isa, threads);
  }
}

}  // namespace rcp
