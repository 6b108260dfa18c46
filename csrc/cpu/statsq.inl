// StatsQ: a group's scale from the sum of its magnitudes, then levels, codes or margins. Twice over each row: the first
// pass brings it into the cache. With the bits of olive/ops/statsq.py, but for the order of sums in double.
//
// Include inside a namespace of the instruction set, after training_lanes.inl.

template <Float kType>
inline float statsq_scale(const void* weight, int64_t at, int64_t count) {
  DHalf sums[kHalves] = {};
  for_lanes(
      count, OLIVE_LANES(i, some) {
        FPart x[kParts];
        load_lanes(weight, at + i, kType, some, x);
        repeat<kParts>(OLIVE_EACH(p) { add_part(sums + 2 * p, absolute(x[p])); });
      });
  return 2.0f * static_cast<float>(fold_sums(sums)) / static_cast<float>(count);
}

// What is made of a group: one of its parts of 16 values each.
template <Float kType, class Make>
__attribute__((always_inline)) inline void statsq_group(const StatsQ& q, int64_t at, int64_t count, float scale,
                                                        Make&& make) {
  const float half = static_cast<float>(q.half), divisor = scale > 0.0f ? scale : 1.0f;
  for_lanes(
      count, OLIVE_LANES(i, some) {
        FPart x[kParts];
        load_lanes(q.weight.data, at + i, kType, some, x);
        repeat<kParts>(OLIVE_EACH(p) { x[p] = x[p] * half / divisor; });
        make(at + i, some, x);
      });
}

template <Float kType>
inline void statsq_rows_of(const StatsQ q, int64_t begin, int64_t end) {
  const RowGroups& weight = q.weight;
  const float qmin = static_cast<float>(-q.half), qmax = static_cast<float>(q.half - 1);
  const float inverse = 1.0f / static_cast<float>(q.half);  // a power of two: exact
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t first = 0, group = row * weight.groups(); first < weight.k; first += weight.width, ++group) {
      const int64_t count = first + weight.width < weight.k ? weight.width : weight.k - first;
      const int64_t at = row * weight.k + first;
      const float scale = statsq_scale<kType>(weight.data, at, count);
      if (q.scale != nullptr) q.scale[group] = scale;
      if (q.levels != nullptr) {
        statsq_group<kType>(q, at, count, scale, [&](int64_t to, int some, FPart* x) __attribute__((always_inline)) {
          repeat<kParts>(OLIVE_EACH(p) {
            const FPart code = __builtin_convertvector(code_part(x[p], qmin, qmax), FPart);
            x[p] = (code + 0.5f) * inverse * scale;
          });
          store_lanes(q.levels, to, kType, some, x);
        });
      }
      if (q.codes != nullptr) {
        statsq_group<kType>(q, at, count, scale, [&](int64_t to, int some, FPart* x) __attribute__((always_inline)) {
          IPart codes[kParts];
          repeat<kParts>(OLIVE_EACH(p) { codes[p] = code_part(x[p], qmin, qmax); });
          store_bytes(q.codes + to, some, codes);
        });
      }
      if (q.margin != nullptr) {
        statsq_group<kType>(q, at, count, scale, [&](int64_t to, int some, FPart* x) __attribute__((always_inline)) {
          repeat<kParts>(OLIVE_EACH(p) { x[p] = threshold_distance_part(x[p], qmin, qmax); });
          store_lanes(q.margin, to, Float::f32, some, x);
        });
      }
    }
  }
}

void statsq_rows(const StatsQ& q, int64_t begin, int64_t end) {
  with_type(q.weight.type, [&](auto type) { statsq_rows_of<decltype(type)::value>(q, begin, end); });
}
