// Python module olive._cpu: checks what memory safety needs, then calls. Addresses are tensor.data_ptr().
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bindings/arguments.h"
#include "cpu/api.h"

namespace py = pybind11;

namespace olive {
namespace {

Isa isa_of(const std::string& name) { return name.empty() ? default_isa() : isa_from_name(name); }

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

void linear(uintptr_t x, int x_type, int64_t m, int64_t n, int64_t k, int group_size, uintptr_t codes, uintptr_t scale,
            uintptr_t codebook, uintptr_t bias, int bias_type, uintptr_t out, const std::string& isa) {
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
  const Isa chosen = isa_of(isa);
  py::gil_scoped_release release;
  ovp_linear(chosen, arguments);
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

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "CPU kernels of OliVe on raw addresses; use olive.ops";
  module.def("quantize", &olive::quantize);
  module.def("encode", &olive::encode);
  module.def("decode", &olive::decode);
  module.def("pack", &olive::pack);
  module.def("unpack", &olive::unpack);
  module.def("linear", &olive::linear);
  module.def("supported_isas", &olive::supported_isas);
  module.def("default_isa", [] { return std::string(olive::isa_name(olive::default_isa())); });
}
