// What sm90/matmul is asked to do: MatmulLaunch by the caller of its launcher, MatmulArgs by the launcher of
// the kernel. The names are those of the forward pass in both directions:
//
//             x            w       a (shrink)    s           b (expand)    y
//   forward   x [M, K]     [N, K]  lora_A [R, K] s  [M, R]   lora_B [N, R] y  [M, N]     columns N, depth K
//   dx        dy [M, N]    [N, K]  lora_B [N, R] ds [M, R]   lora_A [R, K] dx [M, K]     columns K, depth N
#pragma once

#include <cuda.h>

#include "../arguments.h"

namespace lora_fused::sm90 {

constexpr int kMaxMembers = 3;       // layers in a launch: q/k/v, gate/up
constexpr int kMaxShrinkGroup = 16;  // S tiles of a ticket

constexpr int kMaxReduceRank = 64;  // of the gradients that a launch can sum up

// Words of the workspace; behind them a flag for every 128 rows, and then for every 16 columns of a gradient
// how many of its parts are there.
constexpr int kTicket = 0, kLeft = 1, kFlags = 2;

struct Layer {
  Matrix x, w, a, b;           // as they are stored, unit column strides; w, a and b as in the table above
  Output s, y;                 // s is read where there are S tiles, else given
  const void* bias = nullptr;  // [columns] or null; forward
  cuda::Mask mask;             // of x in the forward pass, of the rank-R part in dx
  i64 columns = 0, depth = 0, rank = 0;
  float scale = 0;  // of the s that its S tiles compute
  // What this layer's S tiles compute: shrink_rank columns from shrink_s.data on. Layers that share x may
  // have it all done by the first, with their adapters stacked in its `a`; 0: no S tiles.
  Output shrink_s;
  i64 shrink_rank = 0;
};

// Members of a forward launch share x, those of a dx launch y (that of the first is written).
//
// A dx launch of one layer without dropout, with block_n = 256 and R <= kMaxReduceRank, may also sum up both
// gradients of the adapters: the first from x and the ds of this launch, the second from dy and a given s.
struct MatmulLaunch {
  i64 M = 0;
  bool dx = false;
  int members = 1;
  Layer layer[kMaxMembers];
  u32* words = nullptr;  // words_of(launch), zero before the first launch and after each
  u32* error = nullptr;
  int block_n = 256;      // 128 or 256
  int cluster = 2;        // blocks that share their columns: 1 or 2
  int shrink_blocks = 1;  // S tiles of 64 times as many columns: 1, or block_n / 64 without dropout
  int shrink_group = 1;   // S tiles of a ticket
  int reduce_parts = 0;   // parts of the tokens that the gradients are summed in; 0: no gradients
  cuda::Gradient gradient[2];
  float* partials = nullptr;  // partials_of(launch) floats
};

struct Member {
  cuda::Mask mask;
  const void* bias = nullptr;
  u32 shrink_rank = 0;   // columns of s that this member's S tiles make
  u32 rank = 0;          // R: by how much b extends the contraction
  int depth_blocks = 0;  // blocks of 64 of the contraction over x
  int columns = 0;       // of y
  int first_tile = 0;    // forward: the column tile at which this member begins; INT_MAX: no such member
  float scale = 0;       // of s and of the S tiles
};

// out[p, r] = sum_m z[m, p] t[m, r], by reduce tiles: of a part of the tokens and 128 columns p a block.
struct Reduction {
  Output out;
  int columns = 0;     // P
  int tiles = 0;       // of a cluster, along P
  int first_word = 0;  // of its counters, and of its 16 columns in the partial sums
};

// Boxes of rows x columns: z, t, x and s 128 x 64, w, a and b 64 x 64, y and s_out 16 x 64; 128-byte swizzle.
struct MatmulArgs {
  CUtensorMap x[kMaxMembers], w[kMaxMembers], a[kMaxMembers], s[kMaxMembers];
  CUtensorMap b[kMaxMembers], y[kMaxMembers], s_out[kMaxMembers];
  CUtensorMap z[2], t[2];
  Member member[kMaxMembers];
  Reduction reduction[2];
  float* partials = nullptr;
  u32* words = nullptr;
  u32* error = nullptr;
  int rows = 0;  // M
  int members = 1;
  int shrink_members = 0;  // members with S tiles; 0: s is given (split)
  int shrink_passes = 1;   // S tiles by which a member's columns of s are covered
  int shrink_blocks = 1;
  int row_tiles = 0;     // of cluster x 128 rows
  int column_tiles = 0;  // of all members together
  int shrink_group = 1;  // S tiles of a ticket
  int reduce_parts = 0;  // of the tokens; 0: no reduce tiles
  int reduce_steps = 0;  // blocks of 128 tokens of a part
  int reduce_early = 0;  // reduce tiles that come between those of y; the others come last
  int reduce_every = 1;  // each so many places one
  int reduce_tiles = 0;  // of a cluster, in all
  int reduce_rank = 0;
  int counters = 0;  // where in `words` the first counter is
};

// What the error's sentence says about the problem.
inline std::string describe(const MatmulArgs& args) {
  std::string text = "M=" + std::to_string(args.rows);
  for (int i = 0; i < args.members; ++i) {
    const Member& m = args.member[i];
    text += " columns=" + std::to_string(m.columns) + " depth<=" + std::to_string(64 * m.depth_blocks) +
            " R=" + std::to_string(m.rank);
  }
  return text;
}

}  // namespace lora_fused::sm90
