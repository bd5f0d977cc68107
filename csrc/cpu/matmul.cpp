// matmul with the rank folded into the contraction (forward and dx).
#include "operations.h"
#include "product.h"

namespace lora_fused::LORA_FUSED_ISA {

void matmul(DType dtype, const MatmulArgs& args) {
  Gemm gemm;
  gemm.M = args.M, gemm.N = args.N, gemm.K = args.K, gemm.R = args.R;
  gemm.a = args.x, gemm.b = args.w, gemm.s = args.s, gemm.l = args.l;
  gemm.drop_rank = args.dropout;
  gemm.packed = args.packed;
  gemm.bias = args.bias;
  gemm.accumulate = args.accumulate;
  gemm.y = args.y;
  run(dtype, gemm, args.threads);
}

}  // namespace lora_fused::LORA_FUSED_ISA
