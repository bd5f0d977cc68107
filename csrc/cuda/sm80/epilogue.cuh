// Accumulators to y: bias joins in fp32, one rounding, 16-byte stores.
#pragma once

#include "arguments.h"
#include "tile.cuh"

namespace lora_fused::sm80 {

LORA_FUSED_DEVICE void swap_with(std::uint32_t& kept, std::uint32_t& sent, bool upper, int distance) {
  const std::uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? kept : sent, distance);
  (upper ? kept : sent) = got;
}

// v[n] of lane t of a quad becomes v[t] of its lane n: each lane then holds 16 consecutive bytes of a row.
LORA_FUSED_DEVICE void transpose_quad(std::uint32_t (&v)[4], int lane) {
  const bool odd = lane & 1, high = lane & 2;
  swap_with(v[0], v[1], odd, 1);
  swap_with(v[2], v[3], odd, 1);
  swap_with(v[0], v[2], high, 2);
  swap_with(v[1], v[3], high, 2);
}

// Stores to y; kStrided: its columns are not neighbours.
template <typename T, bool kStrided>
struct Store {
  const Output& y;
  const void* bias;
  int rows, cols;  // M and N
  bool by_elements, accumulate;

  LORA_FUSED_DEVICE T* at(int row, int col) const {
    return static_cast<T*>(y.data) + row * y.row_stride + (kStrided ? col * y.col_stride : col);
  }

  LORA_FUSED_DEVICE float bias_of(int col) const {
    return bias && col < cols ? Numeric<T>::to_float(static_cast<const T*>(bias)[col]) : 0.f;
  }

  // What is added to the product at (row, col) before it is rounded, besides the bias.
  LORA_FUSED_DEVICE float old(int row, int col) const {
    return accumulate && row < rows && col < cols ? Numeric<T>::to_float(*at(row, col)) : 0.f;
  }

  // Eight 16-bit values of a row, from column `col`.
  LORA_FUSED_DEVICE void eight(int row, int col, const std::uint32_t (&v)[4]) const {
    if (row >= rows) return;
    T* to = at(row, col);
    if (!kStrided && !by_elements && col + 8 <= cols) {
      *reinterpret_cast<uint4*>(to) = {v[0], v[1], v[2], v[3]};
      return;
    }
#pragma unroll
    for (int e = 0; e < 8; ++e)
      if (col + e < cols)
        reinterpret_cast<std::uint16_t*>(to)[kStrided ? e * y.col_stride : e] =
            static_cast<std::uint16_t>(v[e / 2] >> (16 * (e % 2)));
  }

  // Two fp32 values of a row.
  LORA_FUSED_DEVICE void two(int row, int col, float v0, float v1) const {
    if (row >= rows) return;
    T* to = at(row, col);
    if (!kStrided && !by_elements && col + 2 <= cols) {
      *reinterpret_cast<float2*>(to) = {v0, v1};
      return;
    }
    if (col < cols) to[0] = v0;
    if (col + 1 < cols) to[kStrided ? y.col_stride : 1] = v1;
  }
};

// c [16 kFragsM, 8 kFragsN] of this warp to y from (row, col).
template <typename T, bool kStrided, int kFragsM, int kFragsN>
LORA_FUSED_DEVICE void store_tile(const Store<T, kStrided>& store, const float (&c)[kFragsM][kFragsN][4],
                                  int row, int col, int lane) {
  const int g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int j = 0; j < kFragsN; j += 4) {
    float bias[4][2];
#pragma unroll
    for (int n = 0; n < 4; ++n)
      for (int e = 0; e < 2; ++e) bias[n][e] = store.bias_of(col + (j + n) * 8 + 2 * t + e);
#pragma unroll
    for (int i = 0; i < kFragsM; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at_row = row + i * 16 + g + 8 * half;
        float v[4][2];
#pragma unroll
        for (int n = 0; n < 4; ++n)
          for (int e = 0; e < 2; ++e)
            v[n][e] =
                c[i][j + n][2 * half + e] + bias[n][e] + store.old(at_row, col + (j + n) * 8 + 2 * t + e);
        if constexpr (sizeof(T) == 2) {
          std::uint32_t packed[4];
#pragma unroll
          for (int n = 0; n < 4; ++n) packed[n] = Numeric<T>::pack(v[n][0], v[n][1]);
          transpose_quad(packed, lane);
          // NOTE: a shuffle does not order memory: lanes read the old values that others of their quad
          // overwrite.
          if (store.accumulate) __syncwarp();
          store.eight(at_row, col + (j + t) * 8, packed);
        } else {
#pragma unroll
          for (int n = 0; n < 4; ++n) store.two(at_row, col + (j + n) * 8 + 2 * t, v[n][0], v[n][1]);
        }
      }
  }
}

// scale · c of this warp's `pairs` of 16 columns, `stride` apart, to s; columns at and after `cols` do not
// exist.
template <typename T, int kFragsM, int kPairsN>
LORA_FUSED_DEVICE void store_shrunk(const Output& s, const float (&c)[kFragsM][2 * kPairsN][4], float scale,
                                    int row, int rows, int col, int cols, int stride, int lane) {
  const int g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int i = 0; i < kFragsM; ++i)
#pragma unroll
    for (int j = 0; j < 2 * kPairsN; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int at_row = row + i * 16 + g + 8 * (e >> 1);
        const int at_col = col + (j >> 1) * stride + (j & 1) * 8 + 2 * t + (e & 1);
        if (at_row < rows && at_col < cols)
          static_cast<T*>(s.data)[at_row * s.row_stride + at_col] =
              Numeric<T>::from_float(c[i][j][e] * scale);
      }
}

}  // namespace lora_fused::sm80
