// Devices, launches and tensor maps: everything the launchers ask of the CUDA runtime. Errors become exceptions.
// Under OLIVE_EMULATED the tests' emulator stands in for it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/api.h"
#include "cuda/ptx.cuh"

#if !defined(OLIVE_EMULATED)
#include <cuda_runtime_api.h>
#endif

namespace olive::cuda {

// The shape of a launch. A cluster is `cluster` blocks that are neighbours along x. `overlaps`: the kernel calls
// `wait_for_launch_before`, so it may start while the launch before it on the stream ends (from sm_90 on).
struct Launch {
  unsigned blocks_x, blocks_y;
  unsigned threads;
  std::size_t shared;  // bytes
  unsigned cluster;
  std::uintptr_t stream;
  bool overlaps = false;
};

// What a matrix for the copy engine holds.
enum class Element { bf16, f16, int8 };
constexpr int bytes_of(Element element) { return element == Element::int8 ? 1 : 2; }

#if !defined(OLIVE_EMULATED)

inline void check(const char* what, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // an error is told once
  std::string hint;
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    hint =
        "; this build of olive._cuda has no code for the GPU: rebuild it with CMAKE_CUDA_ARCHITECTURES set to the "
        "GPU's compute capability (9.0 is 90a-real)";
  } else if (error == cudaErrorInsufficientDriver || error == cudaErrorNoDevice) {
    hint = "; olive._cuda needs an NVIDIA GPU and a driver for CUDA " + std::to_string(CUDART_VERSION / 1000) +
           " or newer";
  }
  throw std::runtime_error(std::string(what) + ": CUDA says " + cudaGetErrorName(error) + " (" +
                           cudaGetErrorString(error) + ")" + hint);
}

inline Device current_device() {
  int index = 0;
  check("device", cudaGetDevice(&index));
  return device(index);
}

// Starts kernel(arguments...) and reports what is wrong with the launch.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const Launch& shape, Arguments... arguments) {
  if (shape.shared > 48 * 1024) {  // more than the default has to be asked for
    check(name, cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     static_cast<int>(shape.shared)));
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(shape.blocks_x, shape.blocks_y);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared;
  config.stream = reinterpret_cast<cudaStream_t>(shape.stream);
  cudaLaunchAttribute attributes[2] = {};
  config.attrs = attributes;
  if (shape.cluster > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = shape.cluster;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  }
  if (shape.overlaps && current_device().capability >= 90) {
    cudaLaunchAttribute& overlap = attributes[config.numAttrs++];
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
  }
  check(name, cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

// A map of a row-major matrix [rows, columns], for boxes of `box_rows` x 128 bytes in the layout that wgmma reads:
// 16-byte chunks swizzled. `address` and rows are multiples of 16 bytes.
TensorMap map_matrix(const void* address, Element element, std::int64_t rows, std::int64_t columns, int box_rows);

#endif

}  // namespace olive::cuda

#if defined(OLIVE_EMULATED)
#include "emulator/runtime.h"
#endif
