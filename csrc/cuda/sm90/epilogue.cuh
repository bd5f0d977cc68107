// From accumulators to global memory, through shared memory and by tensor stores.
#pragma once

#include "tile.cuh"

namespace lora_fused::sm90 {

// Where a tile goes: out[row, column] = scale accum + bias. `map` has boxes of 16 x 64.
struct Destination {
  const CUtensorMap* map;
  const void* bias;  // of column 0, or null
  float scale;
  int rows, columns;  // of the matrix
};

// A warp's 16 rows from (row, column), rounded once: 64 columns at a time through two buffers, whose rows are
// 128 bytes with the 128-byte swizzle. Stores belong to lane 0.
template <class G, int kCount>
LORA_FUSED_DEVICE void store_rows(const float (&accum)[kCount], const Destination& to, int row, int column,
                                  std::uint32_t staging) {
  using T = typename G::T;
  const int lane = threadIdx.x % 32, line = lane % 16;
  const T* bias = static_cast<const T*>(to.bias);
#pragma unroll
  for (int piece = 0; piece < kCount / 32; ++piece) {
    const std::uint32_t buffer = staging + piece % 2 * G::kPieceBytes;
    const int first = column + piece * 64;
    if (lane == 0) ptx::bulk_wait_read<1>();
    __syncwarp();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float* d = accum + piece * 32 + j * 8;
      float2 low{0.f, 0.f}, high{0.f, 0.f};
      const int at = first + j * 16 + lane % 4 * 2;
      if (bias != nullptr) {
        if (at < to.columns) low = Numeric<T>::unpack(ptx::ld_global_nc_32(bias + at));
        if (at + 8 < to.columns) high = Numeric<T>::unpack(ptx::ld_global_nc_32(bias + at + 8));
      }
      const std::uint32_t chunk = (2 * j + lane / 16) ^ (line % 8);
      ptx::stmatrix_x4(buffer + line * kSwizzleRow + (chunk << 4),
                       Numeric<T>::pack(fmaf(d[0], to.scale, low.x), fmaf(d[1], to.scale, low.y)),
                       Numeric<T>::pack(fmaf(d[2], to.scale, low.x), fmaf(d[3], to.scale, low.y)),
                       Numeric<T>::pack(fmaf(d[4], to.scale, high.x), fmaf(d[5], to.scale, high.y)),
                       Numeric<T>::pack(fmaf(d[6], to.scale, high.x), fmaf(d[7], to.scale, high.y)));
    }
    ptx::fence_proxy_async_shared();
    __syncwarp();
    if (lane == 0) {
      if (row < to.rows && first < to.columns) ptx::tensor_store(to.map, buffer, first, row);
      ptx::bulk_commit();
    }
  }
}

// All of this warp's stores are in global memory.
LORA_FUSED_DEVICE void finish_stores() {
  if (threadIdx.x % 32 == 0) ptx::bulk_wait_all();
  __syncwarp();
}

}  // namespace lora_fused::sm90
