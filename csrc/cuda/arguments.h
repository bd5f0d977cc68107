// The argument structs that host launchers and kernels share: one struct per kernel, passed by value. Sizes
// and strides are in elements, 64 bits wide.
#pragma once

#include <cstdint>
#include <string>

#include "../problem.h"

namespace lora_fused::cuda {

// How elements are stored and multiplied. fp32 is rounded to TF32, or multiplied without loss, as torch is
// set.
enum class Math : int { ieee = 0, bf16 = 1, f16 = 2, tf32 = 3 };
constexpr int kMaths = 4;

// The dropout mask of a [rows, row_length] matrix, as in ../dropout.h. The seed is read on the device where
// it lives there (no synchronisation), else it is `seed`. threshold 0 keeps everything, 65536 nothing.
struct Mask {
  const u64* seed_pointer = nullptr;
  u64 seed = 0;
  i64 row_length = 0;
  u32 threshold = 0;
};

// Partial sums of blocks that share an output tile, and the tickets by which the last of them knows itself.
// Tickets are zero before and after every kernel; `error` is where a bounded spin says why it trapped.
struct Workspace {
  float* partials = nullptr;
  u32* tickets = nullptr;
  u32* error = nullptr;
};

// s[m,r] = scale * sum_k keep(m,k) x[m,k] a[r,k]
struct ShrinkLaunch {
  i64 M, K, R;
  lora_fused::Matrix x, a;
  Mask mask;
  Output s;
  Workspace workspace;
  float scale;
  int splits;  // parts of K
};

// One of the two problems of a reduce: out[p,r] = sum_m keep(m,p) z[m,p] t[m,r]
struct Gradient {
  i64 P;
  lora_fused::Matrix z, t;
  Mask mask;
  Output out;  // strides of (p, r)
};

// da from x and ds, db from dy and s. count = 1: the second is not wanted.
struct ReduceLaunch {
  i64 M, R;
  Gradient gradients[2];
  Workspace workspace;
  int count;
  int splits;  // parts of M
};

// y[m,n] = sum_k x[m,k] w[n,k] + sum_r s[m,r] b[n,r] + bias[n]  and  s = scale * x a^T, for M <= 16
struct DecodeLaunch {
  i64 M, K, N, R;
  lora_fused::Matrix x, w, a, b;
  const void* bias;
  Output y, s;
  Workspace workspace;
  float scale;
  int splits;    // parts of K in the weight stream
  int s_splits;  // parts of K in s
};

inline std::string describe(const ShrinkLaunch& p) {
  return "M=" + std::to_string(p.M) + " K=" + std::to_string(p.K) + " R=" + std::to_string(p.R);
}

inline std::string describe(const ReduceLaunch& p) {
  std::string text = "M=" + std::to_string(p.M) + " R=" + std::to_string(p.R) + " columns";
  for (int i = 0; i < p.count; ++i) text += " " + std::to_string(p.gradients[i].P);
  return text;
}

inline std::string describe(const DecodeLaunch& p) {
  return "M=" + std::to_string(p.M) + " K=" + std::to_string(p.K) + " N=" + std::to_string(p.N) +
         " R=" + std::to_string(p.R);
}

}  // namespace lora_fused::cuda
