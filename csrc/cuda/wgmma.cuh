// wgmma with A from registers, one specialisation per type and number of columns. Included by ptx.cuh only.
#pragma once

// Operands %0 .. %31, .. %63, .. %127 of the instruction, and the registers that stand for them.

#define OLIVE_OPERANDS_32                                                \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15" \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"

#define OLIVE_OPERANDS_64                                                            \
  OLIVE_OPERANDS_32                                                                  \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define OLIVE_OPERANDS_128                                                                       \
  OLIVE_OPERANDS_64                                                                              \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"             \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"             \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define OLIVE_SUM_4(i) "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3])
#define OLIVE_SUM_16(i) OLIVE_SUM_4(i), OLIVE_SUM_4(i + 4), OLIVE_SUM_4(i + 8), OLIVE_SUM_4(i + 12)
#define OLIVE_SUM_32(i) OLIVE_SUM_16(i), OLIVE_SUM_16(i + 16)
#define OLIVE_SUM_64(i) OLIVE_SUM_32(i), OLIVE_SUM_32(i + 32)
#define OLIVE_SUM_128(i) OLIVE_SUM_64(i), OLIVE_SUM_64(i + 64)

// The last five operands: a, b, whether to accumulate. Signs 1, 1; B is not transposed.
#define OLIVE_WGMMA(type, name, columns, registers, a0, a1, a2, a3, b_operand, accumulate_operand)                     \
  template <>                                                                                                          \
  __device__ __forceinline__ void wgmma<type, columns>(float (&sum)[registers], const uint32_t (&a)[4], uint64_t b,    \
                                                       bool accumulate) {                                              \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " accumulate_operand                                                \
                 ", 0;\n"                                                                                              \
                 "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." name "." name " {" OLIVE_OPERANDS_##registers \
                 "}, {" a0 ", " a1 ", " a2 ", " a3 "}, " b_operand ", p, 1, 1, 0;\n}"                                  \
                 : OLIVE_SUM_##registers(0)                                                                            \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));             \
  }

OLIVE_WGMMA(__half, "f16", 64, 32, "%32", "%33", "%34", "%35", "%36", "%37")
OLIVE_WGMMA(__half, "f16", 128, 64, "%64", "%65", "%66", "%67", "%68", "%69")
OLIVE_WGMMA(__half, "f16", 256, 128, "%128", "%129", "%130", "%131", "%132", "%133")
OLIVE_WGMMA(__nv_bfloat16, "bf16", 64, 32, "%32", "%33", "%34", "%35", "%36", "%37")
OLIVE_WGMMA(__nv_bfloat16, "bf16", 128, 64, "%64", "%65", "%66", "%67", "%68", "%69")
OLIVE_WGMMA(__nv_bfloat16, "bf16", 256, 128, "%128", "%129", "%130", "%131", "%132", "%133")

#define OLIVE_INT_SUM_4(i) "+r"(sum[i]), "+r"(sum[i + 1]), "+r"(sum[i + 2]), "+r"(sum[i + 3])
#define OLIVE_INT_SUM_16(i) OLIVE_INT_SUM_4(i), OLIVE_INT_SUM_4(i + 4), OLIVE_INT_SUM_4(i + 8), OLIVE_INT_SUM_4(i + 12)
#define OLIVE_INT_SUM_32(i) OLIVE_INT_SUM_16(i), OLIVE_INT_SUM_16(i + 16)
#define OLIVE_INT_SUM_64(i) OLIVE_INT_SUM_32(i), OLIVE_INT_SUM_32(i + 32)
#define OLIVE_INT_SUM_128(i) OLIVE_INT_SUM_64(i), OLIVE_INT_SUM_64(i + 64)

#define OLIVE_WGMMA_INT8(columns, registers, a0, a1, a2, a3, b_operand, accumulate_operand)                      \
  template <>                                                                                                    \
  __device__ __forceinline__ void wgmma_int8<columns>(int (&sum)[registers], const uint32_t (&a)[4], uint64_t b, \
                                                      bool accumulate) {                                         \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " accumulate_operand                                          \
                 ", 0;\n"                                                                                        \
                 "wgmma.mma_async.sync.aligned.m64n" #columns "k32.s32.s8.s8 {" OLIVE_OPERANDS_##registers       \
                 "}, {" a0 ", " a1 ", " a2 ", " a3 "}, " b_operand ", p;\n}"                                     \
                 : OLIVE_INT_SUM_##registers(0)                                                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));       \
  }

OLIVE_WGMMA_INT8(64, 32, "%32", "%33", "%34", "%35", "%36", "%37")
OLIVE_WGMMA_INT8(128, 64, "%64", "%65", "%66", "%67", "%68", "%69")
OLIVE_WGMMA_INT8(256, 128, "%128", "%129", "%130", "%131", "%132", "%133")
