// Shapes and shared-memory layouts of a block's tiles, and the fragments that warps read from them.
//
// A stage holds two operands, rows of 16-byte chunks, swizzled so that neither cp.async nor ldmatrix meets a
// bank twice:
//   k_major    [rows, BLOCK_K]   64- or 128-byte rows     chunk ^ (row / 2 % 4)  or  chunk ^ (row % 8)
//   mn_major   [BLOCK_K, rows]   row = k                  chunk ^ (k % 8), for fp32 chunk ^ (2 (k % 4))
#pragma once

#include "../numeric.cuh"

namespace lora_fused::sm80 {

// How the second operand lies in memory. any: every operand has arbitrary strides and is read by elements.
enum class Layout { k_major, mn_major, any };

template <typename T, int kBlockM, int kBlockN, int kBlockK, int kWarpsM, int kWarpsN, int kNumStages,
          Layout kLayout>
struct Tile {
  using Element = T;
  static constexpr int BLOCK_M = kBlockM, BLOCK_N = kBlockN, BLOCK_K = kBlockK;
  static constexpr int kStages = kNumStages, kNumWarpsN = kWarpsN;
  static constexpr int kWarps = kWarpsM * kWarpsN, kThreads = 32 * kWarps;
  static constexpr bool kTransposed = kLayout == Layout::mn_major;
  static constexpr bool kByElements = kLayout == Layout::any;

  static constexpr int kSize = sizeof(T), kPerChunk = 16 / kSize;
  static constexpr int kStepK = Numeric<T>::kMmaK;  // one mma: 32 bytes of a row
  static constexpr int kSteps = BLOCK_K / kStepK;
  static constexpr int WARP_M = BLOCK_M / kWarpsM, WARP_N = BLOCK_N / kWarpsN;
  static constexpr int kFragsM = WARP_M / 16, kFragsN = WARP_N / 8;

  static constexpr int kRowBytes = BLOCK_K * kSize;   // of a k_major tile
  static constexpr int kWideBytes = BLOCK_N * kSize;  // of an mn_major tile
  static constexpr int kBytesX = BLOCK_M * kRowBytes, kBytesW = BLOCK_N * kRowBytes;
  static constexpr int kStageBytes = kBytesX + kBytesW, kSharedBytes = kStages * kStageBytes;

  // An S tile [BLOCK_M, <= kChunkR]: each warp takes 16 or 32 rows; spare warps share the columns.
  static constexpr int kChunkR = BLOCK_N < 128 ? BLOCK_N : 128;
  static constexpr int kShrinkWarpsM = BLOCK_M / 16 < kWarps ? BLOCK_M / 16 : kWarps;
  static constexpr int kShrinkWarpsN = kWarps / kShrinkWarpsM;
  static constexpr int kShrinkFragsM = BLOCK_M / 16 / kShrinkWarpsM;
  static constexpr int kShrinkPairsN = kChunkR / 16 / kShrinkWarpsN;

  static_assert(kRowBytes == 64 || kRowBytes == 128, "the swizzle is made for rows of 64 or 128 bytes");
  static_assert(BLOCK_N >= 64 && kFragsN % 4 == 0, "the epilogue stores four n tiles of 8 columns at a time");
  static_assert(kFragsM >= 1 && kStages >= 2 && kSteps >= 2,
                "a warp needs a fragment, a block two stages and steps");
  static_assert(kSharedBytes <= 163 * 1024, "more shared memory than sm_80 gives to a block");
};

template <int kRowBytes>
LORA_FUSED_DEVICE std::uint32_t k_major_offset(int row, int chunk) {
  return row * kRowBytes + ((chunk ^ (kRowBytes == 64 ? (row >> 1) & 3 : row & 7)) << 4);
}

template <int kRowBytes, int kSize>
LORA_FUSED_DEVICE std::uint32_t mn_major_offset(int k, int chunk) {
  return k * kRowBytes + ((chunk ^ (kSize == 2 ? k & 7 : (k & 3) << 1)) << 4);
}

// Where element (row, k) of the second operand lies in its tile.
template <class Tile>
LORA_FUSED_DEVICE std::uint32_t element_offset(int row, int k) {
  constexpr int kPer = Tile::kPerChunk, kSize = Tile::kSize;
  if constexpr (Tile::kTransposed)
    return mn_major_offset<Tile::kWideBytes, kSize>(k, row / kPer) + row % kPer * kSize;
  else
    return k_major_offset<Tile::kRowBytes>(row, k / kPer) + k % kPer * kSize;
}

// fp32 fragments are rounded to TF32; 16-bit ones are used as they are.
template <typename T, int n>
LORA_FUSED_DEVICE void round_fragment(std::uint32_t (&r)[n]) {
  if constexpr (sizeof(T) == 4)
    for (int i = 0; i < n; ++i) r[i] = ptx::cvt_rna_tf32(__uint_as_float(r[i]));
}

// a [16, kStepK] of a k_major tile, rows from `row`: the left fragment of an mma.
template <class Tile>
LORA_FUSED_DEVICE void load_left(std::uint32_t (&a)[4], std::uint32_t tile, int row, int step, int lane) {
  ptx::ldmatrix_x4(a, tile + k_major_offset<Tile::kRowBytes>(row + (lane & 15), step * 2 + (lane >> 4)));
}

// b [16, kStepK] of the second operand, rows from `row`: right fragments {b[0], b[1]} and {b[2], b[3]}.
template <class Tile>
LORA_FUSED_DEVICE void load_right(std::uint32_t (&b)[4], std::uint32_t tile, int row, int step, int lane) {
  if constexpr (!Tile::kTransposed) {
    const int inner = (lane & 7) + ((lane >> 4) << 3);
    ptx::ldmatrix_x4(b, tile + k_major_offset<Tile::kRowBytes>(row + inner, step * 2 + ((lane >> 3) & 1)));
  } else if constexpr (Tile::kSize == 2) {
    const int k = step * 16 + (lane & 15), chunk = row / 8 + (lane >> 4);
    ptx::ldmatrix_x4_trans(b, tile + mn_major_offset<Tile::kWideBytes, 2>(k, chunk));
  } else {
    for (int i = 0; i < 4; ++i) {  // NOTE: ldmatrix.trans moves 16-bit elements only
      const int k = step * 8 + (i & 1) * 4 + (lane & 3);
      b[i] = ptx::ld_shared_32(tile + element_offset<Tile>(row + (i >> 1) * 8 + (lane >> 2), k));
    }
  }
}

}  // namespace lora_fused::sm80
