// What the Python modules check before they call: types, addresses and sizes, as far as memory safety needs it.
#pragma once

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "core/floats.h"
#include "core/ovp.h"

namespace olive {

inline Float float_type(int type) {
  if (type < 0 || type > 2) throw std::invalid_argument("type: expected 0 (float32), 1 (bfloat16) or 2 (float16)");
  return static_cast<Float>(type);
}

template <class T>
T* pointer(const char* name, uintptr_t address, bool may_be_null = false) {
  if (address == 0 && !may_be_null) throw std::invalid_argument(std::string(name) + ": expected an address, got 0");
  return reinterpret_cast<T*>(address);
}

inline void check_group_size(int group_size) {
  const bool known = group_size == -1 || group_size == 0 || group_size == 32 || group_size == 64 || group_size == 128;
  if (!known) {
    throw std::invalid_argument("group_size: expected -1, 0, 32, 64 or 128, got " + std::to_string(group_size));
  }
}

inline void check_shape(int64_t n, int64_t k, int group_size) {
  if (n < 1 || k < 1 || n > std::numeric_limits<int64_t>::max() / (k + kMaxBlock) / 4) {
    throw std::invalid_argument("shape: expected N, K >= 1 within 64 bits, got " + std::to_string(n) + ", " +
                                std::to_string(k));
  }
  check_group_size(group_size);
}

inline void check_compensation(int64_t columns, int64_t scales_per_row) {
  if (columns % 2 != 0) throw std::invalid_argument("columns: expected an even number");
  if (scales_per_row != 1 && scales_per_row != columns / 2) {
    throw std::invalid_argument("scales_per_row: expected 1, or one per pair");
  }
}

}  // namespace olive
