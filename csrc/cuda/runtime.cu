// Tensor maps, and whether this build has code for a device. The driver's function is looked up at run time: nothing
// links libcuda, so the module imports without a driver.
#include <algorithm>
#include <map>
#include <mutex>

#include "cuda/api.h"
#include "cuda/runtime.cuh"

namespace olive::cuda {
namespace {

__global__ void probe_kernel() {}

// Makes a device the current one for as long as this lives.
class Current {
 public:
  explicit Current(int index) {
    check("device", cudaGetDevice(&before_));
    check("device", cudaSetDevice(index));
  }
  ~Current() { cudaSetDevice(before_); }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  int before_ = 0;
};

Device ask_device(int index) {
  const Current current(index);
  int major = 0, minor = 0, clusters = 0;
  Device found = {};
  found.index = index;
  const auto ask = [&](int* to, cudaDeviceAttr attribute) {
    check("device", cudaDeviceGetAttribute(to, attribute, index));
  };
  ask(&major, cudaDevAttrComputeCapabilityMajor);
  ask(&minor, cudaDevAttrComputeCapabilityMinor);
  ask(&clusters, cudaDevAttrClusterLaunch);
  ask(&found.multiprocessors, cudaDevAttrMultiProcessorCount);
  ask(&found.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  ask(&found.shared_per_processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  // Code that the driver made of older PTX has neither clusters nor wgmma, whatever the GPU has.
  cudaFuncAttributes attributes = {};
  check("device", cudaFuncGetAttributes(&attributes, probe_kernel));
  found.capability = std::min(10 * major + minor, attributes.ptxVersion);
  found.clusters = clusters != 0 && found.capability >= 90;
  return found;
}

}  // namespace

Device device(int index) {
  static std::mutex mutex;
  static std::map<int, Device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(index);
  return found != known.end() ? found->second : known.emplace(index, ask_device(index)).first->second;
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
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
    return "this build of olive._cuda has code for " OLIVE_CUDA_ARCHITECTURES ", the GPU has compute capability " +
           std::to_string(major) + "." + std::to_string(minor);
  }
  return std::string("CUDA says ") + cudaGetErrorName(error) + " (" + cudaGetErrorString(error) + ")";
}

TensorMap map_matrix(const void* address, Element element, std::int64_t rows, std::int64_t columns, int box_rows) {
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
  const cuuint64_t pitch[1] = {static_cast<cuuint64_t>(columns) * bytes_of(element)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(128 / bytes_of(element)), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUtensorMapDataType type = element == Element::bf16  ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                   : element == Element::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                             : CU_TENSOR_MAP_DATA_TYPE_UINT8;
  TensorMap map;
  const CUresult result =
      encode(&map, type, 2, const_cast<void*>(address), sizes, pitch, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("map_matrix: the driver refuses a matrix of " + std::to_string(rows) + " x " +
                             std::to_string(columns) + " (error " + std::to_string(result) + ")");
  }
  return map;
}

}  // namespace olive::cuda
