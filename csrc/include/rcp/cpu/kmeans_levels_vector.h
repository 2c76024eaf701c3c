// Sorts one group in each lane of a register: keys [length][lanes]. Included by each_isa.h.

template <class Key>
RCP_TARGET inline void sort_groups(const SortingNetwork& network, Key* keys) {
  for (const auto& pair : network.pairs)
    lanes::exchange(keys + pair.low * lanes::count, keys + pair.high * lanes::count);
}

inline constexpr SortKernels sort_kernels{lanes::count, sort_groups<int32_t>, sort_groups<int64_t>};
