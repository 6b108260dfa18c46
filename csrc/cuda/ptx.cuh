// The instructions the kernels need that C++ does not have, one function each. Under OLIVE_EMULATED the same names
// come from the tests' emulator, which runs a kernel's threads on a CPU; csrc/cuda has no other inline assembly.
//
// Shared memory is addressed by 32-bit offsets (shared_address), as the instructions want it.
#pragma once

#include <cstdint>

#if defined(OLIVE_EMULATED)
#include "emulator/ptx.h"
#else

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900 && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
// Dispatch would choose kernels that this code lacks.
#error "compute capability 9.0 needs its own instructions: set CMAKE_CUDA_ARCHITECTURES to 90a-real, not 90"
#endif

#include <cuda.h>  // CUtensorMap
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define OLIVE_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]

namespace olive::cuda {

using TensorMap = CUtensorMap;

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- memory ---------------------------------------------------------------------------------------------

// What createpolicy.fractional.L2::evict_first gives for a fraction of 1, without asking for it at every load.
constexpr uint64_t kEvictFirst = 0x12F0000000000000ull;

// 16 bytes that are read once: not kept in L1, first to leave L2, so that activations stay there.
__device__ __forceinline__ uint4 load_once(const uint4* from) {
  uint4 value;
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(from), "l"(kEvictFirst));
  return value;
}

// Has the 128 bytes around an address brought to L2. Reads nothing that a kernel still running could be writing.
__device__ __forceinline__ void prefetch(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// Where a launch `overlaps` the one before (runtime.cuh): waits until that has ended and its results can be seen.
// Nothing of memory may be read or written before.
__device__ __forceinline__ void wait_for_launch_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// From here on the next launch may start, if it overlaps. After `wait_for_launch_before`: what that one has waited for
// then holds for all launches before.
__device__ __forceinline__ void let_next_launch_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// 16 bytes from global to shared memory, zeros where not valid (`from` is then not read).
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// 4 bytes.
__device__ __forceinline__ void copy_async_word(uint32_t to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// At most kPending of this thread's newest groups of copies are still under way.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- matrices -------------------------------------------------------------------------------------------

// Four 8 x 8 matrices of 16-bit values; lane 8 i + j gives the address of row j of matrix i.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

// sum [16 x 8] = (kAccumulate ? sum : 0) + A [16 x 16] times B [16 x 8], in float32.
template <class T, bool kAccumulate>
__device__ __forceinline__ void multiply_16x8x16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

#define OLIVE_MMA(type, name)                                                                                         \
  template <>                                                                                                         \
  __device__ __forceinline__ void multiply_16x8x16<type, true>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,  \
                                                               uint32_t b1) {                                         \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                                               \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                               \
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                     \
  }                                                                                                                   \
  template <>                                                                                                         \
  __device__ __forceinline__ void multiply_16x8x16<type, false>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, \
                                                                uint32_t b1) {                                        \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                                               \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"                           \
                 : "=f"(sum[0]), "=f"(sum[1]), "=f"(sum[2]), "=f"(sum[3])                                             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));                          \
  }

OLIVE_MMA(__half, "f16")
OLIVE_MMA(__nv_bfloat16, "bf16")

// sum [16 x 8] = `start` or sum + A [16 x 32] times B [32 x 8] of int8, in int32.
__device__ __forceinline__ void multiply_int8(int (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void multiply_int8_from(int start, int (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                                   uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %10, %10, %10};"
      : "=r"(sum[0]), "=r"(sum[1]), "=r"(sum[2]), "=r"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(start));
}

// Two products of 16-bit values, each rounded once. (bfloat16 has no multiplication before sm_90, but this.)
template <class T>
__device__ __forceinline__ uint32_t multiply_pair(uint32_t a, uint32_t b);

template <>
__device__ __forceinline__ uint32_t multiply_pair<__half>(uint32_t a, uint32_t b) {
  uint32_t product;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}

template <>
__device__ __forceinline__ uint32_t multiply_pair<__nv_bfloat16>(uint32_t a, uint32_t b) {
  uint32_t product;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u));  // + (-0, -0)
  return product;
}

// Two float32 values rounded to T, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t round_pair(float low, float high);

template <>
__device__ __forceinline__ uint32_t round_pair<__half>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

template <>
__device__ __forceinline__ uint32_t round_pair<__nv_bfloat16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// ---- clusters (sm_90 and later) -------------------------------------------------------------------------

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of the cluster wait for each other, also where a warp has diverged; their writes to shared memory are
// seen afterwards.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// The same without a fence: what they wrote may not be seen yet, and only reads whose values were used are over.
__device__ __forceinline__ void cluster_meet() {
  asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait;" ::: "memory");
}

// A float in the shared memory of another block of the cluster, at the address it has in this one.
__device__ __forceinline__ float load_from_rank(const float* own, uint32_t rank) {
  float value;
  asm volatile("{\n.reg .u32 remote;\nmapa.shared::cluster.u32 remote, %1, %2;\nld.shared::cluster.f32 %0, [remote];\n}"
               : "=f"(value)
               : "r"(shared_address(own)), "r"(rank)
               : "memory");
  return value;
}
#else
// Blocks come alone.
__device__ __forceinline__ uint32_t cluster_rank() { return 0; }
__device__ __forceinline__ void cluster_sync() { __syncthreads(); }
__device__ __forceinline__ void cluster_meet() { __syncthreads(); }
__device__ __forceinline__ float load_from_rank(const float* own, uint32_t) { return *own; }
#endif

// ---- Hopper: barriers in shared memory, bulk tensor copies, warpgroup products --------------------------

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define OLIVE_HAS_WGMMA 1

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and lets the phase end only after `bytes` more were copied.
__device__ __forceinline__ void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Waits for the end of the phase of this parity.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n"
      "@done bra ready;\n"
      "bra again;\n"
      "ready:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// One box of a two-dimensional tensor to shared memory; zeros outside of it. Ends on the barrier.
__device__ __forceinline__ void copy_box(uint32_t to, const TensorMap* map, uint32_t barrier, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          to),
      "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// `bytes` in a row to shared memory, a multiple of 16, as both addresses are. Ends on the barrier.
__device__ __forceinline__ void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Barrier kIndex (1..15) among kThreads threads.
template <int kIndex, int kThreads>
__device__ __forceinline__ void sync_some() {
  asm volatile("bar.sync %0, %1;" ::"n"(kIndex), "n"(kThreads) : "memory");
}

// Four 8 x 8 matrices of 16-bit values, transposed; lane 8 i + j gives the address of row j of matrix i.
__device__ __forceinline__ void store_matrices_transposed(uint32_t address, const uint32_t (&from)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(from[0]),
               "r"(from[1]), "r"(from[2]), "r"(from[3])
               : "memory");
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of a sum across the wait for it.
template <int kCount>
__device__ __forceinline__ void hold(float (&sum)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(sum[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void hold(int (&sum)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(sum[i])::"memory");
}

// sum [64 x kColumns] = (accumulate ? sum : 0) + A [64 x 16, in registers] times B [16 x kColumns], B by descriptor,
// K-major. Registers may be read until the group of products is waited for.
template <class T, int kColumns>
__device__ __forceinline__ void wgmma(float (&sum)[kColumns / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate);

// The same with int8, A [64 x 32] and B [32 x kColumns], in int32.
template <int kColumns>
__device__ __forceinline__ void wgmma_int8(int (&sum)[kColumns / 2], const uint32_t (&a)[4], uint64_t b,
                                           bool accumulate);

#include "cuda/wgmma.cuh"

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace olive::cuda

#endif  // OLIVE_EMULATED
