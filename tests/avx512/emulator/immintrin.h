// Intel's intrinsics of AVX-512, VNNI and AMX in plain C++: csrc/cpu/avx512*.cpp and amx.cpp, compiled for AVX2 with
// this folder first among the include paths, run on any processor that has AVX2.
//
// How it works. The compiler's own header is included too: it has the types and everything up to AVX2. It declares the
// names below as well, but its functions cannot be inlined into code for AVX2. The ones here are in namespace olive,
// as all kernels are: a name is looked up there before it is looked up globally. A name that is missing here is
// therefore an error when compiling ("target specific option mismatch"); add it to the header of its kind.
//
// What it does not show: whether the compiler has the intrinsic under the flags of CMakeLists.txt, and speed. What is
// undefined on a processor (the upper half of a widening cast) is a pattern of bits here, and what a processor refuses
// (a misaligned address, a tile that does not fit) ends the process with a reason.
//
// Macros, as CMakeLists.txt has flags: OLIVE_EMULATE_VNNI, OLIVE_EMULATE_VBMI, OLIVE_EMULATE_AMX (tiles and int8),
// OLIVE_EMULATE_AMX_BF16. AVX-512 F, BW, DQ and VL are always there; of VL, which is most intrinsics once more for
// 128 and 256 bits, only what narrow loads, stores, conversions and dot products need.
//
// Sources: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2; Intel Intrinsics Guide.
#pragma once

#include_next <immintrin.h>

#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "expected -mavx2 -mfma -mf16c"
#endif
#if defined(__AVX512F__)
#error "expected a build without AVX-512, which would need no emulator"
#endif

// After the compiler's headers, which ask the same macros what they may use.
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1

#include "vectors.h"
#include "memory.h"
#include "integers.h"
#include "masks.h"
#include "shuffles.h"
#include "floats.h"
#include "conversions.h"

#if defined(OLIVE_EMULATE_VNNI)
#define __AVX512VNNI__ 1
#include "dot_products.h"
#endif
#if defined(OLIVE_EMULATE_AMX)
#define __AMX_TILE__ 1
#define __AMX_INT8__ 1
#if defined(OLIVE_EMULATE_AMX_BF16)
#define __AMX_BF16__ 1
#endif
#include "tiles.h"
#endif
#if defined(OLIVE_EMULATE_VBMI)
#define __AVX512VBMI__ 1
#endif
