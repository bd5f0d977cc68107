// shrink: a tall matrix times a skinny one. x -> s forward; dy -> ds backward, with db in the same read of
// dy.
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

namespace {

constexpr i64 kBlockBytes = i64{512} << 10;  // of dy: read for ds, still in the second-level cache for db
constexpr i64 kMaxSumBytes = i64{4} << 20;   // of db's fp32 sums; larger ones would push dy out

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
  gemm.block_words = kTokenBlockWords;
  gemm.y = {args.db.data, args.db.col_stride, args.db.row_stride, args.db.dtype};
  return gemm;
}

template <class T>
void round_sums(const ShrinkReduceArgs& args, const float* sums) {
  Gemm gemm;
  gemm.y = {args.db.data, args.db.col_stride, args.db.row_stride, args.db.dtype};
  for (i64 r = 0; r < args.R; r += kLanes)
    write_output<T>(gemm, r, min(kLanes, args.R - r), 0, args.N, sums + r * round_up(args.N, kLanes),
                    round_up(args.N, kLanes));
}

// Token block by token block: ds, then what the block adds to db. NOTE: the blocks depend on the shapes
// alone, and their sums are added in order, so threads do not change the result.
template <class Engine, class T>
void shrink_reduce_blocks(DType dtype, const ShrinkReduceArgs& args, i64 block) {
  const i64 pitch = round_up(args.N, kLanes), bytes = static_cast<i64>(sizeof(T));
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
    run_on<Engine, T>(ds, args.threads);
    Gemm db = db_of(args, count, dy, rows_from(args.s));
    db.y = {sums, pitch, 1, DType::f32};
    db.accumulate = first > 0;
    run_on<Engine, T>(db, args.threads);
  }
  round_sums<T>(args, sums);
}

}  // namespace

void shrink_reduce(DType dtype, const ShrinkReduceArgs& args) {
  const i64 block = max(kMinBlockTokens, kBlockBytes / max(1, args.N * (dtype == DType::f32 ? 4 : 2)));
  const bool both = args.ds.data && args.db.data;
  if (both && args.M > block && args.R * args.N * 4 <= kMaxSumBytes)
    return with_engine(dtype,
                       [&]<class Engine, class T>() { shrink_reduce_blocks<Engine, T>(dtype, args, block); });
  if (args.ds.data) run(dtype, ds_of(args, 0, args.M, args.dy, 0), args.threads);
  if (args.db.data) run(dtype, db_of(args, args.M, args.dy, args.s), args.threads);
}

}  // namespace lora_fused::LORA_FUSED_ISA
