// Activations to levels: one pass over a group in cache finds its scale and its levels.
//
// The definition is olive/ops/reference_quantized.py, to the last bit.
//
// Include inside a namespace of the instruction set, after encode.inl, encode8.inl, decode.inl, activations.inl.

struct ActivationTables {
  Tables search;
  PairTable pairs;
};

inline void fill_activation_tables(const ActivationFormat& format, ActivationTables* tables) {
  if (format.levels != Levels::ovp4) return;
  tables->search = make_tables(format.book);
  fill_pair_table(format.book, &tables->pairs);
}

// A group's values and its levels, float32; room for whole lane vectors of pairs.
struct LevelBuffer {
  RowBuffer row;
  float* levels;
  uint8_t* codes;
  explicit LevelBuffer(int64_t columns) : row(columns, false) {
    const auto size = static_cast<size_t>(round_up(columns, 2 * kLanes));
    levels = static_cast<float*>(__builtin_malloc(size * sizeof(float) + size / 2));
    codes = reinterpret_cast<uint8_t*>(levels + size);
  }
  ~LevelBuffer() { __builtin_free(levels); }
  LevelBuffer(const LevelBuffer&) = delete;
  LevelBuffer& operator=(const LevelBuffer&) = delete;
};

inline bool all_finite(const float* values, int64_t count) {
  IPart bad = {};
  for (int64_t i = 0; i < count; i += kPart) bad |= as_int(absolute(load<FPart>(values + i))) >= 0x7F800000;
  return !any(bad);
}

inline float int8_levels(const float* values, int64_t padded, const int16_t* static_scale, float* levels) {
  float scale;
  if (static_scale != nullptr) {
    scale = scale_value(*static_scale);
  } else {
    FPart most[kParts] = {};
    for (int64_t i = 0, part = 0; i < padded; i += kPart, part = (part + 1) % kParts) {
      const FPart magnitude = absolute(load<FPart>(values + i));
      most[part] = select(magnitude > most[part], magnitude, most[part]);
    }
    const float largest = reduce_max(most);
    scale = largest < kTiny ? 1.0f : largest / 127.0f;
  }
  const float inverse = 1.0f / scale;
  for (int64_t i = 0; i < padded; i += kPart) {
    store(levels + i, nearest_normal8(load<FPart>(values + i) * inverse));
  }
  return scale;
}

// Levels of columns [begin, end) of a row, zeros up to whole lane vectors. Returns the scale: NaN, and levels 0, where
// a value is not finite.
inline float group_levels(const ActivationSource& source, const ActivationTables& tables, int64_t row, int64_t begin,
                          int64_t end, LevelBuffer& buffer) {
  const ActivationFormat& format = source.format;
  const int64_t padded = round_up(end - begin, 2 * kLanes), pairs_end = (end - begin + 1) / 2;
  load_row(source.data, row * source.k + begin, source.type, end - begin, padded, buffer.row.values);
  float* levels = buffer.levels;
  if (!all_finite(buffer.row.values, padded)) {
    __builtin_memset(levels, 0, sizeof(float) * static_cast<size_t>(padded));
    return __builtin_nanf("");
  }
  if (format.levels == Levels::int8) return int8_levels(buffer.row.values, padded, format.static_scale, levels);
  split_columns(buffer.row.values, padded, buffer.row.even, buffer.row.odd);
  const Pairs pairs = {buffer.row.even, buffer.row.odd, nullptr, nullptr, padded / 2};
  int16_t stored = format.static_scale != nullptr ? *format.static_scale : int16_t{0};
  if (format.levels == Levels::ovp4) {
    if (format.static_scale == nullptr) {
      search_group(pairs, tables.search, format.book, format.search, end - begin, &stored);
    }
    encode_pairs(pairs, tables.search, stored, format.search.paper_pairing, pairs_end, buffer.codes);
    const int16_t (*table)[2] = tables.pairs.levels[scale_is_plain(stored) ? 1 : 0];
    for (int64_t j = 0; j < pairs_end; ++j) {
      levels[2 * j] = table[buffer.codes[j]][0];
      levels[2 * j + 1] = table[buffer.codes[j]][1];
    }
    for (int64_t i = end - begin; i < padded; ++i) levels[i] = 0.0f;
  } else {
    if (format.static_scale == nullptr) search_group8(pairs, format.search, end - begin, &stored);
    const float inverse = 1.0f / scale_value(stored);
    for (int64_t i = 0; i < padded / 2; i += kPart) {
      const FPart a = load<FPart>(pairs.even + i) * inverse, b = load<FPart>(pairs.odd + i) * inverse;
      const Pair8 pair = encode_pair8(a, b, format.search.paper_pairing);
      for (int j = 0; j < kPart; ++j) {
        levels[2 * (i + j)] = pair.even[j];
        levels[2 * (i + j) + 1] = pair.odd[j];
      }
    }
  }
  return scale_value(stored);
}

void quantize_rows(const Activations& to, const ActivationSource& source, int64_t begin, int64_t end) {
  ActivationTables tables;
  fill_activation_tables(source.format, &tables);
  const int64_t width = source.width();
  LevelBuffer buffer(width);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t groups = row < source.rows ? source.groups() : 0;
    int64_t block = 0;
    if (to.row_scale != nullptr) to.row_scale[row] = 0.0f;
    const auto store_block = [&](const float* levels, int64_t count, float scale) {  // levels past count are zeros
      I16 sum = {};
      const int64_t at = to.at(row, block), index = to.index(row, block);
      for (int i = 0; i < to.block; i += kLanes) {
        I16 level = {};
        if (i < count) level = even_first(__builtin_convertvector(load<F16>(levels + i), I16));
        sum += level;
        if (to.words != nullptr) {
          store(to.words + at + i, __builtin_convertvector(level, S16));
        } else {
          store(to.low + at + i, __builtin_convertvector(level, B16));
        }
      }
      to.scale[index] = to.row_scale != nullptr ? 1.0f : scale;
      if (to.offset != nullptr) {
        int32_t all = 0;
        for (int i = 0; i < kLanes; ++i) all += sum[i];
        to.offset[index] = -kOffset * all;
      }
      ++block;
    };
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t first = group * width, last = first + width < source.k ? first + width : source.k;
      const float scale = group_levels(source, tables, row, first, last, buffer);
      if (to.row_scale != nullptr) to.row_scale[row] = scale;
      const int64_t levels_end = round_up(last - first, 2 * kLanes);
      for (int64_t start = 0; start < last - first; start += to.block) {
        store_block(buffer.levels + start, levels_end - start, scale);
      }
    }
    while (block < to.blocks()) store_block(nullptr, 0, 0.0f);
  }
}

void level_rows(const LevelTarget& to, const ActivationSource& source, int64_t begin, int64_t end) {
  ActivationTables tables;
  fill_activation_tables(source.format, &tables);
  const int64_t width = source.width(), groups = source.groups();
  LevelBuffer buffer(width);
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t first = group * width, last = first + width < source.k ? first + width : source.k;
      to.scale[row * groups + group] = group_levels(source, tables, row, first, last, buffer);
      const int64_t at = row * source.k + first, count = last - first;
      int64_t i = 0;
      for (; i + kLanes <= count; i += kLanes) {
        const F16 level = load<F16>(buffer.levels + i);
        if (to.type == kInt8) {
          const B16 bytes = __builtin_convertvector(__builtin_convertvector(level, I16), B16);
          store(static_cast<int8_t*>(to.levels) + at + i, bytes);
        } else {
          store_floats(to.levels, at + i, static_cast<Float>(to.type), level);
        }
      }
      for (; i < count; ++i) {
        if (to.type == kInt8) {
          static_cast<int8_t*>(to.levels)[at + i] = static_cast<int8_t>(buffer.levels[i]);
        } else {
          store_float(to.levels, at + i, static_cast<Float>(to.type), buffer.levels[i]);
        }
      }
    }
  }
}
