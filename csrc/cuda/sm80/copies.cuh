// Global memory to the tiles of a stage: 16-byte cp.async with zero fill, or single elements for operands
// whose strides or addresses are not multiples of 16 bytes.
#pragma once

#include "../../problem.h"
#include "tile.cuh"

namespace lora_fused::sm80 {

LORA_FUSED_DEVICE int clamp(int value, int low, int high) { return max(low, min(value, high)); }

// One thread's part in copying tiles of kRows rows of kChunks 16-byte chunks: one column of chunks, every
// kStep-th row. kSwizzle(row, chunk) is where a chunk goes.
template <int kRows, int kChunks, int kThreads>
struct Part {
  static constexpr int kStep = kThreads / kChunks, kPasses = kRows / kStep;
  static_assert(kThreads % kChunks == 0 && kRows % kStep == 0, "every thread copies equally many chunks");

  static LORA_FUSED_DEVICE int chunk() { return threadIdx.x % kChunks; }
  static LORA_FUSED_DEVICE int row() { return threadIdx.x / kChunks; }

  // `from` is this thread's first chunk. Rows at and after `rows` and bytes of a row at and after `row_bytes`
  // are zero; rows at and after `wanted_rows` are left as they are.
  template <class Swizzle>
  static LORA_FUSED_DEVICE void copy(const char* from, i64 row_stride_bytes, int rows, int row_bytes,
                                     int wanted_rows, Swizzle swizzle) {
    const int bytes = clamp(row_bytes - chunk() * 16, 0, 16);
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int r = row() + pass * kStep;
      if (kPasses * kStep > wanted_rows && r >= wanted_rows) continue;
      ptx::cp_async_16(swizzle(r, chunk()), from + pass * kStep * row_stride_bytes, r < rows ? bytes : 0);
    }
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
