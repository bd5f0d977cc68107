#include "launcher.h"

#include <algorithm>
#include <climits>

#include "variants.h"

// The kernels' host sides; defined in matmul_<math>.cu.
#define LORA_FUSED_SM80_NAME(MATH, BM, BN, BK, LAYOUT) lora_matmul_sm80_##MATH##_##BM##x##BN##x##BK##_##LAYOUT
#define LORA_FUSED_SM80_DECLARE(MATH, T, BM, BN, BK, WM, WN, STAGES, BLOCKS, LAYOUT) \
  extern "C" void LORA_FUSED_SM80_NAME(MATH, BM, BN, BK, LAYOUT)(lora_fused::sm80::MatmulArgs);
LORA_FUSED_SM80_VARIANTS_BF16(LORA_FUSED_SM80_DECLARE, bf16, )
LORA_FUSED_SM80_VARIANTS_16BIT(LORA_FUSED_SM80_DECLARE, f16, )
LORA_FUSED_SM80_VARIANTS_32BIT(LORA_FUSED_SM80_DECLARE, tf32, )

namespace lora_fused::sm80 {
namespace {

using cuda::Math;
using cuda::refuse;
using cuda::tiles;

enum class Layout { k_major, mn_major, any };

struct Variant {
  Math math;
  int block_m, block_n, block_k, threads;
  Layout layout;
  std::size_t shared_bytes;
  cuda::Kernel kernel;
};

constexpr int size_of(Math math) { return math == Math::tf32 ? 4 : 2; }

#define LORA_FUSED_SM80_STRING(X) #X
#define LORA_FUSED_SM80_QUOTED(X) LORA_FUSED_SM80_STRING(X)
#define LORA_FUSED_SM80_ENTRY(MATH, T, BM, BN, BK, WM, WN, STAGES, BLOCKS, LAYOUT) \
  {Math::MATH,                                                                     \
   BM,                                                                             \
   BN,                                                                             \
   BK,                                                                             \
   32 * WM * WN,                                                                   \
   Layout::LAYOUT,                                                                 \
   std::size_t(STAGES) * (BM + BN) * BK * size_of(Math::MATH),                     \
   {LORA_FUSED_SM80_QUOTED(LORA_FUSED_SM80_NAME(MATH, BM, BN, BK, LAYOUT)),        \
    reinterpret_cast<const void*>(LORA_FUSED_SM80_NAME(MATH, BM, BN, BK, LAYOUT))}},

const Variant kVariants[] = {LORA_FUSED_SM80_VARIANTS_BF16(LORA_FUSED_SM80_ENTRY, bf16, )
                                 LORA_FUSED_SM80_VARIANTS_16BIT(LORA_FUSED_SM80_ENTRY, f16, )
                                     LORA_FUSED_SM80_VARIANTS_32BIT(LORA_FUSED_SM80_ENTRY, tf32, )};

const Variant& variant_of(Math math, const MatmulLaunch& p, Layout layout) {
  for (const Variant& v : kVariants) {
    if (v.math != math || v.layout != layout) continue;
    if (layout == Layout::any) return v;
    if (v.block_m == p.block_m && v.block_n == p.block_n && v.block_k == p.block_k) return v;
  }
  if (math == Math::ieee) refuse("dtype", static_cast<i64>(math), "bf16, fp16 or TF32");
  refuse("block_n", p.block_n, "a tile of sm80/variants.h");
}

// Chunks of 16 bytes: unit stride one way, the other a multiple of 16 bytes.
bool chunked(const void* data, i64 unit_stride, i64 other_stride, int size) {
  return unit_stride == 1 && other_stride * size % 16 == 0 &&
         reinterpret_cast<std::uintptr_t>(data) % 16 == 0;
}

bool chunked(const Matrix& m, Layout layout, int size) {
  return layout == Layout::mn_major ? chunked(m.data, m.row_stride, m.col_stride, size)
                                    : chunked(m.data, m.col_stride, m.row_stride, size);
}

// How all w lie; any if they do not agree, x is not read in chunks or a y is stored by columns.
Layout layout_of(const MatmulLaunch& p, int size) {
  const auto by_columns = [](const Layer& l) { return l.y.col_stride != 1; };
  if (!chunked(p.x, Layout::k_major, size) || std::any_of(p.layer, p.layer + p.layers, by_columns))
    return Layout::any;
  for (const Layout layout : {Layout::k_major, Layout::mn_major})
    if (std::all_of(p.layer, p.layer + p.layers, [&](const Layer& l) { return chunked(l.w, layout, size); }))
      return layout;
  return Layout::any;
}

void check(Math math, const MatmulLaunch& p) {
  const int size = size_of(math);
  const auto in_range = [](const char* what, i64 value, i64 least, i64 most) {
    if (value < least || value > most)
      refuse(what, value, std::to_string(least) + " to " + std::to_string(most));
  };
  constexpr i64 kMost = INT_MAX / 4;  // bytes of a row fit an int
  in_range("M", p.M, 0, kMost), in_range("depth", p.depth, 1, kMost),
      in_range("layers", p.layers, 1, kMaxMembers);
  for (int i = 0; i < p.layers; ++i) {
    const Layer& layer = p.layer[i];
    cuda::check_dtype("dtype of y", layer.y, math);
    in_range("columns", layer.columns, 1, kMost), in_range("R", layer.rank, 0, 512);
    if (layer.rank_begin % 8) refuse("rank_begin", layer.rank_begin, "a multiple of 8");
    if (layer.mask.threshold != p.layer[0].mask.threshold)
      refuse("threshold", layer.mask.threshold, "the same in all layers");
  }
  in_range("shrink_group", p.shrink_group, 1, kMaxShrinkGroup);
  cuda::check_dtype("dtype of s", p.s, math);
  if (!chunked(p.s.data, p.s.col_stride, p.s.row_stride, size))
    refuse("s row stride", p.s.row_stride, "rows that begin at multiples of 16 bytes");
}

// S tiles compute at most `width` ranks, and of one layer only where scales or masks differ.
void fill_chunks(MatmulArgs& args, const MatmulLaunch& p, int width) {
  const Layer* last = p.layer + p.layers - 1;
  bool alone = p.layer[0].mask.threshold > 0 && !p.mask_output;
  for (int i = 0; i < p.layers; ++i) alone |= p.layer[i].scale != p.layer[0].scale;
  for (int i = 0; i < (alone ? p.layers : 1); ++i) {
    const i64 begin = alone ? p.layer[i].rank_begin : 0;
    const i64 end = alone ? begin + p.layer[i].rank : last->rank_begin + last->rank;
    for (i64 r = begin; r < end; r += width) {
      if (args.chunks == kMaxChunks) refuse("ranks of all layers", end, "fewer");
      args.chunk_begin[args.chunks++] = static_cast<int>(r);
      args.chunk_begin[args.chunks] = static_cast<int>(std::min<i64>(end, r + width));
    }
  }
}

void fill_member(Member& member, const Layer& layer, Layout layout, int size) {
  member.w = layer.w, member.shrink = layer.shrink, member.expand = layer.expand;
  member.y = layer.y, member.bias = layer.bias;
  member.seed_pointer = layer.mask.seed_pointer, member.seed = layer.mask.seed;
  member.scale = layer.scale;
  member.N = static_cast<int>(layer.columns);
  member.rank = static_cast<int>(layer.rank), member.rank_begin = static_cast<int>(layer.rank_begin);
  member.expand_by_elements = !chunked(layer.expand, layout, size);
  member.y_by_elements = !chunked(layer.y.data, layer.y.col_stride, layer.y.row_stride, size);
}

MatmulArgs arguments(const Variant& v, const MatmulLaunch& p) {
  const int size = size_of(v.math);
  MatmulArgs args{};
  args.x = p.x, args.s = p.s;
  args.words = p.words, args.error = p.error;
  args.M = static_cast<int>(p.M), args.D = static_cast<int>(p.depth), args.members = p.layers;
  args.tiles_m = static_cast<int>(tiles(p.M, v.block_m)), args.group_m = 8;
  args.threshold = p.layer[0].mask.threshold, args.mask_output = p.mask_output;
  args.accumulate = p.accumulate;
  args.shrink_group = p.shrink_group;
  args.shrink_by_elements = p.layers > 1 && v.layout == Layout::mn_major;
  i64 columns = 0;
  for (int i = 0; i < p.layers; ++i) {
    fill_member(args.member[i], p.layer[i], v.layout, size);
    columns += tiles(p.layer[i].columns, v.block_n);
    args.member[i].tiles_end = static_cast<int>(columns);
    args.shrink_by_elements |= !chunked(p.layer[i].shrink, v.layout, size);
  }
  if (!p.s_given) fill_chunks(args, p, std::min(v.block_n, 128));
  const i64 work = i64(args.tiles_m) * (args.chunks + columns);
  if (work > INT_MAX / 2) refuse("tiles", work, "at most 2^30");
  return args;
}

}  // namespace

i64 words_of(i64 M, int block_m) { return kFlags + tiles(M, std::min(block_m, 64)); }

void launch_matmul(Math math, const MatmulLaunch& p, cudaStream_t stream, bool dependent) {
  check(math, p);
  if (p.M == 0) return;
  const Variant& v = variant_of(math, p, layout_of(p, size_of(math)));
  const MatmulArgs args = arguments(v, p);
  int device = 0;
  cuda::check(cudaGetDevice(&device), v.kernel.name, "", "current device");
  // NOTE: any number of blocks is safe: none waits for a tile that no running block has taken.
  const i64 resident = i64(cuda::device_properties(device).sms) *
                       cuda::resident_blocks_per_sm(v.kernel, v.threads, v.shared_bytes);
  const i64 work = i64(args.tiles_m) * (args.chunks + args.member[p.layers - 1].tiles_end);
  cuda::launch(v.kernel, dim3(cuda::grid_size(std::max<i64>(1, std::min(work, resident)))), dim3(v.threads),
               1, v.shared_bytes, stream, args, dependent);
}

}  // namespace lora_fused::sm80
