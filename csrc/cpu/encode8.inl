// Eight-bit outlier-victim pairs: encode, search scales, decode; sixteen pairs at a time.
//
// The definition, down to the order of every sum, is olive/formats/ovp8.py and olive/ops/reference_quantized.py.
// A normal value is round(t), ties to even, within -127..127. The outlier nearest to |t| has four significant bits:
// with 2^e <= |t| < 2^(e + 1) it is a multiple of 2^(e - 3), the lower one on a tie, at least 144 and at most 2^15.
//
// Include inside a namespace of the instruction set, after encode.inl.

constexpr float kLeastOutlier = 144.0f, kMostOutlier = 32768.0f;
constexpr uint8_t kIdentifier8 = 0x80;

inline FPart clamp(FPart value, float least, float most) {
  const FPart low = splat_part(least), high = splat_part(most);
  value = select(value > low, value, low);
  return select(value < high, value, high);
}

// To the nearest integer, ties to even, for |value| <= 2^22.
inline FPart round_even(FPart value) {
  const FPart magic = splat_part(12582912.0f);
  return (value + magic) - magic;
}

inline FPart nearest_normal8(FPart t) { return round_even(clamp(t, -127.0f, 127.0f)); }

inline FPart nearest_outlier8(FPart magnitude) {
  const FPart t = clamp(magnitude, kLeastOutlier, kMostOutlier);
  // Dropping 20 bits of the pattern keeps four significant bits; half a unit less one rounds ties down.
  return as_float((as_int(t) + 0x7FFFF) & ~0xFFFFF);
}

inline IPart outlier_code8(FPart level) {  // of nearest_outlier8: exponent 0 is 2^7
  return (as_int(level) >> 20) - ((127 + 7) << 3);
}

struct Pair8 {
  FPart even, odd;          // levels, with sign; a victim is 0
  IPart even_out, odd_out;  // which of the two is an outlier
  FPart error;              // squared, in units of the scale
};

inline Pair8 encode_pair8(FPart a, FPart b, bool paper) {
  const FPart na = nearest_normal8(a), nb = nearest_normal8(b);
  const FPart da = a - na, db = b - nb;
  Pair8 pair = {na, nb, IPart{}, IPart{}, da * da + db * db};
  const FPart ma = absolute(a), mb = absolute(b);
  // Up to here an outlier costs more than the normal: |t| <= 127 is off by at most 1/2, the least outlier by 17.
  if (!any((ma > 127.5f) | (mb > 127.5f))) return pair;
  const FPart oa = nearest_outlier8(ma), ob = nearest_outlier8(mb);
  const FPart ea = ma - oa, eb = mb - ob;
  const FPart outlier_victim = ea * ea + mb * mb, victim_outlier = ma * ma + eb * eb;
  if (paper) {
    const FPart past = splat_part((127.0f + kLeastOutlier) * 0.5f);
    const IPart past_a = ma > past, past_b = mb > past;
    pair.even_out = past_a & (~past_b | (ma >= mb));
    pair.odd_out = past_b & ~pair.even_out;
  } else {
    pair.even_out = (outlier_victim < pair.error) & (outlier_victim <= victim_outlier);
    pair.odd_out = (victim_outlier < pair.error) & ~pair.even_out;
  }
  pair.even = select(pair.even_out, select(a < 0.0f, -oa, oa), select(pair.odd_out, FPart{}, na));
  pair.odd = select(pair.odd_out, select(b < 0.0f, -ob, ob), select(pair.even_out, FPart{}, nb));
  pair.error = select(pair.even_out, outlier_victim, select(pair.odd_out, victim_outlier, pair.error));
  return pair;
}

inline double error8(const Pairs& pairs, float inverse, bool paper) {
  double total = 0.0;
  for (int64_t start = 0; start < pairs.count; start += kChunk / 2) {
    const int64_t end = pairs.count < start + kChunk / 2 ? pairs.count : start + kChunk / 2;
    FPart lanes[kParts] = {};
    for (int64_t i = start, part = 0; i < end; i += kPart, part = (part + 1) % kParts) {
      lanes[part] +=
          encode_pair8(load<FPart>(pairs.even + i) * inverse, load<FPart>(pairs.odd + i) * inverse, paper).error;
    }
    total += fold(static_cast<const void*>(lanes));
  }
  return total;
}

inline float candidate8(float largest, float three_sigma, float multiple) {
  const float reach = multiple * three_sigma;
  return round_scale((largest < reach ? largest : reach) / 127.0f);
}

// The stored scale of least error for one group of so many columns; false = a value is not finite.
inline bool search_group8(const Pairs& pairs, const Search& search, int64_t columns, int16_t* best) {
  float largest, last = -1.0f;
  double energy;
  if (!statistics(pairs, &largest, &energy)) return false;
  *best = pack_scale(1.0f, false);
  if (largest < kTiny) return true;
  const float three_sigma = three_sigma_of(energy, columns);
  double least = __builtin_inf();
  for (int i = 0; i < search.pair_count; ++i) {
    const float scale = candidate8(largest, three_sigma, search.pair_grid[i]);
    if (scale == last) continue;  // the earlier one wins a tie
    last = scale;
    const double squared = static_cast<double>(scale) * static_cast<double>(scale);
    const double error = error8(pairs, 1.0f / scale, search.paper_pairing) * squared;
    if (error < least) {
      least = error;
      *best = pack_scale(scale, false);
    }
  }
  return true;
}

inline void encode_pairs8(const Pairs& pairs, int16_t stored, bool paper, int64_t count, uint8_t* codes) {
  const float inverse = 1.0f / scale_value(stored);
  for (int64_t i = 0; i < count; i += kPart) {
    const FPart a = load<FPart>(pairs.even + i) * inverse, b = load<FPart>(pairs.odd + i) * inverse;
    const Pair8 pair = encode_pair8(a, b, paper);
    const auto code = [](FPart level, IPart out, IPart partner_out) {
      const IPart outlier = outlier_code8(absolute(level)) | ((level < 0.0f) & 0x80);
      const IPart normal = __builtin_convertvector(level, IPart) & 0xFF;
      return out ? outlier : partner_out ? IPart{} + kIdentifier8 : normal;
    };
    const IPart low = code(pair.even, pair.even_out, pair.odd_out), high = code(pair.odd, pair.odd_out, pair.even_out);
    const IPart both = low | (high << 8);
    uint16_t bytes[kPart];
    for (int j = 0; j < kPart; ++j) bytes[j] = static_cast<uint16_t>(both[j]);
    const int64_t rest = count - i < kPart ? count - i : kPart;
    __builtin_memcpy(codes + 2 * i, bytes, static_cast<size_t>(2 * rest));
  }
}

bool search8_rows(const Weight& weight, const Search& search, int64_t begin, int64_t end, uint8_t* codes,
                  int16_t* scale) {
  const int64_t width = group_width(weight), groups = weight.groups();
  RowBuffer buffer(width, false);
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t first = group * width, last = first + width < weight.k ? first + width : weight.k;
      const Pairs pairs = load_pairs(weight, nullptr, row, first, last, buffer);
      int16_t& best = scale[row * groups + group];
      if (!search_group8(pairs, search, last - first, &best)) return false;
      encode_pairs8(pairs, best, search.paper_pairing, (last - first + 1) / 2,
                    codes + 2 * (row * weight.pairs() + first / 2));
    }
  }
  return true;
}

void row8_errors(const Weight& weight, bool paper_pairing, int64_t row, const float* scales, int count,
                 double* errors) {
  RowBuffer buffer(weight.k, false);
  const Pairs pairs = load_pairs(weight, nullptr, row, 0, weight.k, buffer);
  for (int i = 0; i < count; ++i) errors[i] = error8(pairs, 1.0f / scales[i], paper_pairing);
}

void encode8_rows(const Weight& weight, bool paper_pairing, const int16_t* scale, int64_t begin, int64_t end,
                  uint8_t* codes) {
  const int64_t width = group_width(weight), groups = weight.groups();
  RowBuffer buffer(width, false);
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t first = group * width, last = first + width < weight.k ? first + width : weight.k;
      const Pairs pairs = load_pairs(weight, nullptr, row, first, last, buffer);
      encode_pairs8(pairs, scale[weight.group_size == 0 ? 0 : row * groups + group], paper_pairing,
                    (last - first + 1) / 2, codes + 2 * (row * weight.pairs() + first / 2));
    }
  }
}
