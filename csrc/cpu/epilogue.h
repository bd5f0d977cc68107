// How finished sums become y: mask, scale, bias, accumulation, rounding, any strides.
#pragma once

#include "pack.h"
#include "product.h"

namespace lora_fused::LORA_FUSED_ISA {

// sum += rank_sum where the mask keeps, for rows m..m+count and columns col0..col0+cols; rows `pitch` floats
// apart.
static void add_kept(const Dropout& dropout, i64 m, i64 count, i64 col0, i64 cols, const float* rank_sum,
                     float* sum, i64 pitch) {
  for (i64 i = 0; i < count; ++i)
    for (i64 c0 = 0; c0 < cols; c0 += kKeepColumns) {
      u32 bits[kKeepColumns / 32];
      keep_row(dropout, m + i, col0 + c0, min(kKeepColumns, cols - c0), bits);
      for (i64 c = 0; c < min(kKeepColumns, cols - c0); c += kLanes) {
        float* p = sum + i * pitch + c0 + c;
        const Vec rank = vec_load(rank_sum + i * pitch + c0 + c);
        vec_store(p, vec_add(vec_load(p), vec_keep(rank, bits[c / 32] >> (c % 32))));
      }
    }
}

// Rows of y that are contiguous in memory.
template <class T, class Y>
static void write_rows(const Gemm& g, i64 m, i64 count, i64 col0, i64 cols, const float* sum, i64 pitch) {
  const Vec scale = vec_set1(g.scale);
  const T* bias = g.bias ? static_cast<const T*>(g.bias) + col0 : nullptr;
  const i64 whole = cols / kLanes * kLanes, rest = cols - whole;
  for (i64 i = 0; i < count; ++i) {
    Y* y = static_cast<Y*>(g.y.data) + (m + i) * g.y.row_stride + col0;
    const float* from = sum + i * pitch;
    for (i64 c = 0; c < whole; c += kLanes) {
      Vec v = vec_mul(vec_load(from + c), scale);
      if (bias) v = vec_add(v, vec_load(bias + c));
      if (g.accumulate) v = vec_add(v, vec_load(y + c));
      vec_store(y + c, v);
    }
    if (rest > 0) {
      Vec v = vec_mul(vec_load(from + whole), scale);
      if (bias) v = vec_add(v, vec_load_part(bias + whole, rest));
      if (g.accumulate) v = vec_add(v, vec_load_part(y + whole, rest));
      vec_store_part(y + whole, v, rest);
    }
  }
}

template <class Y>
LORA_FUSED_INLINE void write_column(const Gemm& g, Y* y, Vec v, i64 n) {
  if (g.y.row_stride == 1) {
    if (g.accumulate) v = vec_add(v, vec_load_part(y, n));
    return vec_store_part(y, v, n);
  }
  Y out[kLanes];
  vec_store(out, v);
  for (i64 r = 0; r < n; ++r) y[r * g.y.row_stride] = out[r];
}

// Rows of the sums that are columns in memory: a turned product, or db, stored [N, R], as its transpose.
template <class T, class Y>
static void write_columns(const Gemm& g, i64 m, i64 count, i64 col0, i64 cols, const float* sum, i64 pitch) {
  const T* bias = g.turned && g.bias ? static_cast<const T*>(g.bias) + m : nullptr;
  for (i64 i = 0; i < count; i += kLanes) {
    const i64 n = min(kLanes, count - i);
    const Vec added = bias ? vec_load_part(bias + i, n) : vec_zero();
    for (i64 c = 0; c < cols; c += kLanes) {
      Words lanes[kLanes];
      for (int j = 0; j < kLanes; ++j)
        lanes[j] = i + j < count ? words_load(sum + (i + j) * pitch + c) : words_zero();
      transpose(lanes);
      for (i64 j = 0; j < min(kLanes, cols - c); ++j) {
        Y* y = static_cast<Y*>(g.y.data) + (m + i) * g.y.row_stride + (col0 + c + j) * g.y.col_stride;
        write_column(g, y, vec_fma(words_as_vec(lanes[j]), vec_set1(g.scale), added), n);
      }
    }
  }
}

template <class T, class Y>
static void write_as(const Gemm& g, i64 m, i64 count, i64 col0, i64 cols, const float* sum, i64 pitch) {
  if (g.y.col_stride == 1 && !g.turned) return write_rows<T, Y>(g, m, count, col0, cols, sum, pitch);
  write_columns<T, Y>(g, m, count, col0, cols, sum, pitch);
}

// Writes rows m..m+count, columns col0..col0+cols of y from sums whose rows are `pitch` floats apart (whole
// vectors).
template <class T>
static void write_output(const Gemm& g, i64 m, i64 count, i64 col0, i64 cols, const float* sum, i64 pitch) {
  switch (g.y.dtype) {
    case DType::f32:
      return write_as<T, float>(g, m, count, col0, cols, sum, pitch);
    case DType::bf16:
      return write_as<T, BFloat16>(g, m, count, col0, cols, sum, pitch);
    case DType::f16:
      return write_as<T, Float16>(g, m, count, col0, cols, sum, pitch);
  }
}

}  // namespace lora_fused::LORA_FUSED_ISA
