// Decode canonical codes [N, ceil(K / 2)] to scale x level [N, K]. A byte is a pair and has 256 values, so a table of
// decoded pairs per rule (2 x 256 x two int16) replaces the look-ups and the select; what is left is memory.
//
// Include inside a namespace of the instruction set.

struct PairTable {
  int16_t levels[2][256][2];  // [rule][byte][even, odd]
};

inline void fill_pair_table(const Codebook& book, PairTable* table) {
  for (int rule = 0; rule < 2; ++rule) {
    for (int byte = 0; byte < 256; ++byte) {
      int16_t* pair = table->levels[rule][byte];
      decode_pair(book, static_cast<uint8_t>(byte), rule != 0, pair, pair + 1);
    }
  }
}

// Sixteen levels (eight codes) times a scale.
inline F16 decode_lanes(const uint8_t* codes, const int16_t (*table)[2], float scale) {
  int32_t pairs[8];
  for (int i = 0; i < 8; ++i) __builtin_memcpy(&pairs[i], table[codes[i]], 4);
  return __builtin_convertvector(load<S16>(pairs), F16) * scale;
}

void decode_rows(const uint8_t* codes, const int16_t* scale, const Codebook& book, int64_t k, int group_size,
                 int64_t begin, int64_t end, void* out, Float type) {
  PairTable table;
  fill_pair_table(book, &table);
  const int64_t width = group_size <= 0 ? k : group_size, groups = (k + width - 1) / width;
  const int64_t row_bytes = (k + 1) / 2;
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t group = 0; group < groups; ++group) {
      const int16_t stored = scale[group_size == 0 ? 0 : row * groups + group];
      const float value = scale_value(stored);
      const int16_t (*levels)[2] = table.levels[scale_is_plain(stored) ? 1 : 0];
      const int64_t first = group * width, last = first + width < k ? first + width : k;
      int64_t column = first;
      for (; column + kLanes <= last; column += kLanes) {
        store_floats(out, row * k + column, type, decode_lanes(codes + row * row_bytes + column / 2, levels, value));
      }
      for (; column < last; ++column) {
        const int16_t level = levels[codes[row * row_bytes + column / 2]][column & 1];
        store_float(out, row * k + column, type, static_cast<float>(level) * value);
      }
    }
  }
}
