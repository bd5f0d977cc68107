// reduce: the adapters' gradients, a contraction over the tokens. da[r,k] = sum_m ds[m,r] keep(m,k) x[m,k].
#include "keep.h"
#include "kernels.h"
#include "operations.h"
#include "product.h"
#include "scratch.h"

namespace lora_fused::LORA_FUSED_ISA {

void reduce(DType dtype, const ReduceArgs& args) {
  Gemm gemm;
  gemm.M = args.R, gemm.N = args.K, gemm.K = args.M;
  gemm.a = {args.ds.data, args.ds.col_stride, args.ds.row_stride};
  gemm.b = args.x;
  gemm.drop_b = args.dropout;
  gemm.y = args.da;
  gemm.over_tokens = true;
  run(dtype, gemm, args.threads);
}

void keep_mask(const Dropout& dropout, i64 rows, unsigned char* mask) {
  const i64 cols = dropout.row_length;
  u32* bits = static_cast<u32*>(scratch(Slot::keep, static_cast<std::size_t>(keep_words(cols)) * 4));
  for (i64 row = 0; row < rows; ++row) {
    keep_row(dropout, row, 0, cols, bits);
    for (i64 c = 0; c < cols; ++c) mask[row * cols + c] = (bits[c / 32] >> (c % 32)) & 1;
  }
}

const Kernels kernels = {LORA_FUSED_ISA_NAME, matmul,   shrink, shrink_reduce, reduce, pack,
                         packed_bytes,        keep_mask};

}  // namespace lora_fused::LORA_FUSED_ISA
