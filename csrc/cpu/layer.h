// A whole direction of one layer: the operations of kernels.h one after the other, in one call.
//
//   forward   s = scale (mask * x) a^T       y = x w^T + s b^T + bias
//   backward  ds = scale dy b                db = dy^T s
//             dx = dy w + mask * (ds a)      da = ds^T (mask * x)
//
// x [M,K], w [N,K], a [R,K], b [N,R], as they are stored. The results are those of the operations called
// apart, bit for bit.
#pragma once

#include "kernels.h"

namespace lora_fused {

// What the metadata of the tensors decides, once for many calls.
struct Layer {
  const Kernels* kernels;
  DType dtype;
  i64 M, N, K, R;
  DType da_dtype, db_dtype;
  int threads;
};

// s.data may be null: then nobody reads it afterwards.
struct LayerForward {
  Matrix x, w, a, b;
  const u32* packed;  // w in panels, or null
  const void* bias;   // [N] in the compute dtype, or null
  float scale;
  u64 seed;
  u32 threshold;  // of the dropout mask; 0: none
  void* s;
  void* y;
};

// A null output is not wanted, and what it alone reads may be null as well: db reads s, dx reads w and a,
// da reads x, dx and da read b. All outputs are contiguous.
struct LayerBackward {
  Matrix dy, x, w, a, b;
  const void* s;
  const u32* packed;
  float scale;
  u64 seed;
  u32 threshold;
  void *dx, *da, *db;
};

void forward(const Layer& layer, const LayerForward& call);
void backward(const Layer& layer, const LayerBackward& call);

}  // namespace lora_fused
