// Intrinsics one by one behind plain C functions, for a library loaded by ctypes: built on the emulator, and for the
// processor's own instructions where it has them. test_intrinsics.py says what each must give.
//
// In namespace olive, as all kernels are: that is where the emulator's names are found.
#include <immintrin.h>

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define OLIVE_EXPORT extern "C" __attribute__((visibility("default")))

namespace olive {
namespace {

struct Inputs {
  std::uint8_t a[64], b[64], c[64];
  std::uint64_t mask;
};
static_assert(sizeof(Inputs) == 200, "as test_intrinsics.py packs them");

// A result of any type, zeros after it.
struct Output {
  std::uint8_t bytes[64];
  template <class T>
  Output(T value) : bytes() {
    static_assert(sizeof(T) <= 64, "at most a vector");
    std::memcpy(bytes, &value, sizeof(T));
  }
};

struct Entry {
  const char* name;
  Output (*run)(const Inputs&);
};

#define CASE(name, expression)                                                                               \
  {#name, [](const Inputs& in) -> Output {                                                                   \
     const __m512i a = _mm512_loadu_si512(in.a), b = _mm512_loadu_si512(in.b), c = _mm512_loadu_si512(in.c); \
     const __m512 x = _mm512_castsi512_ps(a), y = _mm512_castsi512_ps(b), z = _mm512_castsi512_ps(c);        \
     const std::uint64_t k = in.mask;                                                                        \
     return expression;                                                                                      \
   }},
#define ONE(name) CASE(name, _mm512_##name(a))
#define TWO(name) CASE(name, _mm512_##name(a, b))
#define THREE(name) CASE(name, _mm512_##name(a, b, c))
#define NUMBER(name, n) CASE(name##_##n, _mm512_##name(a, n))
#define MASKED(name) CASE(mask_##name, _mm512_mask_##name(c, k, a, b)) CASE(maskz_##name, _mm512_maskz_##name(k, a, b))
#define FLOAT_ONE(name) CASE(name, _mm512_##name(x))
#define FLOAT_TWO(name) CASE(name, _mm512_##name(x, y))
#define NARROW_IN(name) CASE(name, _mm512_##name(_mm512_castsi512_si128(a)))
#define HALF_IN(name) CASE(name, _mm512_##name(_mm512_castsi512_si256(a)))
#define COMPARES(suffix)     \
  TWO(cmpeq_##suffix##_mask) \
  TWO(cmplt_##suffix##_mask) \
  TWO(cmple_##suffix##_mask) TWO(cmpneq_##suffix##_mask) TWO(cmpge_##suffix##_mask) TWO(cmpgt_##suffix##_mask)

// What memory that holds c holds after store(memory).
template <class F>
Output stored_over(const Inputs& in, F store) {
  Output memory(_mm512_loadu_si512(in.c));
  store(memory.bytes);
  return memory;
}

// clang-format off
const Entry kEntries[] = {
    // memory
    CASE(maskz_loadu_epi8, _mm512_maskz_loadu_epi8(k, in.a))
    CASE(mask_loadu_epi16, _mm512_mask_loadu_epi16(c, k, in.a))
    CASE(maskz_loadu_epi32, _mm512_maskz_loadu_epi32(k, in.a))
    CASE(mask_storeu_epi8, stored_over(in, [&](void* to) { _mm512_mask_storeu_epi8(to, k, a); }))
    CASE(mask_storeu_epi32, stored_over(in, [&](void* to) { _mm512_mask_storeu_epi32(to, k, a); }))
    CASE(mask_storeu_epi8_128, stored_over(in, [&](void* to) {
      _mm_mask_storeu_epi8(to, k, _mm512_castsi512_si128(a)); }))
    CASE(set1_epi8, _mm512_set1_epi8(in.a[0]))
    CASE(set_epi32, _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0))
    CASE(setr_epi32, _mm512_setr_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0))
    CASE(mask_set1_epi16, _mm512_mask_set1_epi16(c, k, 7))
    // integers
    TWO(add_epi8) TWO(add_epi16) TWO(add_epi32) TWO(add_epi64) TWO(sub_epi8) TWO(sub_epi16) TWO(sub_epi32)
    TWO(adds_epi8) TWO(adds_epi16) TWO(adds_epu8) TWO(adds_epu16) TWO(subs_epi8) TWO(subs_epi16) TWO(subs_epu8)
    TWO(subs_epu16) TWO(avg_epu8) TWO(min_epi8) TWO(max_epi8) TWO(min_epu8) TWO(max_epu8) TWO(min_epi16)
    TWO(max_epi16) TWO(min_epi32) TWO(max_epi32) TWO(min_epu32) TWO(max_epu32) ONE(abs_epi8) ONE(abs_epi16)
    ONE(abs_epi32) TWO(mullo_epi16) TWO(mullo_epi32) TWO(mullo_epi64) TWO(mulhi_epi16) TWO(mulhi_epu16)
    TWO(mulhrs_epi16) TWO(mul_epi32) TWO(mul_epu32) TWO(madd_epi16) TWO(maddubs_epi16) TWO(sad_epu8)
    MASKED(add_epi8) MASKED(sub_epi16) MASKED(mullo_epi32) MASKED(madd_epi16)
    NUMBER(slli_epi16, 4) NUMBER(slli_epi32, 31) NUMBER(srli_epi16, 4) NUMBER(srli_epi32, 32) NUMBER(srai_epi16, 16)
    NUMBER(srai_epi32, 7) NUMBER(srai_epi64, 40) NUMBER(slli_epi64, 33) NUMBER(srli_epi64, 9)
    CASE(mask_slli_epi16, _mm512_mask_slli_epi16(c, k, a, 3))
    TWO(sllv_epi16) TWO(srlv_epi16) TWO(srav_epi16) TWO(sllv_epi32) TWO(srav_epi32)
    TWO(and_si512) TWO(or_si512) TWO(xor_si512) TWO(andnot_si512) MASKED(and_epi32)
    CASE(ternarylogic_epi32_select, _mm512_ternarylogic_epi32(a, b, c, 0xCA))
    CASE(ternarylogic_epi32_xor, _mm512_ternarylogic_epi32(a, b, c, 0x96))
    ONE(reduce_add_epi32) ONE(reduce_max_epi32)
    // masks
    COMPARES(epi8) COMPARES(epu8) COMPARES(epi16) COMPARES(epu16) COMPARES(epi32) COMPARES(epu32)
    CASE(mask_cmpeq_epi8_mask, _mm512_mask_cmpeq_epi8_mask(k, a, b))
    CASE(mask_cmp_epi16_mask, _mm512_mask_cmp_epi16_mask(k, a, b, _MM_CMPINT_LE))
    TWO(test_epi8_mask) TWO(testn_epi16_mask) TWO(test_epi32_mask)
    ONE(movepi8_mask) ONE(movepi16_mask) ONE(movepi32_mask)
    CASE(movm_epi8, _mm512_movm_epi8(k)) CASE(movm_epi16, _mm512_movm_epi16(k)) CASE(movm_epi32, _mm512_movm_epi32(k))
    CASE(mask_blend_epi8, _mm512_mask_blend_epi8(k, a, b)) CASE(mask_blend_epi32, _mm512_mask_blend_epi32(k, a, b))
    CASE(mask_mov_epi16, _mm512_mask_mov_epi16(a, k, b)) CASE(maskz_mov_epi8, _mm512_maskz_mov_epi8(k, a))
    CASE(mask_blend_ps, _mm512_mask_blend_ps(k, x, y))
    CASE(kandn, _kandn_mask16(k, k >> 16)) CASE(kandn_mask64, _kandn_mask64(k, k << 1))
    CASE(knot_mask32, _knot_mask32(k))
    // shuffles
    TWO(shuffle_epi8) MASKED(shuffle_epi8)
    TWO(unpacklo_epi8) TWO(unpackhi_epi8) TWO(unpacklo_epi16) TWO(unpackhi_epi16) TWO(unpacklo_epi32)
    TWO(unpackhi_epi32) TWO(unpacklo_epi64) TWO(unpackhi_epi64)
    TWO(packs_epi16) TWO(packus_epi16) TWO(packs_epi32) TWO(packus_epi32)
    CASE(alignr_epi8_5, _mm512_alignr_epi8(a, b, 5)) CASE(alignr_epi8_20, _mm512_alignr_epi8(a, b, 20))
    CASE(alignr_epi32_3, _mm512_alignr_epi32(a, b, 3)) CASE(alignr_epi64_7, _mm512_alignr_epi64(a, b, 7))
    NUMBER(bslli_epi128, 3) NUMBER(bsrli_epi128, 3)
    CASE(shuffle_epi32, _mm512_shuffle_epi32(a, static_cast<_MM_PERM_ENUM>(0x39)))
    NUMBER(permutex_epi64, 0x1B)
    CASE(shuffle_i32x4, _mm512_shuffle_i32x4(a, b, 0x4E))
    TWO(permutexvar_epi16) TWO(permutexvar_epi32) TWO(permutexvar_epi64) CASE(permutexvar_ps, _mm512_permutexvar_ps(a, y))
    CASE(mask_permutexvar_epi32, _mm512_mask_permutexvar_epi32(c, k, a, b))
    THREE(permutex2var_epi16) THREE(permutex2var_epi32) THREE(permutex2var_epi64)
    CASE(mask_permutex2var_epi32, _mm512_mask_permutex2var_epi32(a, k, b, c))
    CASE(extracti64x4_epi64, _mm512_extracti64x4_epi64(a, 1)) CASE(extracti32x4_epi32, _mm512_extracti32x4_epi32(a, 2))
    CASE(inserti64x4, _mm512_inserti64x4(a, _mm512_castsi512_si256(b), 1))
    CASE(inserti32x4, _mm512_inserti32x4(a, _mm512_castsi512_si128(b), 3))
    NARROW_IN(broadcast_i32x4) HALF_IN(broadcast_i64x4) NARROW_IN(broadcastb_epi8) NARROW_IN(broadcastw_epi16)
    NARROW_IN(broadcastd_epi32) NARROW_IN(broadcastq_epi64) NARROW_IN(zextsi128_si512)
    // conversions
    HALF_IN(cvtepi8_epi16) NARROW_IN(cvtepi8_epi32) HALF_IN(cvtepi16_epi32) HALF_IN(cvtepi32_epi64)
    HALF_IN(cvtepu8_epi16) NARROW_IN(cvtepu8_epi32) HALF_IN(cvtepu16_epi32)
    ONE(cvtepi16_epi8) ONE(cvtsepi16_epi8) ONE(cvtusepi16_epi8) ONE(cvtepi32_epi8) ONE(cvtsepi32_epi8)
    ONE(cvtusepi32_epi8) ONE(cvtepi32_epi16) ONE(cvtsepi32_epi16) ONE(cvtepi64_epi32) ONE(cvtsepi64_epi32)
    CASE(mask_cvtepi32_epi8, _mm512_mask_cvtepi32_epi8(_mm512_castsi512_si128(c), k, a))
    CASE(mask_cvtsepi32_storeu_epi8, stored_over(in, [&](void* to) { _mm512_mask_cvtsepi32_storeu_epi8(to, k, a); }))
    ONE(cvtepi32_ps) ONE(cvtepu32_ps)
    FLOAT_ONE(cvtps_epi32) FLOAT_ONE(cvttps_epi32) FLOAT_ONE(cvtps_epu32)
    CASE(cvt_roundps_epi32_down, _mm512_cvt_roundps_epi32(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC))
    HALF_IN(cvtph_ps)
    CASE(cvtps_ph, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT))
    // floats
    FLOAT_TWO(add_ps) FLOAT_TWO(sub_ps) FLOAT_TWO(mul_ps) FLOAT_TWO(div_ps) FLOAT_TWO(max_ps) FLOAT_TWO(min_ps)
    FLOAT_TWO(andnot_ps) FLOAT_ONE(abs_ps) FLOAT_ONE(sqrt_ps)
    CASE(mask_mul_ps, _mm512_mask_mul_ps(z, k, x, y)) CASE(mask3_fmadd_ps, _mm512_mask3_fmadd_ps(x, y, z, k))
    CASE(fmadd_ps, _mm512_fmadd_ps(x, y, z)) CASE(fnmadd_ps, _mm512_fnmadd_ps(x, y, z))
    CASE(roundscale_ps_even, _mm512_roundscale_ps(x, 0)) CASE(roundscale_ps_up_quarter, _mm512_roundscale_ps(x, 0x22))
    CASE(roundscale_ps_zero, _mm512_roundscale_ps(x, 3))
    CASE(cmp_ps_mask_lt, _mm512_cmp_ps_mask(x, y, _CMP_LT_OQ)) CASE(cmp_ps_mask_nge, _mm512_cmp_ps_mask(x, y, _CMP_NGE_UQ))
    CASE(cmp_ps_mask_unord, _mm512_cmp_ps_mask(x, y, _CMP_UNORD_Q))
    CASE(cmp_ps_mask_eq_uq, _mm512_cmp_ps_mask(x, y, _CMP_EQ_UQ)) FLOAT_TWO(cmpneq_ps_mask)
    CASE(fpclass_ps_mask_special, _mm512_fpclass_ps_mask(x, 0x99)) CASE(fpclass_ps_mask_rest, _mm512_fpclass_ps_mask(x, 0x66))
    FLOAT_ONE(reduce_add_ps) FLOAT_ONE(reduce_max_ps) FLOAT_ONE(reduce_min_ps)
#if defined(__AVX512VNNI__)
    CASE(dpbusd_epi32, _mm512_dpbusd_epi32(c, a, b)) CASE(dpbusds_epi32, _mm512_dpbusds_epi32(c, a, b))
    CASE(dpwssd_epi32, _mm512_dpwssd_epi32(c, a, b)) CASE(dpwssds_epi32, _mm512_dpwssds_epi32(c, a, b))
    CASE(mask_dpbusd_epi32, _mm512_mask_dpbusd_epi32(c, k, a, b))
    CASE(maskz_dpbusd_epi32, _mm512_maskz_dpbusd_epi32(k, c, a, b))
    CASE(dpbusd_epi32_256, _mm256_dpbusd_epi32(_mm512_castsi512_si256(c), _mm512_castsi512_si256(a),
                                               _mm512_castsi512_si256(b)))
#endif
#if defined(__AVX512VBMI__)
    TWO(permutexvar_epi8) THREE(permutex2var_epi8)
#endif
};
// clang-format on

constexpr int kCount = static_cast<int>(sizeof(kEntries) / sizeof(kEntries[0]));

#if defined(__AMX_INT8__)
struct alignas(64) Configuration {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t bytes_per_row[16] = {};
  std::uint8_t rows[16] = {};
  void set(int tile, int of_rows, int of_bytes) {
    rows[tile] = static_cast<std::uint8_t>(of_rows);
    bytes_per_row[tile] = static_cast<std::uint16_t>(of_bytes);
  }
  void load() {
    asm volatile("" ::: "memory");
    _tile_loadconfig(this);
  }
};
#endif

}  // namespace

OLIVE_EXPORT int intrinsic_count() { return kCount; }

OLIVE_EXPORT const char* intrinsic_name(int index) { return kEntries[index].name; }

// inputs [cases][200], outputs [cases][64]
OLIVE_EXPORT void intrinsic_run(int index, int cases, const std::uint8_t* inputs, std::uint8_t* outputs) {
  for (int i = 0; i < cases; ++i) {
    Inputs in;
    std::memcpy(&in, inputs + i * sizeof(in), sizeof(in));
    const Output out = kEntries[index].run(in);
    std::memcpy(outputs + i * 64, out.bytes, 64);
  }
}

// Loads and stores the last `count` bytes before a page that must not be touched.
OLIVE_EXPORT void masked_to_the_end_of_a_page(int count) {
  constexpr std::size_t kPage = 4096;
  void* pages = mmap(nullptr, 2 * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED || mprotect(static_cast<char*>(pages) + kPage, kPage, PROT_NONE) != 0) std::abort();
  char* last = static_cast<char*>(pages) + kPage - count;
  const __mmask64 mask = (1ull << count) - 1;
  const __m512i vector = _mm512_maskz_loadu_epi8(mask, last);
  _mm512_mask_storeu_epi8(last, mask, _mm512_add_epi8(vector, vector));
  munmap(pages, 2 * kPage);
}

#if defined(__AMX_INT8__)
// sums [rows][columns] += a [rows][depth] * b [depth / 4][columns * 4]; which: ssd, sud, usd, uud, bf16ps.
OLIVE_EXPORT void tile_product(int which, int rows, int depth, int columns, const void* a, const void* b, void* sums) {
  Configuration configuration;
  configuration.set(0, rows, columns * 4);
  configuration.set(1, rows, depth);
  configuration.set(2, depth / 4, columns * 4);
  configuration.load();
  _tile_loadd(0, sums, columns * 4);
  _tile_loadd(1, a, depth);
  _tile_stream_loadd(2, b, columns * 4);
  if (which == 0) _tile_dpbssd(0, 1, 2);
  if (which == 1) _tile_dpbsud(0, 1, 2);
  if (which == 2) _tile_dpbusd(0, 1, 2);
  if (which == 3) _tile_dpbuud(0, 1, 2);
#if defined(__AMX_BF16__)
  if (which == 4) _tile_dpbf16ps(0, 1, 2);
#endif
  _tile_stored(0, sums, columns * 4);
  _tile_release();
}
#endif

#if defined(OLIVE_EMULATE_AMX)
// What a processor refuses. Ends the process.
OLIVE_EXPORT void misuse(int which) {
  alignas(64) std::uint8_t memory[1024] = {};
  Configuration configuration;
  configuration.set(0, 16, 64);
  configuration.set(1, 16, 64);
  configuration.set(2, 16, 64);
  configuration.set(3, 8, 64);
  configuration.set(4, 16, 32);
  if (which == 1) configuration.set(5, 17, 64);
  if (which == 2) configuration.set(5, 16, 0);
  if (which == 3) configuration.reserved[3] = 1;
  if (which == 4) configuration.set(8, 16, 64);
  if (which != 0) configuration.load();
  if (which == 5) _tile_release();
  if (which == 0 || which == 5) _tile_zero(0);
  if (which == 6) _tile_zero(5);
  if (which == 7) _tile_dpbsud(0, 1, 1);
  if (which == 8) _tile_dpbsud(3, 1, 2);
  if (which == 9) _tile_dpbsud(4, 1, 2);
  if (which == 10) _tile_dpbsud(0, 1, 3);
  if (which == 11) _tile_loadd(8, memory, 64);
  if (which == 12) _mm512_store_si512(memory + 4, _mm512_setzero_si512());
}
#endif

}  // namespace olive
