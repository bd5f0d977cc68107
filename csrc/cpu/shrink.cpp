// shrink: a tall matrix times a skinny one. x -> s forward; dy -> ds backward, with db in the same read of dy.
#include "operations.h"
#include "run.h"

namespace lora_fused::LORA_FUSED_ISA {

void shrink(DType dtype, const ShrinkArgs& args) {
  Gemm gemm;
  gemm.M = args.M, gemm.N = args.R, gemm.K = args.K;
  gemm.a = args.x;
  gemm.b = {args.a.data, args.a.col_stride, args.a.row_stride};
  gemm.drop_a = args.dropout;
  gemm.scale = args.scale;
  gemm.y = args.s;
  run(dtype, gemm, args.threads);
}

void shrink_reduce(DType dtype, const ShrinkReduceArgs& args) {
  if (args.ds.data) {
    ShrinkArgs shrink_args{args.M, args.N, args.R, args.dy, {args.b.data, args.b.col_stride, args.b.row_stride},
                           args.scale, {}, args.ds, args.threads};
    shrink(dtype, shrink_args);
  }
  if (args.db.data) {
    ReduceArgs reduce_args{args.M, args.N, args.R, args.s, args.dy, {},
                           {args.db.data, args.db.col_stride, args.db.row_stride, args.db.dtype}, args.threads};
    reduce(dtype, reduce_args);
  }
}

}  // namespace lora_fused::LORA_FUSED_ISA
