// Encode with outlier-victim pairs and search scales: sixteen pairs at a time, compiled for each instruction set.
//
// The definition, down to the order of every sum, is olive/ops/reference.py: results equal its bits. Per pair,
// t = w * (1 / scale), error = (t - level)^2 (times importance), pair error = even + odd. A value takes the nearest
// level, the lower one on a tie, found by comparing with all thresholds: seven compare-and-blend steps in registers
// beat a table look-up, for which a value would first have to become an index.
//
// Include inside a namespace of the instruction set.

#define OLIVE_LEVEL_UNROLL _Pragma("GCC unroll 16")

constexpr int64_t kChunk = 1024;  // columns summed in float32 before the sum goes on in float64

struct Tables {
  FPart normal[8], normal_mid[7];
  FPart outlier[7], outlier_mid[6];
  FPart plain[16], plain_mid[15];
  FPart past;  // a pair can only gain from the outlier rule if one value is above this
};

inline Tables make_tables(const Codebook& book) {
  Tables tables;
  for (int i = 0; i < 8; ++i) tables.normal[i] = splat_part(book.normal[i]);
  for (int i = 0; i < 7; ++i) tables.normal_mid[i] = splat_part((book.normal[i] + book.normal[i + 1]) * 0.5f);
  for (int i = 0; i < 7; ++i) tables.outlier[i] = splat_part(book.outlier[i + 1]);
  for (int i = 0; i < 6; ++i) tables.outlier_mid[i] = splat_part((book.outlier[i + 1] + book.outlier[i + 2]) * 0.5f);
  for (int i = 0; i < 16; ++i) tables.plain[i] = splat_part(book.plain[i]);
  for (int i = 0; i < 15; ++i) tables.plain_mid[i] = splat_part((book.plain[i] + book.plain[i + 1]) * 0.5f);
  tables.past = splat_part((book.normal[7] + book.outlier[1]) * 0.5f);
  return tables;
}

template <int kCount>
inline FPart nearest(FPart t, const FPart* levels, const FPart* mids) {
  FPart level = levels[0];
  OLIVE_LEVEL_UNROLL
  for (int i = 0; i < kCount - 1; ++i) level = select(t > mids[i], levels[i + 1], level);
  return level;
}

template <int kCount>
inline IPart nearest_index(FPart t, const FPart* mids) {
  IPart index = {};
  OLIVE_LEVEL_UNROLL
  for (int i = 0; i < kCount - 1; ++i) index -= t > mids[i];  // a true lane is -1
  return index;
}

// A row's values as even and odd columns, in runs of whole lane vectors per group.
struct Pairs {
  const float* even;
  const float* odd;
  const float* even_importance;  // nullptr = all alike
  const float* odd_importance;
  int64_t count;  // a multiple of 16; missing pairs are zero
};

struct PairErrors {
  FPart normal, outlier_victim, victim_outlier;
};

template <bool kWeighted>
inline PairErrors outlier_errors(FPart a, FPart b, FPart normal, const Tables& tables, FPart ha, FPart hb) {
  const FPart oa = a - nearest<7>(a, tables.outlier, tables.outlier_mid);
  const FPart ob = b - nearest<7>(b, tables.outlier, tables.outlier_mid);
  FPart outlier_a = oa * oa, outlier_b = ob * ob, victim_a = a * a, victim_b = b * b;
  if (kWeighted) {
    outlier_a *= ha, outlier_b *= hb, victim_a *= ha, victim_b *= hb;
  }
  return {normal, outlier_a + victim_b, victim_a + outlier_b};
}

// Which value of a pair becomes an outlier under the paper's rule: the one past the normal range, the larger of two.
struct Choice {
  IPart even, odd;
};

inline Choice paper_choice(FPart a, FPart b, const Tables& tables) {
  const IPart past_a = a > tables.past, past_b = b > tables.past;
  const IPart even = past_a & (~past_b | (a >= b));
  return {even, past_b & ~even};
}

inline Choice optimal_choice(const PairErrors& error) {
  const IPart even = (error.outlier_victim < error.normal) & (error.outlier_victim <= error.victim_outlier);
  return {even, (error.victim_outlier < error.normal) & ~even};
}

template <bool kWeighted>
inline double pair_rule_error(const Pairs& pairs, const Tables& tables, float inverse, bool paper) {
  double total = 0.0;
  for (int64_t start = 0; start < pairs.count; start += kChunk / 2) {
    const int64_t end = pairs.count < start + kChunk / 2 ? pairs.count : start + kChunk / 2;
    FPart lanes[kParts] = {};
    for (int64_t i = start, part = 0; i < end; i += kPart, part = (part + 1) % kParts) {
      const FPart a = absolute(load<FPart>(pairs.even + i) * inverse);
      const FPart b = absolute(load<FPart>(pairs.odd + i) * inverse);
      FPart ha = {}, hb = {};
      const FPart da = a - nearest<8>(a, tables.normal, tables.normal_mid);
      const FPart db = b - nearest<8>(b, tables.normal, tables.normal_mid);
      FPart ea = da * da, eb = db * db;
      if (kWeighted) {
        ha = load<FPart>(pairs.even_importance + i), hb = load<FPart>(pairs.odd_importance + i);
        ea *= ha, eb *= hb;
      }
      FPart error = ea + eb;
      if (any((a > tables.past) | (b > tables.past))) {
        const PairErrors errors = outlier_errors<kWeighted>(a, b, error, tables, ha, hb);
        const Choice choice = paper ? paper_choice(a, b, tables) : optimal_choice(errors);
        error = select(choice.even, errors.outlier_victim, select(choice.odd, errors.victim_outlier, error));
      }
      lanes[part] += error;
    }
    total += fold(static_cast<const void*>(lanes));
  }
  return total;
}

template <bool kWeighted>
inline double plain_error(const Pairs& pairs, const Tables& tables, float inverse) {
  double total = 0.0;
  for (int64_t start = 0; start < pairs.count; start += kChunk / 2) {
    const int64_t end = pairs.count < start + kChunk / 2 ? pairs.count : start + kChunk / 2;
    FPart lanes[kParts] = {};
    for (int64_t i = start, part = 0; i < end; i += kPart, part = (part + 1) % kParts) {
      const FPart a = load<FPart>(pairs.even + i) * inverse, b = load<FPart>(pairs.odd + i) * inverse;
      const FPart da = a - nearest<16>(a, tables.plain, tables.plain_mid);
      const FPart db = b - nearest<16>(b, tables.plain, tables.plain_mid);
      FPart ea = da * da, eb = db * db;
      if (kWeighted) {
        ea *= load<FPart>(pairs.even_importance + i), eb *= load<FPart>(pairs.odd_importance + i);
      }
      lanes[part] += ea + eb;
    }
    total += fold(static_cast<const void*>(lanes));
  }
  return total;
}

// Calls tell(candidate, scale, plain, error) for every candidate in the definition's order. The error is in squared
// units of the scale. Neighbouring multiples that round to one stored scale are tried once.
template <bool kWeighted, class Tell>
inline void for_each_candidate(const Pairs& pairs, const Tables& tables, const Search& search, bool has_plain,
                               float pair_base, float plain_base, Tell tell) {
  int candidate = 0;
  float last = -1.0f;  // no scale
  double error = 0.0;
  for (int i = 0; i < search.pair_count; ++i, ++candidate) {
    const float scale = round_scale(pair_base * search.pair_grid[i]);
    if (scale != last) {
      error = pair_rule_error<kWeighted>(pairs, tables, 1.0f / scale, search.paper_pairing);
    }
    last = scale;
    tell(candidate, scale, false, error);
  }
  if (!has_plain) return;
  last = -1.0f;
  double mirrored = 0.0;
  for (int i = 0; i < search.plain_count; ++i) {
    const float scale = round_scale(plain_base * search.plain_grid[i]);
    if (scale != last) {
      error = plain_error<kWeighted>(pairs, tables, 1.0f / scale);
      mirrored = plain_error<kWeighted>(pairs, tables, 1.0f / -scale);
    }
    last = scale;
    tell(candidate++, scale, true, error);
    tell(candidate++, -scale, true, mirrored);
  }
}

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Row buffers: values as read, then even and odd columns; importance likewise.
struct RowBuffer {
  float* values;
  float* even;
  float* odd;
  float* importance;
  float* even_importance;
  float* odd_importance;
  explicit RowBuffer(int64_t columns, bool weighted) {
    const int64_t size = round_up(columns, 2 * kLanes);
    storage = static_cast<float*>(__builtin_malloc(sizeof(float) * static_cast<size_t>(size) * (weighted ? 4 : 2)));
    values = storage;
    even = values + size;
    odd = even + size / 2;
    importance = weighted ? odd + size / 2 : nullptr;
    even_importance = weighted ? importance + size : nullptr;
    odd_importance = weighted ? even_importance + size / 2 : nullptr;
  }
  ~RowBuffer() { __builtin_free(storage); }
  RowBuffer(const RowBuffer&) = delete;
  RowBuffer& operator=(const RowBuffer&) = delete;

 private:
  float* storage;
};

inline void split_columns(const float* values, int64_t padded, float* even, float* odd) {
  for (int64_t j = 0; j < padded / 2; ++j) {
    even[j] = values[2 * j];
    odd[j] = values[2 * j + 1];
  }
}

// Load columns [begin, end) of a row; the result is padded with zeros to whole lane vectors.
inline Pairs load_pairs(const Weight& weight, const float* importance, int64_t row, int64_t begin, int64_t end,
                        RowBuffer& buffer) {
  const int64_t padded = round_up(end - begin, 2 * kLanes);
  load_row(weight.data, row * weight.k + begin, weight.type, end - begin, padded, buffer.values);
  split_columns(buffer.values, padded, buffer.even, buffer.odd);
  if (importance != nullptr) {
    load_row(importance, begin, Float::f32, end - begin, padded, buffer.importance);
    split_columns(buffer.importance, padded, buffer.even_importance, buffer.odd_importance);
  }
  return {buffer.even, buffer.odd, buffer.even_importance, buffer.odd_importance, padded / 2};
}

// Largest magnitude and ordered sum of squares; false = a value is not finite.
inline bool statistics(const Pairs& pairs, float* largest, double* energy) {
  FPart most[kParts] = {};
  double total = 0.0;
  IPart bad = {};
  for (int64_t start = 0; start < pairs.count; start += kChunk / 2) {
    const int64_t end = pairs.count < start + kChunk / 2 ? pairs.count : start + kChunk / 2;
    FPart lanes[kParts] = {};
    for (int64_t i = start, part = 0; i < end; i += kPart, part = (part + 1) % kParts) {
      const FPart a = load<FPart>(pairs.even + i), b = load<FPart>(pairs.odd + i);
      lanes[part] += a * a + b * b;
      const FPart ma = absolute(a), mb = absolute(b);
      bad |= (as_int(ma) >= 0x7F800000) | (as_int(mb) >= 0x7F800000);
      most[part] = select(ma > most[part], ma, most[part]);
      most[part] = select(mb > most[part], mb, most[part]);
    }
    total += fold(static_cast<const void*>(lanes));
  }
  *largest = reduce_max(most);
  *energy = total;
  return !any(bad);
}

// The low byte of every lane.
typedef int8_t BPart __attribute__((vector_size(kPart)));
inline BPart narrow(IPart value) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i bytes = _mm256_shuffle_epi8(
      reinterpret_cast<__m256i>(value), _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0,
                                                         4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1));
  const int32_t halves[2] = {_mm256_extract_epi32(bytes, 0), _mm256_extract_epi32(bytes, 4)};
  BPart result;
  __builtin_memcpy(&result, halves, sizeof(result));
  return result;
#else
  return __builtin_convertvector(value, BPart);
#endif
}

inline void encode_pairs(const Pairs& pairs, const Tables& tables, int16_t stored, bool paper, int64_t count,
                         uint8_t* codes) {
  const float inverse = 1.0f / scale_value(stored);
  const bool plain = scale_is_plain(stored);
  for (int64_t i = 0; i < count; i += kPart) {
    const FPart ta = load<FPart>(pairs.even + i) * inverse, tb = load<FPart>(pairs.odd + i) * inverse;
    IPart low, high;
    if (plain) {
      low = nearest_index<16>(ta, tables.plain_mid);
      high = nearest_index<16>(tb, tables.plain_mid);
    } else {
      const FPart a = absolute(ta), b = absolute(tb);
      const IPart sign_a = (ta < 0.0f) & 8, sign_b = (tb < 0.0f) & 8;
      const IPart na = nearest_index<8>(a, tables.normal_mid), nb = nearest_index<8>(b, tables.normal_mid);
      low = na | (sign_a & (na != 0));
      high = nb | (sign_b & (nb != 0));
      if (any((a > tables.past) | (b > tables.past))) {
        Choice choice;
        if (paper) {
          choice = paper_choice(a, b, tables);
        } else {
          const FPart da = a - nearest<8>(a, tables.normal, tables.normal_mid);
          const FPart db = b - nearest<8>(b, tables.normal, tables.normal_mid);
          if (pairs.even_importance != nullptr) {
            const FPart ha = load<FPart>(pairs.even_importance + i), hb = load<FPart>(pairs.odd_importance + i);
            choice = optimal_choice(outlier_errors<true>(a, b, da * da * ha + db * db * hb, tables, ha, hb));
          } else {
            choice = optimal_choice(outlier_errors<false>(a, b, da * da + db * db, tables, FPart{}, FPart{}));
          }
        }
        const IPart oa = (nearest_index<7>(a, tables.outlier_mid) + 1) | sign_a;
        const IPart ob = (nearest_index<7>(b, tables.outlier_mid) + 1) | sign_b;
        const IPart victim = IPart{} + kIdentifier;
        low = choice.even ? oa : choice.odd ? victim : low;
        high = choice.odd ? ob : choice.even ? victim : high;
      }
    }
    const auto bytes = narrow(low | (high << 4));
    __builtin_memcpy(codes + i, &bytes, static_cast<size_t>(count - i < kPart ? count - i : kPart));
  }
}

inline int64_t group_width(const Weight& weight) { return weight.group_size <= 0 ? weight.k : weight.group_size; }

inline float three_sigma_of(double energy, int64_t columns) {
  return static_cast<float>(3.0 * __builtin_sqrt(energy / static_cast<double>(columns)));
}

// The stored scale of least error for one group of so many columns; false = a value is not finite.
inline bool search_group(const Pairs& pairs, const Tables& tables, const Codebook& book, const Search& search,
                         int64_t columns, int16_t* best) {
  float largest;
  double energy;
  if (!statistics(pairs, &largest, &energy)) return false;
  *best = pack_scale(1.0f, false);
  if (largest < kTiny) return true;
  const float three_sigma = three_sigma_of(energy, columns);
  const float pair_base = (largest < three_sigma ? largest : three_sigma) / book.normal[7];
  const float plain_base = largest / (book.plain[15] > 1 ? book.plain[15] : 1);
  double least = __builtin_inf();
  const auto keep = [&](int, float value, bool plain, double error) {
    const double absolute_error = error * (static_cast<double>(value) * static_cast<double>(value));
    if (absolute_error < least) {
      least = absolute_error;
      *best = pack_scale(value, plain);
    }
  };
  if (search.importance != nullptr) {
    for_each_candidate<true>(pairs, tables, search, book.has_plain, pair_base, plain_base, keep);
  } else {
    for_each_candidate<false>(pairs, tables, search, book.has_plain, pair_base, plain_base, keep);
  }
  return true;
}

bool search_rows(const Weight& weight, const Codebook& book, const Search& search, int64_t begin, int64_t end,
                 uint8_t* codes, int16_t* scale) {
  const Tables tables = make_tables(book);
  const int64_t width = group_width(weight), groups = weight.groups();
  RowBuffer buffer(width, search.importance != nullptr);
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t first = group * width, last = first + width < weight.k ? first + width : weight.k;
      const Pairs pairs = load_pairs(weight, search.importance, row, first, last, buffer);
      int16_t best;
      if (!search_group(pairs, tables, book, search, last - first, &best)) return false;
      scale[row * groups + group] = best;
      encode_pairs(pairs, tables, best, search.paper_pairing, (last - first + 1) / 2,
                   codes + row * weight.pairs() + first / 2);
    }
  }
  return true;
}

bool row_statistics(const Weight& weight, int64_t row, float* largest, double* energy) {
  RowBuffer buffer(weight.k, false);
  return statistics(load_pairs(weight, nullptr, row, 0, weight.k, buffer), largest, energy);
}

void row_errors(const Weight& weight, const Codebook& book, const Search& search, int64_t row, float pair_base,
                float plain_base, double* errors) {
  const Tables tables = make_tables(book);
  RowBuffer buffer(weight.k, search.importance != nullptr);
  const Pairs pairs = load_pairs(weight, search.importance, row, 0, weight.k, buffer);
  const auto keep = [&](int candidate, float, bool, double error) { errors[candidate] = error; };
  if (search.importance != nullptr) {
    for_each_candidate<true>(pairs, tables, search, book.has_plain, pair_base, plain_base, keep);
  } else {
    for_each_candidate<false>(pairs, tables, search, book.has_plain, pair_base, plain_base, keep);
  }
}

void encode_rows(const Weight& weight, const Codebook& book, bool paper_pairing, const float* importance,
                 const int16_t* scale, int64_t begin, int64_t end, uint8_t* codes) {
  const Tables tables = make_tables(book);
  const int64_t width = group_width(weight), groups = weight.groups();
  RowBuffer buffer(width, importance != nullptr);
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t first = group * width, last = first + width < weight.k ? first + width : weight.k;
      const Pairs pairs = load_pairs(weight, importance, row, first, last, buffer);
      const int64_t index = weight.group_size == 0 ? 0 : row * groups + group;
      encode_pairs(pairs, tables, scale[index], paper_pairing, (last - first + 1) / 2,
                   codes + row * weight.pairs() + first / 2);
    }
  }
}
