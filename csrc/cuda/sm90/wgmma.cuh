// wgmma: d[64 x kN] (+)= a[64 x 16] b[kN x 16]^T of one warpgroup, fp32 accumulators, bf16 or fp16 operands.
//
//   Wgmma<T, kN>::ss<kMnMajor>   a and b from shared memory, by descriptor; b may be stored [16, kN]
//   (kMnMajor) Wgmma<T, kN>::rs<kMnMajor>   a from registers, in the fragments of mma.m16n8k16 (16 rows for
//   each warp)
//
// Accumulator i of thread t of the warpgroup: row 16 (t / 32) + t % 32 / 4 + 8 (i / 2 % 2),
// column 8 (i / 4) + 2 (t % 4) + i % 2.
#pragma once

#include "../numeric.cuh"
#include "ptx.cuh"

namespace lora_fused {

// Shared-memory operands lie in blocks of 64 x 64 elements, 128 bytes a row with the 128-byte swizzle, at
// multiples of 1024 bytes: what a tensor copy with a 64 x 64 box leaves.
constexpr int kSwizzleRow = 128;
constexpr int kOperandBlock = 64 * kSwizzleRow;

// Where the 16 elements of step `k` of the contraction begin: further along the rows, or 16 rows further.
template <bool kMnMajor>
LORA_FUSED_DEVICE constexpr std::uint32_t operand_step(int k) {
  return k * (kMnMajor ? 16 * kSwizzleRow : 32);
}

// The matrix descriptor ("Matrix descriptor" in the ISA): start, leading and stride offset in units of 16
// bytes, 128-byte swizzle. K-major: groups of 8 rows are 1024 bytes apart. MN-major: groups of 8 steps of the
// contraction are 1024 bytes apart, blocks of 64 columns are kOperandBlock apart.
template <bool kMnMajor>
LORA_FUSED_DEVICE std::uint64_t operand_descriptor(std::uint32_t shared) {
  constexpr std::uint64_t kLeading = kMnMajor ? kOperandBlock / 16 : 1;
  constexpr std::uint64_t kLayout = kLeading << 16 | std::uint64_t(8 * kSwizzleRow / 16) << 32 | 1ull << 62;
  return kLayout | (shared & 0x3FFFF) >> 4;
}

template <typename T, int kN>
struct Wgmma;

// Operand lists of the asm statements: "%0, %1, ..." ten at a time, and the accumulators they stand for.
#define LORA_TEN(t) \
  "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9, "
#define LORA_NAMES_32 LORA_TEN() LORA_TEN(1) LORA_TEN(2) "%30, %31"
#define LORA_NAMES_64 \
  LORA_TEN() LORA_TEN(1) LORA_TEN(2) LORA_TEN(3) LORA_TEN(4) LORA_TEN(5) "%60, %61, %62, %63"
#define LORA_NAMES_128 \
  LORA_TEN()           \
  LORA_TEN(1)          \
  LORA_TEN(2)          \
  LORA_TEN(3)          \
  LORA_TEN(4)          \
  LORA_TEN(5)          \
  LORA_TEN(6) LORA_TEN(7) LORA_TEN(8) LORA_TEN(9) LORA_TEN(10) LORA_TEN(11) "%120, %121, %122, %123, " \
                                                                            "%124, %125, %126, %127"
#define LORA_D8(i)                                                                            \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define LORA_D_32(i) LORA_D8(i), LORA_D8(i + 8), LORA_D8(i + 16), LORA_D8(i + 24)
#define LORA_D_64(i) LORA_D_32(i), LORA_D_32(i + 32)
#define LORA_D_128(i) LORA_D_64(i), LORA_D_64(i + 64)

// Operands after the kCount accumulators are numbered by hand: p0 = kCount, p1 = kCount + 1, ...
#define LORA_WGMMA(T, TYPE, N, COUNT, p0, p1, p2, p3, p4, p5, p6)                                          \
  template <>                                                                                              \
  struct Wgmma<T, N> {                                                                                     \
    template <bool kMnMajor>                                                                               \
    static LORA_FUSED_DEVICE void ss(float (&d)[COUNT], std::uint64_t a, std::uint64_t b, int add) {       \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #p2                                            \
                   ", 0;\n"                                                                                \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" LORA_NAMES_##COUNT \
                   "}, %" #p0 ", %" #p1 ", add, 1, 1, 0, %" #p3 ";\n}"                                     \
                   : LORA_D_##COUNT(0)                                                                     \
                   : "l"(a), "l"(b), "r"(add), "n"(kMnMajor));                                             \
    }                                                                                                      \
    template <bool kMnMajor>                                                                               \
    static LORA_FUSED_DEVICE void rs(float (&d)[COUNT], const std::uint32_t (&a)[4], std::uint64_t b,      \
                                     int add) {                                                            \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #p5                                            \
                   ", 0;\n"                                                                                \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" LORA_NAMES_##COUNT \
                   "}, {%" #p0 ", %" #p1 ", %" #p2 ", %" #p3 "}, %" #p4 ", add, 1, 1, %" #p6 ";\n}"        \
                   : LORA_D_##COUNT(0)                                                                     \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(kMnMajor));         \
    }                                                                                                      \
  };
LORA_WGMMA(bf16, "bf16", 64, 32, 32, 33, 34, 35, 36, 37, 38)
LORA_WGMMA(bf16, "bf16", 128, 64, 64, 65, 66, 67, 68, 69, 70)
LORA_WGMMA(bf16, "bf16", 256, 128, 128, 129, 130, 131, 132, 133, 134)
LORA_WGMMA(fp16, "f16", 64, 32, 32, 33, 34, 35, 36, 37, 38)
LORA_WGMMA(fp16, "f16", 128, 64, 64, 65, 66, 67, 68, 69, 70)
LORA_WGMMA(fp16, "f16", 256, 128, 128, 129, 130, 131, 132, 133, 134)
#undef LORA_WGMMA

}  // namespace lora_fused
