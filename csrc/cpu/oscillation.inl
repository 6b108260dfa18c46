// Codes of a weight in training, how often each goes back where it came from, and which weights are near a threshold:
// one pass, with the bits of olive/ops/oscillation.py.
//
// Include inside a namespace of the instruction set, after training_lanes.inl.

template <Float kType>
inline void oscillation_group(const Oscillation q, int64_t at, int64_t count, float step) {
  const bool no_step = step == 0.0f;
  for_lanes(
      count, OLIVE_LANES(i, some) {
        FPart x[kParts], frequency[kParts];
        IPart codes[kParts], direction[kParts], near[kParts];
        load_lanes(q.weight.data, at + i, kType, some, x);
        load_lanes(q.frequency, at + i, Float::f32, some, frequency);
        load_bytes(q.codes + at + i, some, codes);
        load_bytes(q.direction + at + i, some, direction);
        repeat<kParts>(OLIVE_EACH(p) {
          const FPart zero = x[p] == x[p] ? FPart{} : x[p];
          const FPart position = (no_step ? zero : x[p] / step) + q.offset;
          const IPart code = code_part(position, q.qmin, q.qmax);
          const IPart sign = (code < codes[p]) - (code > codes[p]);  // true is -1
          const IPart oscillated = (sign != 0) & (sign == -direction[p]);
          frequency[p] = (oscillated ? splat_part(q.momentum) : FPart{}) + frequency[p] * q.keep;
          direction[p] = sign != 0 ? sign : direction[p];
          codes[p] = code;
          near[p] = (threshold_distance_part(position, q.qmin, q.qmax) <= q.boundary) & 1;
        });
        store_lanes(q.frequency, at + i, Float::f32, some, frequency);
        store_bytes(q.codes + at + i, some, codes);
        store_bytes(q.direction + at + i, some, direction);
        store_bytes(reinterpret_cast<int8_t*>(q.near) + at + i, some, near);
      });
}

void oscillation_rows(const Oscillation& q, int64_t begin, int64_t end) {
  const RowGroups& weight = q.weight;
  with_type(weight.type, [&](auto type) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t first = 0, group = row * weight.groups(); first < weight.k; first += weight.width, ++group) {
        const int64_t count = first + weight.width < weight.k ? weight.width : weight.k - first;
        const float step = q.step[q.one_step ? 0 : group];
        oscillation_group<decltype(type)::value>(q, row * weight.k + first, count, step);
      }
    }
  });
}
