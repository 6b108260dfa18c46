// Python module olive._cpu: checks what memory safety needs, then calls. Addresses are tensor.data_ptr().
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bindings/cpu_arguments.h"
#include "cpu/api.h"

namespace py = pybind11;

namespace olive {
namespace {

// Any 32 bytes are safe; whether they are a codebook, the operators check.
Codebook codebook_at(uintptr_t address) { return read_codebook(pointer<const int8_t>("codebook", address)); }

bool quantize(uintptr_t weight, int type, int64_t n, int64_t k, int group_size, uintptr_t codebook, bool paper_pairing,
              const std::vector<float>& pair_grid, const std::vector<float>& plain_grid, uintptr_t importance,
              uintptr_t codes, uintptr_t scale, const std::string& isa) {
  check_shape(n, k, group_size);
  const Weight source = {pointer<const void>("weight", weight), float_type(type), n, k, group_size};
  const Codebook book = codebook_at(codebook);
  const Search search = {pair_grid.data(),  static_cast<int>(pair_grid.size()),
                         plain_grid.data(), static_cast<int>(plain_grid.size()),
                         paper_pairing,     pointer<const float>("importance", importance, true)};
  uint8_t* codes_to = pointer<uint8_t>("codes", codes);
  int16_t* scale_to = pointer<int16_t>("scale", scale);
  const Isa chosen = isa_of(isa);
  py::gil_scoped_release release;
  return ovp_quantize(chosen, source, book, search, codes_to, scale_to).finite;
}

void encode(uintptr_t weight, int type, int64_t n, int64_t k, int group_size, uintptr_t codebook, bool paper_pairing,
            uintptr_t scale, uintptr_t codes, const std::string& isa) {
  check_shape(n, k, group_size);
  const Weight source = {pointer<const void>("weight", weight), float_type(type), n, k, group_size};
  const Codebook book = codebook_at(codebook);
  const int16_t* scale_from = pointer<const int16_t>("scale", scale);
  uint8_t* codes_to = pointer<uint8_t>("codes", codes);
  const Isa chosen = isa_of(isa);
  py::gil_scoped_release release;
  ovp_encode(chosen, source, book, paper_pairing, scale_from, codes_to);
}

void decode(uintptr_t codes, uintptr_t scale, uintptr_t codebook, int64_t n, int64_t k, int group_size, uintptr_t out,
            int type, const std::string& isa) {
  check_shape(n, k, group_size);
  const Codebook book = codebook_at(codebook);
  const uint8_t* codes_from = pointer<const uint8_t>("codes", codes);
  const int16_t* scale_from = pointer<const int16_t>("scale", scale);
  void* to = pointer<void>("out", out);
  const Float out_type = float_type(type);
  const Isa chosen = isa_of(isa);
  py::gil_scoped_release release;
  ovp_decode(chosen, codes_from, scale_from, book, n, k, group_size, to, out_type);
}

void compensate(uintptr_t values, uintptr_t scale, int64_t scales_per_row, uintptr_t factor, uintptr_t codebook,
                int64_t rows, int64_t columns, uintptr_t codes, uintptr_t errors, uintptr_t loss,
                const std::string& isa) {
  check_shape(rows, columns, -1);
  check_compensation(columns, scales_per_row);
  const Compensation run = {pointer<const float>("values", values),
                            pointer<const int16_t>("scale", scale),
                            scales_per_row,
                            pointer<const float>("factor", factor),
                            rows,
                            columns,
                            codebook_at(codebook),
                            pointer<uint8_t>("codes", codes),
                            pointer<float>("errors", errors),
                            pointer<float>("loss", loss)};
  const Isa chosen = isa_of(isa);
  py::gil_scoped_release release;
  ovp_compensate(chosen, run);
}

void pack(uintptr_t codes, uintptr_t scale, int64_t n, int64_t k, int group_size, uintptr_t packed_codes,
          uintptr_t packed_scale) {
  check_shape(n, k, group_size);
  const uint8_t* codes_from = pointer<const uint8_t>("codes", codes);
  const int16_t* scale_from = pointer<const int16_t>("scale", scale);
  uint8_t* codes_to = pointer<uint8_t>("packed_codes", packed_codes);
  int16_t* scale_to = pointer<int16_t>("packed_scale", packed_scale);
  py::gil_scoped_release release;
  ovp_pack({n, k, group_size}, codes_from, scale_from, codes_to, scale_to);
}

void unpack(uintptr_t packed_codes, uintptr_t packed_scale, int64_t n, int64_t k, int group_size, uintptr_t codes,
            uintptr_t scale) {
  check_shape(n, k, group_size);
  const uint8_t* codes_from = pointer<const uint8_t>("packed_codes", packed_codes);
  const int16_t* scale_from = pointer<const int16_t>("packed_scale", packed_scale);
  uint8_t* codes_to = pointer<uint8_t>("codes", codes);
  int16_t* scale_to = pointer<int16_t>("scale", scale);
  py::gil_scoped_release release;
  ovp_unpack({n, k, group_size}, codes_from, scale_from, codes_to, scale_to);
}

LinearArguments linear_arguments(uintptr_t x, int x_type, int64_t m, int64_t n, int64_t k, int group_size,
                                 uintptr_t codes, uintptr_t scale, uintptr_t codebook, uintptr_t bias, int bias_type,
                                 uintptr_t out) {
  check_shape(n, k, group_size);
  if (m < 0) throw std::invalid_argument("m: expected at least 0, got " + std::to_string(m));
  LinearArguments arguments = {};
  arguments.x = pointer<const void>("x", x, m == 0);
  arguments.x_type = float_type(x_type);
  arguments.m = m;
  arguments.shape = {n, k, group_size};
  arguments.codes = pointer<const uint8_t>("codes", codes);
  arguments.scale = pointer<const int16_t>("scale", scale);
  arguments.book = codebook_at(codebook);
  arguments.bias = pointer<const void>("bias", bias, true);
  arguments.bias_type = float_type(bias_type);
  arguments.out = pointer<void>("out", out, m == 0);
  return arguments;
}

void linear(uintptr_t x, int x_type, int64_t m, int64_t n, int64_t k, int group_size, uintptr_t codes, uintptr_t scale,
            uintptr_t codebook, uintptr_t bias, int bias_type, uintptr_t out, const std::string& isa) {
  const LinearArguments arguments =
      linear_arguments(x, x_type, m, n, k, group_size, codes, scale, codebook, bias, bias_type, out);
  const Isa chosen = isa_of(isa);
  py::gil_scoped_release release;
  ovp_linear(chosen, arguments);
}

// format: 0 int8, 1 ovp4, 2 ovp8. codebook: of ovp4. static_scale: 0 = dynamic. The grids must outlive the result.
ActivationFormat activation_format(int format, int group_size, bool paper_pairing, uintptr_t codebook,
                                   uintptr_t static_scale, const std::vector<float>& pair_grid,
                                   const std::vector<float>& plain_grid) {
  if (format < 0 || format > 2) throw std::invalid_argument("format: expected 0 (int8), 1 (ovp4) or 2 (ovp8)");
  check_group_size(group_size);
  if ((group_size == 0) != (static_scale != 0)) {
    throw std::invalid_argument("static_scale: expected an address with group_size 0, and only there");
  }
  ActivationFormat result = {};
  result.levels = static_cast<Levels>(format);
  result.group_size = group_size;
  result.static_scale = pointer<const int16_t>("static_scale", static_scale, true);
  if (result.levels == Levels::ovp4) result.book = codebook_at(codebook);
  result.search = {pair_grid.data(),  static_cast<int>(pair_grid.size()),
                   plain_grid.data(), static_cast<int>(plain_grid.size()),
                   paper_pairing,     nullptr};
  return result;
}

void check_int8(const char* name, const Codebook& book) {
  if (!book.is_int8) throw std::invalid_argument(std::string(name) + ": expected levels up to 127");
}

void linear_quantized(uintptr_t x, int x_type, int64_t m, int64_t n, int64_t k, int group_size, uintptr_t codes,
                      uintptr_t scale, uintptr_t codebook, uintptr_t bias, int bias_type, uintptr_t out, int format,
                      int activation_group_size, bool paper_pairing, uintptr_t activation_codebook,
                      uintptr_t static_scale, const std::vector<float>& pair_grid, const std::vector<float>& plain_grid,
                      const std::string& isa) {
  LinearArguments arguments =
      linear_arguments(x, x_type, m, n, k, group_size, codes, scale, codebook, bias, bias_type, out);
  const ActivationFormat activations = activation_format(format, activation_group_size, paper_pairing,
                                                         activation_codebook, static_scale, pair_grid, plain_grid);
  check_int8("codebook", arguments.book);
  if (activations.levels == Levels::ovp4) check_int8("activation_codebook", activations.book);
  if (activations.levels == Levels::ovp8) throw std::invalid_argument("format: expected 0 (int8) or 1 (ovp4)");
  arguments.activations = &activations;
  const Isa chosen = isa_of(isa);
  py::gil_scoped_release release;
  ovp_linear(chosen, arguments);
}

// type: of the levels, a Float or kInt8.
void activation_levels(uintptr_t x, int x_type, int64_t m, int64_t k, int format, int group_size, bool paper_pairing,
                       uintptr_t codebook, uintptr_t static_scale, const std::vector<float>& pair_grid,
                       const std::vector<float>& plain_grid, uintptr_t levels, int type, uintptr_t scale,
                       const std::string& isa) {
  check_shape(1, k, -1);
  if (m < 0) throw std::invalid_argument("m: expected at least 0, got " + std::to_string(m));
  if (type != kInt8) float_type(type);
  const ActivationSource source = {
      pointer<const void>("x", x, m == 0), float_type(x_type), m, k,
      activation_format(format, group_size, paper_pairing, codebook, static_scale, pair_grid, plain_grid)};
  if (type == kInt8 && source.format.levels == Levels::ovp8) throw std::invalid_argument("type: ovp8 is no int8");
  if (type == kInt8 && source.format.levels == Levels::ovp4) check_int8("codebook", source.format.book);
  const LevelTarget target = {pointer<void>("levels", levels, m == 0), type, pointer<float>("scale", scale, m == 0)};
  const Isa chosen = isa_of(isa);
  py::gil_scoped_release release;
  quantize_activations(chosen, source, target);
}

bool quantize8(uintptr_t weight, int type, int64_t n, int64_t k, int group_size, bool paper_pairing,
               const std::vector<float>& grid, uintptr_t codes, uintptr_t scale, const std::string& isa) {
  check_shape(n, k, group_size);
  const Weight source = {pointer<const void>("weight", weight), float_type(type), n, k, group_size};
  const Search search = {grid.data(), static_cast<int>(grid.size()), nullptr, 0, paper_pairing, nullptr};
  uint8_t* codes_to = pointer<uint8_t>("codes", codes);
  int16_t* scale_to = pointer<int16_t>("scale", scale);
  const Isa chosen = isa_of(isa);
  py::gil_scoped_release release;
  return ovp8_quantize(chosen, source, search, codes_to, scale_to).finite;
}

void decode8(uintptr_t codes, uintptr_t scale, int64_t n, int64_t k, int group_size, uintptr_t out, int type,
             const std::string& isa) {
  check_shape(n, k, group_size);
  const uint8_t* codes_from = pointer<const uint8_t>("codes", codes);
  const int16_t* scale_from = pointer<const int16_t>("scale", scale);
  void* to = pointer<void>("out", out);
  const Float out_type = float_type(type);
  const Isa chosen = isa_of(isa);
  py::gil_scoped_release release;
  ovp8_decode(chosen, codes_from, scale_from, n, k, group_size, to, out_type);
}

void linear8(uintptr_t x, int x_type, int64_t m, int64_t n, int64_t k, int group_size, uintptr_t codes, uintptr_t scale,
             uintptr_t bias, int bias_type, uintptr_t out, const std::string& isa) {
  check_shape(n, k, group_size);
  if (m < 0) throw std::invalid_argument("m: expected at least 0, got " + std::to_string(m));
  const Linear8Arguments arguments = {pointer<const void>("x", x, m == 0),
                                      float_type(x_type),
                                      m,
                                      n,
                                      k,
                                      group_size,
                                      pointer<const uint8_t>("codes", codes),
                                      pointer<const int16_t>("scale", scale),
                                      pointer<const void>("bias", bias, true),
                                      float_type(bias_type),
                                      pointer<void>("out", out, m == 0)};
  const Isa chosen = isa_of(isa);
  py::gil_scoped_release release;
  ovp8_linear(chosen, arguments);
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < kIsaCount; ++i) {
    if (isa_supported(static_cast<Isa>(i))) names.emplace_back(isa_name(static_cast<Isa>(i)));
  }
  return names;
}

}  // namespace
}  // namespace olive

#if !defined(OLIVE_EMULATED)
#define OLIVE_CPU_MODULE _cpu
#else
#define OLIVE_CPU_MODULE emulated_cpu  // tests/avx512: beside olive._cpu in one process
#endif

PYBIND11_MODULE(OLIVE_CPU_MODULE, module) {
  module.doc() = "CPU kernels of OliVe on raw addresses; use olive.ops";
  module.def("quantize", &olive::quantize);
  module.def("encode", &olive::encode);
  module.def("decode", &olive::decode);
  module.def("compensate", &olive::compensate);
  module.def("pack", &olive::pack);
  module.def("unpack", &olive::unpack);
  module.def("linear", &olive::linear);
  module.def("linear_quantized", &olive::linear_quantized);
  module.def("quantize_activations", &olive::activation_levels);
  module.def("quantize8", &olive::quantize8);
  module.def("decode8", &olive::decode8);
  module.def("linear8", &olive::linear8);
  olive::bind_training(module);
  olive::bind_uniform(module);
  module.def("supported_isas", &olive::supported_isas);
  module.def("default_isa", [] { return std::string(olive::isa_name(olive::default_isa())); });
}
