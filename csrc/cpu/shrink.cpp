// shrink: a tall matrix times a skinny one. x -> s forward; dy -> ds backward, with db in the same read of
// dy.
#include "operations.h"
#include "product.h"
#include "scratch.h"

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

namespace {

constexpr i64 kBlockBytes = i64{512} << 10;  // of dy: read for ds, still in the second-level cache for db
constexpr i64 kMinBlockTokens = 64;
constexpr i64 kMaxSumBytes = i64{4} << 20;  // of db's fp32 sums; larger ones would push dy out

Gemm ds_of(const ShrinkReduceArgs& args, i64 first, i64 count, const Matrix& dy, i64 element_bytes) {
  Gemm gemm;
  gemm.M = count, gemm.N = args.R, gemm.K = args.N;
  gemm.a = dy;
  gemm.b = args.b;
  gemm.scale = args.scale;
  gemm.y = args.ds;
  gemm.y.data = static_cast<char*>(args.ds.data) + first * args.ds.row_stride * element_bytes;
  return gemm;
}

// db is computed as its transpose [R, N].
Gemm db_of(const ShrinkReduceArgs& args, i64 count, const Matrix& dy, const Matrix& s) {
  Gemm gemm;
  gemm.M = args.R, gemm.N = args.N, gemm.K = count;
  gemm.a = {s.data, s.col_stride, s.row_stride};
  gemm.b = dy;
  gemm.over_tokens = true;
  gemm.y = {args.db.data, args.db.col_stride, args.db.row_stride, args.db.dtype};
  return gemm;
}

// Token block by token block: ds, then what the block adds to db. NOTE: the blocks depend on the shapes
// alone, and their sums are added in order, so threads do not change the result.
void shrink_reduce_blocks(DType dtype, const ShrinkReduceArgs& args, i64 block, i64 bytes) {
  const i64 pitch = round_up(args.N, kLanes);
  float* sums = static_cast<float*>(scratch(Slot::sums, static_cast<std::size_t>(args.R * pitch) * 4));
  u32* panels =
      static_cast<u32*>(scratch(Slot::skinny, static_cast<std::size_t>(packed_bytes(dtype, args.N, args.R))));
  pack(dtype, {args.N, args.R, args.b, panels, args.threads});
  for (i64 first = 0; first < args.M; first += block) {
    const i64 count = min(block, args.M - first);
    const auto rows_from = [&](const Matrix& m) {
      return Matrix{static_cast<const char*>(m.data) + first * m.row_stride * bytes, m.row_stride,
                    m.col_stride};
    };
    const Matrix dy = rows_from(args.dy);
    Gemm ds = ds_of(args, first, count, dy, bytes);
    ds.packed = panels;
    run(dtype, ds, args.threads);
    Gemm db = db_of(args, count, dy, rows_from(args.s));
    db.y = {sums, pitch, 1, DType::f32};
    db.accumulate = first > 0;
    run(dtype, db, args.threads);
  }
  Gemm rounded;
  rounded.y = {args.db.data, args.db.col_stride, args.db.row_stride, args.db.dtype};
  write_sums(rounded, args.R, args.N, sums, pitch);
}

}  // namespace

void shrink_reduce(DType dtype, const ShrinkReduceArgs& args) {
  const i64 bytes = dtype == DType::f32 ? 4 : 2;
  const i64 block = max(kMinBlockTokens, kBlockBytes / max(1, args.N * bytes));
  const bool both = args.ds.data && args.db.data;
  if (both && args.M > block && args.R * args.N * 4 <= kMaxSumBytes)
    return shrink_reduce_blocks(dtype, args, block, bytes);
  if (args.ds.data) run(dtype, ds_of(args, 0, args.M, args.dy, 0), args.threads);
  if (args.db.data) run(dtype, db_of(args, args.M, args.dy, args.s), args.threads);
}

}  // namespace lora_fused::LORA_FUSED_ISA
