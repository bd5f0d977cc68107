// What a product is, and the calls that compute it. Engines and loop nests are instantiated in run.cpp only:
// they are most of what there is to compile.
#pragma once

#include "vector.h"

namespace lora_fused::LORA_FUSED_ISA {

// y[m,n] = (accumulate ? y[m,n] : 0) + scale * sum_k a[m,k] b[k,n] + keep(m,n) * sum_r s[m,r] l[r,n] +
// bias[n] NOTE: scale goes with a product without a rank term only (shrink); the others have scale 1.
struct Gemm {
  i64 M = 0, N = 0, K = 0, R = 0;
  Matrix a, b, s, l;
  Dropout drop_a, drop_b, drop_rank;  // threshold 0: no mask
  const u32* packed = nullptr;        // b in panels, or null
  float scale = 1.0f;
  const void* bias = nullptr;
  bool accumulate = false;
  Output y;
  bool turned = false;  // y and the operands are the transposes of what was asked: bias[m] instead of bias[n]
  bool over_tokens = false;  // a gradient of an adapter: few rows, and the contraction runs over the tokens
};

// Chooses the loop nest of a product by its shape, and the engine by its dtype.
void run(DType dtype, const Gemm& gemm, int threads);

// Writes y of a product without a bias from its sums: rows x cols of them, rows `pitch` (whole vectors)
// apart.
void write_sums(const Gemm& gemm, i64 rows, i64 cols, const float* sums, i64 pitch);

}  // namespace lora_fused::LORA_FUSED_ISA
