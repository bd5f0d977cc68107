// y[m,n] = sum_k x[m,k] w[n,k] + sum_r s[m,r] b[n,r] + bias[n],   s = scale * x a^T,   for M <= 16 tokens
//   x [M,K], w [N,K], a [R,K], b [N,R], bias [N], y [M,N], s [M,R]
//
// mma.sync on sm_80 and later. The weights are streamed once, from global memory straight to registers: one
// block owns 16 rows of w x one part of K, its eight warps take turns along K. A lane reads 16 bytes of a
// row, and x in the same order, so that a permutation of K, the same for both, feeds whole mma steps without
// shared memory.
//
// s is computed once, in `items` = rank chunks x s_splits pieces that blocks take by ticket: the first blocks
// one each before their share of the weights, and every block what is left before it waits. So a block waits
// only for pieces that a running block has in hand, and no number of resident blocks can deadlock.
// blockIdx.x = (row tile of w) * splits + part.
//
// Workspace words, zero before and after: see Word. partials: s as [items][16][kRankChunk], then the parts of
// y. Layouts: any strides; x, w, a in rows of 16-byte pieces take vector loads, others are read element by
// element. Not handled: dropout, more than 16 tokens, R > 512.
#pragma once

#include "flags.cuh"
#include "fragments.cuh"

namespace lora_fused::cuda::decode_kernel {

constexpr int kThreads = 256, kWarps = kThreads / 32, kTokens = 16, kBlockN = 16, kRankChunk = 32,
              kMaxRank = 512;
constexpr int kLoads = 4;  // 16-byte loads of each of a lane's two rows that are under way
constexpr int kTileFloats = kTokens * kBlockN;

// The words of the workspace: pieces of s that are done and taken, row tiles that have read s, then one
// ticket for every row tile.
enum Word { kDone, kTaken, kReaders, kFirstTicket };

// One fragment of 16 rows x 4 lanes x 16 bytes: 64 bytes of a row, two mma steps.
template <typename T>
constexpr int kStepK = 4 * kChunkElements<T>;

// ---- operands ---------------------------------------------------------------------------------------------

// A matrix whose rows are read 16 bytes at a time by the lanes of a quad.
template <typename T>
struct Rows {
  const lora_fused::Matrix& matrix;
  i64 rows, columns;
  bool vector;

  LORA_FUSED_DEVICE Rows(const lora_fused::Matrix& m, i64 rows, i64 columns)
      : matrix(m), rows(rows), columns(columns), vector(has_vector_rows<T>(m)) {}

  // Elements [column, column + chunk) of a row; zero past the end.
  LORA_FUSED_DEVICE uint4 load(i64 row, i64 column) const {
    const i64 left = row < rows ? columns - column : 0;
    if (left <= 0) return {};
    if (vector && left >= kChunkElements<T>)
      return ptx::ld_global_once_128(static_cast<const Storage<T>*>(matrix.data) + row * matrix.row_stride +
                                     column);
    return gather_chunk<T>(matrix, row, column,
                           left < kChunkElements<T> ? static_cast<int>(left) : kChunkElements<T>);
  }
};

// c[16 tokens x 8 rows] += x w^T over 64 bytes of K. x0, x1: tokens g and g + 8 of this lane.
template <typename T>
LORA_FUSED_DEVICE void multiply(float (&c)[4], uint4 x0, uint4 x1, uint4 w) {
  const u32 first[4] = {x0.x, x1.x, x0.y, x1.y}, second[4] = {x0.z, x1.z, x0.w, x1.w};
  Operand<T>::mma(c, first, w.x, w.y);
  Operand<T>::mma(c, second, w.z, w.w);
}

// Sum the warps' accumulators [kWarps][kBlocks][32 lanes][4]: element i of the tile in fragment order.
template <int kBlocks>
LORA_FUSED_DEVICE void store_accumulators(float* shared, const float (&c)[kBlocks][4]) {
  float4* at = reinterpret_cast<float4*>(shared) + threadIdx.x / 32 * kBlocks * 32 + (threadIdx.x & 31);
#pragma unroll
  for (int j = 0; j < kBlocks; ++j) at[j * 32] = make_float4(c[j][0], c[j][1], c[j][2], c[j][3]);
}

template <int kBlocks>
LORA_FUSED_DEVICE float sum_of_warps(const float* shared, int element) {
  float total = 0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) total += shared[warp * kBlocks * 128 + element];
  return total;
}

// Words between the tokens of s in shared memory: odd, so that tokens lie in different banks.
LORA_FUSED_HOST_DEVICE int s_stride(i64 R) { return static_cast<int>(R) | 1; }

// Where element i of a tile in fragment order lies: token and column.
LORA_FUSED_DEVICE int token_of(int i) { return (i % 128 / 4 >> 2) + 8 * (i % 4 >> 1); }
LORA_FUSED_DEVICE int column_of(int i) { return i / 128 * 8 + (i % 128 / 4 & 3) * 2 + (i % 4 & 1); }

// ---- the phases -------------------------------------------------------------------------------------

// A block's row tile of w and part of K. NOTE: worked out again where it is needed: kept from the start it
// costs registers that the products of IEEE fp32 need.
struct Share {
  i64 tile;
  int part;

  explicit LORA_FUSED_DEVICE Share(const DecodeLaunch& p) {
    const u32 block = ptx::opaque(blockIdx.x), splits = p.splits;
    tile = block / splits, part = static_cast<int>(block % splits);
  }
  LORA_FUSED_DEVICE i64 first_row() const { return tile * kBlockN; }
};

// The next piece of s for this block; `items` or more: none is left.
LORA_FUSED_DEVICE int take_item(const DecodeLaunch& p) {
  __shared__ u32 taken;
  __syncthreads();
  if (threadIdx.x == 0) taken = ptx::atom_add_acq_rel(p.workspace.tickets + kTaken, 1);
  __syncthreads();
  return static_cast<int>(taken);
}

// One part of K of one chunk of ranks, to the workspace; then one more piece is done.
template <typename T>
LORA_FUSED_DEVICE void shrink_item(const DecodeLaunch& p, float* shared, int item) {
  constexpr int kBlocks = kRankChunk / 8;
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  const i64 rank0 = static_cast<i64>(item / p.s_splits) * kRankChunk;
  const int part = item % p.s_splits;
  const i64 steps = (p.K + kStepK<T> - 1) / kStepK<T>, end = steps * (part + 1) / p.s_splits;
  const Rows<T> x(p.x, p.M, p.K), a(p.a, p.R, p.K);
  float c[kBlocks][4] = {};
  for (i64 step = steps * part / p.s_splits + warp; step < end; step += kWarps) {
    const i64 k = step * kStepK<T> + (lane & 3) * kChunkElements<T>;
    const uint4 x0 = x.load(lane >> 2, k), x1 = x.load((lane >> 2) + 8, k);
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) multiply<T>(c[j], x0, x1, a.load(rank0 + j * 8 + (lane >> 2), k));
  }
  store_accumulators(shared, c);
  __syncthreads();
  for (int i = threadIdx.x; i < kTokens * kRankChunk; i += kThreads)
    p.workspace.partials[item * kTokens * kRankChunk + i] = sum_of_warps<kBlocks>(shared, i);
  __syncthreads();
  if (threadIdx.x == 0) ptx::red_add_release(p.workspace.tickets + kDone, 1);
}

// x w^T of this block's rows and part of K: the thread's element of the tile, in fragment order.
template <typename T>
LORA_FUSED_DEVICE float stream_weights(const DecodeLaunch& p, float* shared) {
  const Share share(p);
  const i64 n0 = share.first_row();
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, g = lane >> 2;
  const i64 steps = (p.K + kStepK<T> - 1) / kStepK<T>, end = steps * (share.part + 1) / p.splits;
  const Rows<T> x(p.x, p.M, p.K), w(p.w, p.N, p.K);
  float c[2][4] = {};
  for (i64 first = steps * share.part / p.splits + warp; first < end; first += kWarps * kLoads) {
    uint4 w0[kLoads], w1[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const i64 step = first + i * kWarps, k = step * kStepK<T> + (lane & 3) * kChunkElements<T>;
      w0[i] = step < end ? w.load(n0 + g, k) : uint4{};
      w1[i] = step < end ? w.load(n0 + 8 + g, k) : uint4{};
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const i64 step = first + i * kWarps, k = step * kStepK<T> + (lane & 3) * kChunkElements<T>;
      if (step >= end) break;
      const uint4 x0 = x.load(g, k), x1 = x.load(g + 8, k);
      multiply<T>(c[0], x0, x1, w0[i]);
      multiply<T>(c[1], x0, x1, w1[i]);
    }
  }
  store_accumulators(shared, c);
  __syncthreads();
  return sum_of_warps<2>(shared, threadIdx.x);
}

// The last block of a row tile: its element summed over the parts of K, in their order.
LORA_FUSED_DEVICE bool sum_parts(const DecodeLaunch& p, float& value, int items, const Share& share) {
  float* parts = p.workspace.partials + static_cast<i64>(items) * kTokens * kRankChunk +
                 share.tile * p.splits * kTileFloats;
  parts[share.part * kTileFloats + threadIdx.x] = value;
  __shared__ u32 arrived;
  __syncthreads();
  if (threadIdx.x == 0)
    arrived = ptx::atom_inc_acq_rel(p.workspace.tickets + kFirstTicket + share.tile, p.splits - 1);
  __syncthreads();
  if (arrived != static_cast<u32>(p.splits - 1)) return false;
  value = 0;
  for (int i = 0; i < p.splits; ++i) value += __ldcg(parts + i * kTileFloats + threadIdx.x);
  return true;
}

// s, scaled and rounded as the other kernels round it, to shared memory as [token][s_stride]; block 0 also
// stores it.
template <typename T>
LORA_FUSED_DEVICE void gather_s(const DecodeLaunch& p, float* shared, bool store) {
  const int chunks = static_cast<int>((p.R + kRankChunk - 1) / kRankChunk);
  for (int i = threadIdx.x; i < chunks * kTokens * kRankChunk; i += kThreads) {
    const int chunk = i / (kTokens * kRankChunk), element = i % (kTokens * kRankChunk);
    const int token = token_of(element), rank = chunk * kRankChunk + column_of(element);
    if (rank >= p.R) continue;
    float total = 0;
    for (int part = 0; part < p.s_splits; ++part)
      total += __ldcg(p.workspace.partials + (chunk * p.s_splits + part) * kTokens * kRankChunk + element);
    using N = Numeric<Storage<T>>;
    const auto rounded = N::from_float(total * p.scale);
    shared[token * s_stride(p.R) + rank] = N::to_float(rounded);
    if (store && token < p.M) static_cast<Storage<T>*>(p.s.data)[token * p.s.row_stride + rank] = rounded;
  }
}

// Compute what nobody has taken, then wait until all pieces of s are there. The last reader makes the words
// ready for the next launch.
template <typename T>
LORA_FUSED_DEVICE void finish_s(const DecodeLaunch& p, float* shared, int items) {
  u32* const words = p.workspace.tickets;
  __shared__ bool complete;
  if (threadIdx.x == 0) complete = ptx::ld_acquire(words + kDone) == static_cast<u32>(items);
  __syncthreads();
  if (!complete)
    for (int item = take_item(p); item < items; item = take_item(p)) shrink_item<T>(p, shared, item);
  if (threadIdx.x == 0) {
    wait_flag(words + kDone, static_cast<u32>(items), p.workspace.error);
    const u32 last = gridDim.x / p.splits - 1;
    if (ptx::atom_inc_acq_rel(words + kReaders, last) == last) {
      ptx::st_relaxed(words + kDone, 0);
      ptx::st_relaxed(words + kTaken, 0);
    }
  }
  __syncthreads();
}

// sum_r s[r] b[r] of one token and column. Eight sums side by side: shorter chains of roundings and of waits.
template <typename T>
LORA_FUSED_DEVICE float rank_term(const DecodeLaunch& p, const float* s, const Storage<T>* b) {
  constexpr int kSums = 8;
  float sums[kSums] = {};
  const i64 stride = p.b.col_stride;
  for (i64 r = 0; r < p.R; r += kSums) {
#pragma unroll
    for (int i = 0; i < kSums; ++i)
      if (r + i < p.R) sums[i] += s[r + i] * Numeric<Storage<T>>::to_float(b[(r + i) * stride]);
  }
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// ---- the kernel -------------------------------------------------------------------------------------------

template <typename T>
LORA_FUSED_DEVICE void run(const DecodeLaunch& p) {
  __shared__ __align__(16) float accumulators[kWarps * kRankChunk / 8 * 128];
  extern __shared__ __align__(16) float s[];  // [kTokens][s_stride]
  static_assert(kThreads == kTileFloats, "one thread finishes one element of the tile");
  ptx::griddepcontrol_wait();
  const int items = static_cast<int>((p.R + kRankChunk - 1) / kRankChunk) * p.s_splits;

  if (static_cast<int>(blockIdx.x) < items)
    if (const int item = take_item(p); item < items) shrink_item<T>(p, accumulators, item);
  __syncthreads();
  float value = stream_weights<T>(p, accumulators);
  const Share share(p);
  if (p.splits > 1 && !sum_parts(p, value, items, share)) return;

  if (items > 0) {
    finish_s<T>(p, accumulators, items);
    gather_s<T>(p, s, share.tile == 0);
    __syncthreads();
  }

  // Add the rank-R part and the bias, round once
  const int token = token_of(threadIdx.x);
  const i64 n = share.first_row() + column_of(threadIdx.x);
  if (token >= p.M || n >= p.N) return;
  using N = Numeric<Storage<T>>;
  const Storage<T>* b = static_cast<const Storage<T>*>(p.b.data) + n * p.b.row_stride;
  value += rank_term<T>(p, s + token * s_stride(p.R), b);
  if (p.bias) value += N::to_float(static_cast<const Storage<T>*>(p.bias)[n]);
  static_cast<Storage<T>*>(p.y.data)[token * p.y.row_stride + n] = N::from_float(value);
}

}  // namespace lora_fused::cuda::decode_kernel
