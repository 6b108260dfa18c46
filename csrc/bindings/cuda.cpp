// Python module olive._cuda: checks what memory safety needs, then starts kernels on a stream. Addresses are
// tensor.data_ptr() of tensors on the current device; a stream is torch.cuda.current_stream().cuda_stream.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "bindings/arguments.h"
#include "cuda/api.h"

namespace py = pybind11;

namespace olive::cuda {
namespace {

constexpr int64_t kLongest = 1 << 30;  // N and K: columns, tiles and steps are counted in 32 bits

template <class T>
T* aligned_pointer(const char* name, uintptr_t address, uintptr_t alignment) {
  if (address % alignment != 0) {
    throw std::invalid_argument(std::string(name) + ": expected an address aligned to " + std::to_string(alignment) +
                                " bytes, got " + std::to_string(address));
  }
  return pointer<T>(name, address);
}

void check_weight_shape(int64_t n, int64_t k, int group_size) {
  check_shape(n, k, group_size);
  if (n > kLongest || k > kLongest) {
    throw std::invalid_argument("shape: expected N, K up to " + std::to_string(kLongest) + ", got " +
                                std::to_string(n) + ", " + std::to_string(k));
  }
}

PackedWeight packed_weight(int64_t n, int64_t k, int group_size, uintptr_t codes, uintptr_t scale, uintptr_t codebook) {
  check_weight_shape(n, k, group_size);
  return {n,
          k,
          group_size,
          aligned_pointer<const uint8_t>("codes", codes, 16),
          aligned_pointer<const int16_t>("scale", scale, 4),
          pointer<const int8_t>("codebook", codebook)};
}

LinearArguments linear_arguments(uintptr_t x, int type, int64_t m, int64_t n, int64_t k, int group_size,
                                 uintptr_t codes, uintptr_t scale, uintptr_t codebook, uintptr_t bias, int bias_type,
                                 uintptr_t out) {
  if (m < 1) throw std::invalid_argument("m: expected at least 1, got " + std::to_string(m));
  if (k % 8 != 0) throw std::invalid_argument("k: expected a multiple of 8, got " + std::to_string(k));
  LinearArguments arguments = {};
  arguments.weight = packed_weight(n, k, group_size, codes, scale, codebook);
  arguments.x = aligned_pointer<const void>("x", x, 16);
  arguments.type = float_type(type);
  arguments.m = m;
  arguments.bias = pointer<const void>("bias", bias, true);
  arguments.bias_type = float_type(bias_type);
  arguments.out = pointer<void>("out", out);
  return arguments;
}

void check_split(int split) {
  if (split != 1 && split != 2 && split != 4 && split != 8) {
    throw std::invalid_argument("split: expected 1, 2, 4 or 8, got " + std::to_string(split));
  }
}

void linear_mma(uintptr_t x, int type, int64_t m, int64_t n, int64_t k, int group_size, uintptr_t codes,
                uintptr_t scale, uintptr_t codebook, uintptr_t bias, int bias_type, uintptr_t out, uintptr_t partial,
                int tokens, int split, uintptr_t stream) {
  LinearArguments arguments =
      linear_arguments(x, type, m, n, k, group_size, codes, scale, codebook, bias, bias_type, out);
  check_split(split);
  arguments.partial = pointer<float>("partial", partial, true);
  ovp_linear_mma(arguments, {tokens, split}, stream);
}

void linear_wgmma(uintptr_t x, int type, int64_t m, int64_t n, int64_t k, int group_size, uintptr_t codes,
                  uintptr_t scale, uintptr_t codebook, uintptr_t bias, int bias_type, uintptr_t out, int rows,
                  int tokens, uintptr_t stream) {
  const LinearArguments arguments =
      linear_arguments(x, type, m, n, k, group_size, codes, scale, codebook, bias, bias_type, out);
  ovp_linear_wgmma(arguments, {rows, tokens}, stream);
}

QuantizedLinearArguments quantized_arguments(uintptr_t x, uintptr_t scale_x, int64_t scale_pitch,
                                             int activation_group_size, int64_t m, int64_t n, int64_t k, int group_size,
                                             uintptr_t codes, uintptr_t scale, uintptr_t codebook, uintptr_t bias,
                                             int bias_type, uintptr_t out, int out_type) {
  constexpr int64_t kMostTokens = 256;  // of a block, which may read its share of scales whole
  if (m < 1) throw std::invalid_argument("m: expected at least 1, got " + std::to_string(m));
  check_group_size(activation_group_size);
  if (scale_pitch < m || scale_pitch % kMostTokens != 0) {
    throw std::invalid_argument("scale_pitch: expected a multiple of 256 of at least M, got " +
                                std::to_string(scale_pitch));
  }
  QuantizedLinearArguments arguments = {};
  arguments.weight = packed_weight(n, k, group_size, codes, scale, codebook);
  arguments.x = aligned_pointer<const int8_t>("x", x, 16);
  arguments.scale_x = aligned_pointer<const float>("scale_x", scale_x, 16);
  arguments.scale_pitch = scale_pitch;
  arguments.activation_group_size = activation_group_size;
  arguments.m = m;
  arguments.bias = pointer<const void>("bias", bias, true);
  arguments.bias_type = float_type(bias_type);
  arguments.out = aligned_pointer<void>("out", out, 4);
  arguments.out_type = float_type(out_type);
  return arguments;
}

void linear_quantized_mma(uintptr_t x, uintptr_t scale_x, int64_t scale_pitch, int activation_group_size, int64_t m,
                          int64_t n, int64_t k, int group_size, uintptr_t codes, uintptr_t scale, uintptr_t codebook,
                          uintptr_t bias, int bias_type, uintptr_t out, int out_type, uintptr_t partial, int tokens,
                          int split, uintptr_t stream) {
  QuantizedLinearArguments arguments =
      quantized_arguments(x, scale_x, scale_pitch, activation_group_size, m, n, k, group_size, codes, scale, codebook,
                          bias, bias_type, out, out_type);
  check_split(split);
  arguments.partial = pointer<void>("partial", partial, true);
  ovp_linear_quantized_mma(arguments, {tokens, split}, stream);
}

void linear_quantized_wgmma(uintptr_t x, uintptr_t scale_x, int64_t scale_pitch, int activation_group_size, int64_t m,
                            int64_t n, int64_t k, int group_size, uintptr_t codes, uintptr_t scale, uintptr_t codebook,
                            uintptr_t bias, int bias_type, uintptr_t out, int out_type, int rows, int tokens,
                            uintptr_t stream) {
  const QuantizedLinearArguments arguments =
      quantized_arguments(x, scale_x, scale_pitch, activation_group_size, m, n, k, group_size, codes, scale, codebook,
                          bias, bias_type, out, out_type);
  ovp_linear_quantized_wgmma(arguments, {rows, tokens}, stream);
}

void pack(uintptr_t codes, uintptr_t scale, int64_t n, int64_t k, int group_size, uintptr_t packed_codes,
          uintptr_t packed_scale, uintptr_t stream) {
  check_weight_shape(n, k, group_size);
  ovp_pack(n, k, group_size, pointer<const uint8_t>("codes", codes), pointer<const int16_t>("scale", scale),
           aligned_pointer<uint8_t>("packed_codes", packed_codes, 16),
           aligned_pointer<int16_t>("packed_scale", packed_scale, 4), stream);
}

void unpack(uintptr_t packed_codes, uintptr_t packed_scale, int64_t n, int64_t k, int group_size, uintptr_t codes,
            uintptr_t scale, uintptr_t stream) {
  check_weight_shape(n, k, group_size);
  ovp_unpack(n, k, group_size, aligned_pointer<const uint8_t>("packed_codes", packed_codes, 16),
             aligned_pointer<const int16_t>("packed_scale", packed_scale, 4), pointer<uint8_t>("codes", codes),
             pointer<int16_t>("scale", scale), stream);
}

void decode(uintptr_t codes, uintptr_t scale, uintptr_t codebook, int64_t n, int64_t k, int group_size, bool packed,
            uintptr_t out, int type, uintptr_t stream) {
  if (packed) {
    const PackedWeight weight = packed_weight(n, k, group_size, codes, scale, codebook);
    return ovp_decode_packed(weight, pointer<void>("out", out), float_type(type), stream);
  }
  check_weight_shape(n, k, group_size);
  const CanonicalWeight weight = {n,
                                  k,
                                  group_size,
                                  pointer<const uint8_t>("codes", codes),
                                  pointer<const int16_t>("scale", scale),
                                  pointer<const int8_t>("codebook", codebook)};
  ovp_decode(weight, pointer<void>("out", out), float_type(type), stream);
}

WeightSource weight_source(uintptr_t weight, int type, int64_t n, int64_t k, int group_size, uintptr_t codebook,
                           bool paper_pairing) {
  check_weight_shape(n, k, group_size);
  return {pointer<const void>("weight", weight),       float_type(type), n, k, group_size,
          pointer<const int8_t>("codebook", codebook), paper_pairing};
}

void encode(uintptr_t weight, int type, int64_t n, int64_t k, int group_size, uintptr_t codebook, bool paper_pairing,
            uintptr_t scale, uintptr_t codes, uintptr_t not_finite, uintptr_t stream) {
  const WeightSource source = weight_source(weight, type, n, k, group_size, codebook, paper_pairing);
  ovp_encode(source, pointer<const int16_t>("scale", scale), pointer<uint8_t>("codes", codes),
             aligned_pointer<int32_t>("not_finite", not_finite, 4), stream);
}

void quantize(uintptr_t weight, int type, int64_t n, int64_t k, int group_size, uintptr_t codebook, bool paper_pairing,
              uintptr_t pair_grid, int pair_count, uintptr_t plain_grid, int plain_count, uintptr_t importance,
              uintptr_t scratch, uintptr_t codes, uintptr_t scale, uintptr_t not_finite, uintptr_t stream) {
  const WeightSource source = weight_source(weight, type, n, k, group_size, codebook, paper_pairing);
  if (pair_count < 0 || plain_count < 0) throw std::invalid_argument("grids: expected at least 0 multiples");
  Search search = {};
  search.pair_grid = pointer<const float>("pair_grid", pair_grid, pair_count == 0);
  search.pair_count = pair_count;
  search.plain_grid = pointer<const float>("plain_grid", plain_grid, plain_count == 0);
  search.plain_count = plain_count;
  search.importance = pointer<const float>("importance", importance, true);
  search.scratch = pointer<double>("scratch", scratch, group_size != 0);
  ovp_quantize(source, search, pointer<uint8_t>("codes", codes), pointer<int16_t>("scale", scale),
               aligned_pointer<int32_t>("not_finite", not_finite, 4), stream);
}

void compensate(uintptr_t values, uintptr_t scale, int64_t scales_per_row, uintptr_t factor, uintptr_t codebook,
                int64_t rows, int64_t columns, uintptr_t codes, uintptr_t errors, uintptr_t loss, uintptr_t stream) {
  check_weight_shape(rows, columns, -1);
  check_compensation(columns, scales_per_row);
  const Compensation run = {pointer<const float>("values", values),
                            pointer<const int16_t>("scale", scale),
                            scales_per_row,
                            aligned_pointer<const float>("factor", factor, 8),
                            pointer<const int8_t>("codebook", codebook),
                            rows,
                            columns,
                            pointer<uint8_t>("codes", codes),
                            pointer<float>("errors", errors),
                            pointer<float>("loss", loss)};
  ovp_compensate(run, stream);
}

int copy_multiples(const char* name, const std::vector<float>& from, float (&to)[kMostMultiples]) {
  if (from.size() > kMostMultiples) {
    throw std::invalid_argument(std::string(name) + ": expected at most " + std::to_string(kMostMultiples) +
                                " multiples, got " + std::to_string(from.size()));
  }
  std::copy(from.begin(), from.end(), to);
  return static_cast<int>(from.size());
}

void quantize_activation_levels(uintptr_t x, int type, int64_t m, int64_t k, int format, int group_size,
                                bool paper_pairing, uintptr_t codebook, uintptr_t static_scale,
                                const std::vector<float>& pair_grid, const std::vector<float>& plain_grid,
                                bool for_products, uintptr_t levels, int level_type, uintptr_t scale,
                                int64_t scale_pitch, uintptr_t stream) {
  if (m < 1) throw std::invalid_argument("m: expected at least 1, got " + std::to_string(m));
  check_weight_shape(1, k, group_size);
  if (format < 0 || format > 2) throw std::invalid_argument("format: expected 0 (int8), 1 (ovp4) or 2 (ovp8)");
  if (level_type < 0 || level_type > 3) throw std::invalid_argument("level_type: expected 0 to 3");
  ActivationSource source = {};
  source.data = aligned_pointer<const void>("x", x, 8);
  source.type = float_type(type);
  source.m = m, source.k = k;
  source.format = static_cast<ActivationFormat>(format);
  source.group_size = group_size;
  source.paper_pairing = paper_pairing;
  source.codebook = pointer<const int8_t>("codebook", codebook, source.format != ActivationFormat::ovp4);
  source.static_scale = group_size == 0 ? aligned_pointer<const int16_t>("static_scale", static_scale, 2) : nullptr;
  source.grids.pair_count = copy_multiples("pair_grid", pair_grid, source.grids.pair);
  source.grids.plain_count = copy_multiples("plain_grid", plain_grid, source.grids.plain);
  ActivationLevels to = {};
  to.for_products = for_products;
  to.levels = aligned_pointer<void>("levels", levels, 8);
  to.type = static_cast<LevelType>(level_type);
  to.scale = aligned_pointer<float>("scale", scale, 4);
  to.scale_pitch = scale_pitch;
  if (for_products && (to.type != LevelType::int8 || scale_pitch < m)) {
    throw std::invalid_argument("for_products: expected int8 levels and a pitch of scales of at least M");
  }
  quantize_activations(source, to, stream);
}

py::dict device_properties(int index) {
  const Device found = device(index);
  py::dict properties;
  properties["multiprocessors"] = found.multiprocessors;
  properties["capability"] = found.capability;
  properties["clusters"] = found.clusters;
  properties["shared_per_block"] = found.shared_per_block;
  properties["shared_per_processor"] = found.shared_per_processor;
  return properties;
}

py::list shape_list(const MmaShape* from) {
  py::list shapes;
  for (int i = 0; i < kMmaShapes; ++i) {
    shapes.append(py::make_tuple(from[i].tokens, from[i].rows, from[i].warps_along_k, from[i].blocks, from[i].shared));
  }
  return shapes;
}

}  // namespace

void bind(py::module_& module) {
  module.doc() = "CUDA kernels of OliVe on raw device addresses; use olive.ops";
  module.def("linear_mma", &linear_mma);
  module.def("linear_wgmma", &linear_wgmma);
  module.def("linear_quantized_mma", &linear_quantized_mma);
  module.def("linear_quantized_wgmma", &linear_quantized_wgmma);
  module.def("pack", &pack);
  module.def("unpack", &unpack);
  module.def("decode", &decode);
  module.def("encode", &encode);
  module.def("quantize", &quantize);
  module.def("compensate", &compensate);
  module.def("most_compensated_columns", &most_compensated_columns);
  module.def("quantize_activations", &quantize_activation_levels);
  module.def("mma_shapes", [] { return shape_list(mma_shapes()); });
  module.def("quantized_mma_shapes", [] { return shape_list(quantized_mma_shapes()); });
  module.def("device_properties", &device_properties);
  module.def("unsupported", [](int index) { return unsupported(index); });
  module.attr("architectures") = OLIVE_CUDA_ARCHITECTURES;  // what the build has code for, e.g. "80-real,90a-real"
}

}  // namespace olive::cuda

#if !defined(OLIVE_EMULATED)
PYBIND11_MODULE(_cuda, module) { olive::cuda::bind(module); }
#endif
