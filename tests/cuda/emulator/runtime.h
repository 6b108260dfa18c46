// The emulator's side of csrc/cuda/runtime.cuh, which includes it after its own declarations.
#pragma once

#include "emulator/machine.h"

namespace olive::cuda {

inline Device current_device() {
  const auto& fake = emulator::fake_device;
  return {0,
          fake.multiprocessors,
          fake.capability,
          fake.capability >= 90,
          fake.shared_per_block,
          fake.shared_per_block + 1024};
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const Launch& shape, Arguments... arguments) {
  if (shape.shared > static_cast<std::size_t>(current_device().shared_per_block)) {
    throw std::runtime_error(std::string(name) + ": too much shared memory");
  }
  if (shape.cluster > 1 && current_device().capability < 90) {
    throw std::runtime_error(std::string(name) + ": clusters need sm_90");
  }
  emulator::launched.emplace_back(name);
  emulator::run({{shape.blocks_x, shape.blocks_y, 1}, shape.threads, shape.shared, shape.cluster},
                [&] { kernel(static_cast<Parameters>(arguments)...); });
}

inline TensorMap map_matrix(const void* address, Element element, std::int64_t rows, std::int64_t columns,
                            int box_rows) {
  if (reinterpret_cast<std::uintptr_t>(address) % 16 != 0 || columns * bytes_of(element) % 16 != 0) {
    throw std::runtime_error("map_matrix: misaligned matrix");
  }
  if (box_rows < 1 || box_rows > 256) throw std::runtime_error("map_matrix: a box of " + std::to_string(box_rows));
  return {static_cast<const unsigned char*>(address), rows, columns, box_rows, bytes_of(element)};
}

}  // namespace olive::cuda
