// Tensor maps, and whether this build has code for a device. The driver's function is looked up at run time: nothing
// links libcuda, so the module imports without a driver.
#include "cuda/api.h"
#include "cuda/runtime.cuh"

namespace olive::cuda {
namespace {

__global__ void probe_kernel() {}

}  // namespace

Device device(int index) {
  int major = 0, minor = 0;
  Device found = {index, 0, 0, 0, 0};
  const auto ask = [&](int* to, cudaDeviceAttr attribute) {
    check("device", cudaDeviceGetAttribute(to, attribute, index));
  };
  ask(&major, cudaDevAttrComputeCapabilityMajor);
  ask(&minor, cudaDevAttrComputeCapabilityMinor);
  ask(&found.multiprocessors, cudaDevAttrMultiProcessorCount);
  ask(&found.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  ask(&found.shared_per_processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  found.capability = 10 * major + minor;
  return found;
}

std::string unsupported(int index) {
  int before = 0;
  cudaFuncAttributes attributes = {};
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(index);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, probe_kernel);
  cudaSetDevice(before);
  cudaGetLastError();
  if (error == cudaSuccess) return "";
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    const int capability = device(index).capability;
    return "this build of olive._cuda has code for " OLIVE_CUDA_ARCHITECTURES ", the GPU has compute capability " +
           std::to_string(capability / 10) + "." + std::to_string(capability % 10);
  }
  return std::string("CUDA says ") + cudaGetErrorName(error) + " (" + cudaGetErrorString(error) + ")";
}

TensorMap map_matrix(const void* address, bool is_bf16, std::int64_t rows, std::int64_t columns, int box_rows) {
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                              const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    check("map_matrix",
          cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result));
    if (result != cudaDriverEntryPointSuccess || found == nullptr) {
      throw std::runtime_error("map_matrix: expected a driver with cuTensorMapEncodeTiled (CUDA 12), got an older one");
    }
    return reinterpret_cast<Encode>(found);
  }();
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t pitch[1] = {static_cast<cuuint64_t>(columns) * 2};
  const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  TensorMap map;
  const CUresult result =
      encode(&map, is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
             const_cast<void*>(address), sizes, pitch, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("map_matrix: the driver refuses a matrix of " + std::to_string(rows) + " x " +
                             std::to_string(columns) + " (error " + std::to_string(result) + ")");
  }
  return map;
}

}  // namespace olive::cuda
