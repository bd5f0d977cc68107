// The kernels of matmul.cuh and their launcher.
#include <algorithm>
#include <climits>

#include "launcher.h"
#include "matmul.cuh"

// X(element type, its name, direction, columns of a tile)
#define LORA_FUSED_SM90_OF(X, T, math) \
  X(T, math, forward, 256)             \
  X(T, math, forward, 128)             \
  X(T, math, dx, 256)                  \
  X(T, math, dx, 128)                  \
  X(T, math, dx_masked, 256)           \
  X(T, math, dx_masked, 128)
#define LORA_FUSED_SM90_KERNELS(X)  \
  LORA_FUSED_SM90_OF(X, bf16, bf16) \
  LORA_FUSED_SM90_OF(X, fp16, f16)

#define LORA_FUSED_DEFINE(T, math, direction, block_n)                                                     \
  extern "C" __global__ void __launch_bounds__(384, 1) lora_matmul_sm90_##math##_##direction##_n##block_n( \
      const __grid_constant__ lora_fused::sm90::MatmulArgs args) {                                         \
    using namespace lora_fused;                                                                            \
    sm90::matmul<sm90::Tiling<T, block_n, sm90::Direction::direction>>(args);                              \
  }
LORA_FUSED_SM90_KERNELS(LORA_FUSED_DEFINE)

namespace lora_fused::sm90 {
namespace {

using cuda::Math;
using cuda::refuse;
using cuda::tiles;

struct Variant {
  Math math;
  Direction direction;
  int block_n, shared_bytes;
  cuda::Kernel kernel;
};

#define LORA_FUSED_ENTRY(T, math, direction, block_n)       \
  {Math::math,                                              \
   Direction::direction,                                    \
   block_n,                                                 \
   Tiling<T, block_n, Direction::direction>::kSharedBytes,  \
   {"lora_matmul_sm90_" #math "_" #direction "_n" #block_n, \
    reinterpret_cast<const void*>(lora_matmul_sm90_##math##_##direction##_n##block_n)}},
const Variant kVariants[] = {LORA_FUSED_SM90_KERNELS(LORA_FUSED_ENTRY)};

bool has_dropout(const MatmulLaunch& p) {
  return std::any_of(p.layer, p.layer + p.members, [](const Layer& l) { return l.mask.threshold != 0; });
}

const Variant& variant_of(Math math, const MatmulLaunch& p) {
  const bool masked = has_dropout(p);
  const Direction direction = !p.dx ? Direction::forward : masked ? Direction::dx_masked : Direction::dx;
  for (const Variant& v : kVariants)
    if (v.math == math && v.direction == direction && v.block_n == p.block_n) return v;
  if (p.block_n != 128 && p.block_n != 256) refuse("block_n", p.block_n, "128 or 256");
  refuse("dtype", static_cast<i64>(math), "1 (bf16) or 2 (fp16)");
}

// NOTE: not to INT_MAX: a tile's last row and column are counted beyond the matrix.
void check_size(const char* what, i64 size) {
  if (size < 1 || size > INT_MAX - 1023) refuse(what, size, "1 to 2^31 - 1024");
}

void check_gradients(const MatmulLaunch& p) {
  const bool served = p.dx && p.members == 1 && p.block_n == 256 && !has_dropout(p);
  if (!served || p.reduce_parts < 0)
    refuse("reduce_parts", p.reduce_parts, "0, but for the dx of one layer without dropout by tiles of 256");
  if (p.layer[0].rank > kMaxReduceRank)
    refuse("R", p.layer[0].rank, "at most " + std::to_string(kMaxReduceRank) + " where gradients are summed");
}

void check(Math math, const MatmulLaunch& p) {
  check_size("M", p.M);
  if (p.members < 1 || p.members > kMaxMembers) refuse("members", p.members, "1 to 3");
  if (p.cluster != 1 && p.cluster != 2) refuse("cluster", p.cluster, "1 or 2");
  const bool wide = p.shrink_blocks == p.block_n / 64 && (p.dx || !has_dropout(p));
  if (p.shrink_blocks != 1 && !wide)
    refuse("shrink_blocks", p.shrink_blocks, "1, or block_n / 64 without dropout");
  if (p.shrink_group < 1 || p.shrink_group > kMaxShrinkGroup)
    refuse("shrink_group", p.shrink_group, "1 to " + std::to_string(kMaxShrinkGroup));
  if (p.reduce_parts != 0) check_gradients(p);
  for (int i = 0; i < p.members; ++i) {
    const Layer& layer = p.layer[i];
    cuda::check_dtype("dtype of y", layer.y, math), cuda::check_dtype("dtype of s", layer.s, math);
    check_size("columns", layer.columns), check_size("depth", layer.depth), check_size("R", layer.rank);
    const i64 bias_offset = static_cast<i64>(reinterpret_cast<std::uintptr_t>(layer.bias) % 4);
    if (bias_offset != 0) refuse("bias", bias_offset, "an address that 4 divides");
    if (p.dx && layer.columns != p.layer[0].columns)
      refuse("columns", layer.columns, "as many as the first member's");
    if (!p.dx && layer.depth != p.layer[0].depth) refuse("depth", layer.depth, "that of the first member");
  }
}

// A matrix of 16-bit elements, rows of unit stride.
CUtensorMap map_of(const Variant& v, const char* name, const void* data, i64 rows, i64 columns,
                   i64 row_stride, i64 column_stride, unsigned box_rows) {
  if (column_stride != 1 && columns > 1) refuse(name, column_stride, "a column stride of 1");
  cuda::TensorMapRequest request;
  request.tensor = name;
  request.dtype = v.math == Math::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  request.data = data;
  request.size[0] = columns, request.size[1] = rows;
  request.stride_bytes[0] = rows == 1 ? tiles(2 * columns, 16) * 16 : 2 * row_stride;
  request.box[0] = 64, request.box[1] = box_rows;
  return cuda::encode_tensor_map(v.kernel.name, request);
}

// w, a and b are stored with the contraction along their rows (forward) or across them (dx).
CUtensorMap operand_map(const Variant& v, const char* name, const Matrix& m, i64 outer, i64 inner, bool dx) {
  return map_of(v, name, m.data, dx ? inner : outer, dx ? outer : inner, m.row_stride, m.col_stride, 64);
}

void fill_member(MatmulArgs& args, const Variant& v, const MatmulLaunch& p, int i) {
  const Layer& layer = p.layer[i];
  const auto output = [&](const char* name, const Output& m, i64 columns, unsigned box_rows) {
    return map_of(v, name, m.data, p.M, columns, m.row_stride, m.col_stride, box_rows);
  };
  if (p.dx || i == 0)
    args.x[i] = map_of(v, "x", layer.x.data, p.M, layer.depth, layer.x.row_stride, layer.x.col_stride, 128);
  args.w[i] = operand_map(v, "weight", layer.w, layer.columns, layer.depth, p.dx);
  args.b[i] = operand_map(v, p.dx ? "lora_A" : "lora_B", layer.b, layer.columns, layer.rank, p.dx);
  args.s[i] = output("s", layer.s, layer.rank, 128);
  if (!p.dx || i == 0) args.y[i] = output("y", layer.y, layer.columns, 16);
  if (layer.shrink_rank > 0) {
    args.a[i] = operand_map(v, p.dx ? "lora_B" : "lora_A", layer.a, layer.shrink_rank, layer.depth, p.dx);
    args.s_out[i] = output("s", layer.shrink_s, layer.shrink_rank, 16);
    args.shrink_members = i + 1;
    const int passes = static_cast<int>(tiles(layer.shrink_rank, 64 * p.shrink_blocks));
    args.shrink_passes = std::max(args.shrink_passes, passes);
  }
  Member& member = args.member[i];
  member.mask = layer.mask;
  member.bias = layer.bias;
  member.scale = layer.scale;
  member.shrink_rank = static_cast<u32>(layer.shrink_rank);
  member.rank = static_cast<u32>(layer.rank);
  member.depth_blocks = static_cast<int>(tiles(layer.depth, 64));
  member.columns = static_cast<int>(layer.columns);
  member.first_tile = args.column_tiles;
  if (!p.dx || i == 0) args.column_tiles += static_cast<int>(tiles(layer.columns, p.block_n));
}

// Blocks of 128 tokens of a part; and the parts that are not empty then.
i64 steps_of(i64 M, i64 parts) { return tiles(tiles(M, 128), std::max<i64>(1, parts)); }
i64 parts_of(i64 M, i64 parts) { return tiles(tiles(M, 128), steps_of(M, parts)); }

void fill_reductions(MatmulArgs& args, const Variant& v, const MatmulLaunch& p) {
  args.counters = kFlags + args.row_tiles * p.cluster;
  args.reduce_rank = static_cast<int>(p.layer[0].rank);
  args.reduce_steps = static_cast<int>(steps_of(p.M, p.reduce_parts));
  args.reduce_parts = static_cast<int>(parts_of(p.M, p.reduce_parts));
  args.partials = p.partials;
  int word = 0;
  for (int i = 0; i < 2; ++i) {
    const cuda::Gradient& g = p.gradient[i];
    if (g.P == 0) continue;
    check_size("columns", g.P);
    args.z[i] = map_of(v, i == 0 ? "x" : "dy", g.z.data, p.M, g.P, g.z.row_stride, g.z.col_stride, 128);
    args.t[i] =
        map_of(v, i == 0 ? "ds" : "s", g.t.data, p.M, p.layer[0].rank, g.t.row_stride, g.t.col_stride, 128);
    args.reduction[i].out = g.out;
    args.reduction[i].columns = static_cast<int>(g.P);
    args.reduction[i].tiles = static_cast<int>(tiles(g.P, 128 * p.cluster));
    args.reduction[i].first_word = word;
    word += static_cast<int>(tiles(g.P, 16));
    args.reduce_tiles += args.reduction[i].tiles * args.reduce_parts;
  }
  args.reduce_early = args.reduce_tiles / 2;
  const int mixed = args.reduce_early + args.row_tiles * args.column_tiles;
  args.reduce_every = mixed / std::max(1, args.reduce_early);
}

MatmulArgs arguments(const Variant& v, const MatmulLaunch& p) {
  MatmulArgs args;
  args.row_tiles = static_cast<int>(tiles(p.M, 128 * p.cluster));
  args.rows = static_cast<int>(p.M);
  args.members = p.members;
  args.shrink_blocks = p.shrink_blocks;
  args.shrink_group = p.shrink_group;
  args.words = p.words;
  args.error = p.error;
  for (int i = 0; i < p.members; ++i) fill_member(args, v, p, i);
  for (int i = p.members; i < kMaxMembers; ++i) args.member[i].first_tile = INT_MAX;
  if (p.reduce_parts > 0) fill_reductions(args, v, p);
  return args;
}

}  // namespace

i64 words_of(i64 M, int cluster, i64 gradient_columns) {
  return kFlags + tiles(M, 128 * cluster) * cluster + gradient_columns / 16;
}

i64 partials_of(i64 M, i64 R, i64 gradient_columns, int parts) {
  return gradient_columns * 8 * tiles(R, 8) * parts_of(M, parts);
}

void launch_matmul(Math math, const MatmulLaunch& p, cudaStream_t stream, bool dependent) {
  check(math, p);
  const Variant& v = variant_of(math, p);
  const MatmulArgs args = arguments(v, p);
  int device = 0;
  cuda::check(cudaGetDevice(&device), v.kernel.name, "", "current device");
  const i64 work = i64(args.row_tiles) * (i64(args.shrink_members) * args.shrink_passes + args.column_tiles) +
                   args.reduce_tiles;
  if (work > INT_MAX) refuse("tiles", work, "at most 2^31 - 1");
  // NOTE: one block fills an SM, and any number of clusters is safe: none waits for one that has not started.
  const i64 clusters = std::min<i64>(work, std::max(1, cuda::device_properties(device).sms / p.cluster));
  cuda::launch(v.kernel, dim3(unsigned(clusters * p.cluster)), dim3(384), unsigned(p.cluster), v.shared_bytes,
               stream, args, dependent);
}

}  // namespace lora_fused::sm90
