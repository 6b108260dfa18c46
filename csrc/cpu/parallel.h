// Rows in parallel, by OpenMP threads that are Torch's own.
#pragma once

#include <algorithm>
#include <cstdint>

namespace olive {

// Rows handed to a thread at once: enough work to pay for a turn, few enough to balance.
inline int64_t rows_per_turn(int64_t columns) { return std::max<int64_t>(1, 65536 / std::max<int64_t>(columns, 1)); }

// body(begin, end) for all of [0, rows), `turn` at a time.
template <class Body>
void for_rows(int64_t rows, int64_t turn, Body body) {
  const int64_t turns = (rows + turn - 1) / turn;
#pragma omp parallel for schedule(dynamic) if (turns > 1)
  for (int64_t i = 0; i < turns; ++i) body(i * turn, std::min(rows, (i + 1) * turn));
}

}  // namespace olive
