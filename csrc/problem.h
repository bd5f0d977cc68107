// What the native operations are asked to do. Raw pointers, sizes and strides in elements; no torch types.
// Names as everywhere in lora_fused: M tokens, K in_features, N out_features, R rank.
#pragma once

#include <cstdint>

namespace lora_fused {

using i64 = std::int64_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

// A strided matrix, read only.
struct Matrix {
  const void* data = nullptr;
  i64 row_stride = 0;
  i64 col_stride = 0;
};

// A strided matrix that is written.
struct Output {
  void* data = nullptr;
  i64 row_stride = 0;
  i64 col_stride = 0;
  DType dtype = DType::f32;
};

// The dropout mask over a [rows, row_length] matrix: element (row, col) is kept iff its 16 random bits are >=
// threshold. threshold = round(p * 65536); 0 keeps everything (no mask).
struct Dropout {
  u64 seed = 0;
  u32 threshold = 0;
  i64 row_length = 0;
};

// y[m,n] = (accumulate ? y[m,n] : 0) + sum_k x[m,k] w[k,n] + keep(m,n) * sum_r s[m,r] l[r,n] + bias[n]
// Forward: w is the stored [N,K] weight seen as [K,N], l is lora_B seen as [R,N].
// dx:      the contraction runs over out_features, w is the stored weight as it is, l is lora_A.
struct MatmulArgs {
  i64 M, N, K, R;
  Matrix x, w, s, l;
  const u32* packed;  // w in panels, made by pack(); null: w is read
  const void* bias;   // [N] in the compute dtype, or null
  bool accumulate;
  Dropout dropout;
  Output y;
  int threads;
};

// s[m,r] = scale * sum_k keep(m,k) x[m,k] a[r,k]
struct ShrinkArgs {
  i64 M, K, R;
  Matrix x, a;
  float scale;
  Dropout dropout;
  Output s;
  int threads;
};

// ds[m,r] = scale * sum_n dy[m,n] b[n,r]   and   db[n,r] = sum_m dy[m,n] s[m,r]   in one read of dy.
// ds.data or db.data may be null: that gradient is not wanted.
struct ShrinkReduceArgs {
  i64 M, N, R;
  Matrix dy, b, s;
  float scale;
  Output ds, db;
  int threads;
};

// da[r,k] = sum_m ds[m,r] keep(m,k) x[m,k]
struct ReduceArgs {
  i64 M, K, R;
  Matrix ds, x;
  Dropout dropout;
  Output da;
  int threads;
};

// w [K,N] into panels, see cpu/pack.h.
struct PackArgs {
  i64 K, N;
  Matrix w;
  u32* packed;
  int threads;
};

}  // namespace lora_fused
