// Global memory to the tiles of a stage: 16-byte cp.async with zero fill, or single elements for operands
// whose strides or addresses are not multiples of 16 bytes.
#pragma once

#include "../../problem.h"
#include "tile.cuh"

namespace lora_fused::sm80 {

LORA_FUSED_DEVICE int clamp(int value, int low, int high) { return max(low, min(value, high)); }

// One thread's part in copying tiles of kRows rows of kRowBytes: one column of 16-byte chunks, every kStep-th
// row.
template <int kRows, int kRowBytes, int kThreads, int kSize, bool kTransposed>
struct Part {
  static constexpr int kChunks = kRowBytes / 16, kStep = kThreads / kChunks, kPasses = kRows / kStep;
  static_assert(kThreads % kChunks == 0 && kRows % kStep == 0, "every thread copies equally many chunks");
  static_assert(kStep % (kTransposed && kSize == 4 ? 4 : 8) == 0,
                "a thread's rows share their place in the swizzle");

  const int row, chunk;

  explicit LORA_FUSED_DEVICE Part(int thread) : row(thread / kChunks), chunk(thread % kChunks) {}

  static LORA_FUSED_DEVICE std::uint32_t place(int row, int chunk) {
    if constexpr (kTransposed)
      return mn_major_offset<kRowBytes, kSize>(row, chunk);
    else
      return k_major_offset<kRowBytes>(row, chunk);
  }

  // `from` is this thread's first chunk. Rows at and after `rows` and bytes of a row at and after `row_bytes`
  // are zero.
  LORA_FUSED_DEVICE void copy(std::uint32_t to, const char* from, i64 row_stride_bytes, int rows,
                              int row_bytes) const {
    const std::uint32_t first = to + place(row, chunk);
    const int bytes = clamp(row_bytes - chunk * 16, 0, 16), rows_left = rows - row;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass)
      ptx::cp_async_16(first + pass * kStep * kRowBytes, from + pass * kStep * row_stride_bytes,
                       pass * kStep < rows_left ? bytes : 0);
  }
};

// kCount elements e of a tile: place(e) is where, inside(e) whether it exists (else zero), address(e) where
// from. The stores are visible to the block after its next barrier.
template <typename T, int kThreads, class Place, class Inside, class Address>
LORA_FUSED_DEVICE void copy_elements(int count, Place place, Inside inside, Address address) {
#pragma unroll 1
  for (int e = ptx::opaque(threadIdx.x); e < count; e += kThreads) {
    if constexpr (sizeof(T) == 4)
      ptx::st_shared_32(place(e), inside(e) ? ptx::ld_global_nc_32(address(e)) : 0u);
    else
      ptx::st_shared_16(place(e), inside(e) ? ptx::ld_global_nc_16(address(e)) : std::uint16_t{0});
  }
}

}  // namespace lora_fused::sm80
