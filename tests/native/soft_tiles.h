// The AMX tile instructions of lut_linear_amx.h, computed in plain C++ as the manual defines them: the tiled algorithm
// runs on machines without AMX. Throws where the hardware would fault.
#pragma once

#include <cstring>
#include <stdexcept>

#include "rcp/cpu/lut_linear_amx.h"

namespace rcp::amx {

struct SoftTiles {
  struct State {
    TileConfig config;
    bool configured = false;
    alignas(64) uint8_t tiles[8][16][64];
  };
  static State& state() {
    thread_local State s;
    return s;
  }
  static State& configured() {
    if (!state().configured) throw std::logic_error("tile instruction without a tile configuration (#UD)");
    return state();
  }
  static void configure(const TileConfig& config) {
    if (config.palette != 1) throw std::logic_error("palette must be 1 (#GP)");
    for (int t = 0; t < 8; ++t) {
      if (config.rows[t] > 16 || config.column_bytes[t] > 64) throw std::logic_error("tile larger than 16 x 64 (#GP)");
    }
    state().config = config;
    state().configured = true;
    std::memset(state().tiles, 0xa5, sizeof state().tiles);  // no code may rely on earlier contents
  }
  static void release() { configured().configured = false; }
  template <int T>
  static void zero() {
    std::memset(configured().tiles[T], 0, sizeof state().tiles[T]);
  }
  template <int T>
  static void load(const void* p, int64_t stride) {
    State& s = configured();
    std::memset(s.tiles[T], 0, sizeof s.tiles[T]);
    for (int r = 0; r < s.config.rows[T]; ++r) {
      std::memcpy(s.tiles[T][r], static_cast<const char*>(p) + r * stride, s.config.column_bytes[T]);
    }
  }
  template <int T>
  static void store(void* p, int64_t stride) {
    State& s = configured();
    for (int r = 0; r < s.config.rows[T]; ++r) {
      std::memcpy(static_cast<char*>(p) + r * stride, s.tiles[T][r], s.config.column_bytes[T]);
    }
  }
  // tdpbsud: int32 += signed bytes of a row times unsigned bytes of the column-interleaved tile.
  template <int I, int J>
  static void multiply() {
    State& s = configured();
    constexpr int c = 2 * I + J, a = 4 + I, b = 6 + J;
    if (s.config.column_bytes[a] / 4 != s.config.rows[b]) throw std::logic_error("tile shapes do not match (#UD)");
    for (int m = 0; m < s.config.rows[c]; ++m) {
      for (int n = 0; n < s.config.column_bytes[c] / 4; ++n) {
        int32_t sum;
        std::memcpy(&sum, &s.tiles[c][m][4 * n], 4);
        for (int k = 0; k < s.config.column_bytes[a]; ++k) {
          sum += static_cast<int8_t>(s.tiles[a][m][k]) * static_cast<int>(s.tiles[b][k / 4][4 * n + k % 4]);
        }
        std::memcpy(&s.tiles[c][m][4 * n], &sum, 4);
      }
    }
  }
};

}  // namespace rcp::amx
