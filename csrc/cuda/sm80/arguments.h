// What sm80/matmul is asked to do: MatmulLaunch by the caller of its launcher, MatmulArgs by the launcher of
// the kernel. Strides count elements. Every matrix is seen as [its free index, the index that is summed
// over], for both directions:
//
//             x [M, D]   w [N, D]       shrink [R, D]  s [M, R]  expand [N, R]
//   forward   x [M, K]   weight [N, K]  lora_A [R, K]  s         lora_B [N, R]
//   dx        dy [M, N]  weightᵀ [K, N] lora_Bᵀ [R, N] ds        lora_Aᵀ [K, R]
//
// so that dx is the same problem with other strides: nothing is copied or transposed.
#pragma once

#include <string>

#include "../arguments.h"

namespace lora_fused::sm80 {

constexpr int kMaxMembers = 3;       // projections of one input in a launch: q/k/v, gate/up
constexpr int kMaxChunks = 24;       // pieces of the stacked rank that S tiles compute
constexpr int kMaxShrinkGroup = 16;  // S tiles of a ticket

// Words of the workspace; behind them a flag for every row of tiles.
constexpr int kTicket = 0, kLeft = 1, kFlags = 2;

// One projection. Its s is columns [rank_begin, rank_begin + rank) of the stacked s; rank_begin % 8 == 0.
struct Layer {
  Matrix w, shrink, expand;  // shrink may be empty where s is given
  Output y;                  // [M, columns] in the compute dtype
  const void* bias = nullptr;
  cuda::Mask mask;  // over x, or over y
  i64 columns = 0, rank = 0, rank_begin = 0;
  float scale = 0;
};

// y = x wᵀ + s expandᵀ + bias,  s = scale · (mask ⊙ x) shrinkᵀ              mask_output = false
// y = x wᵀ + mask ⊙ (s expandᵀ),  s = scale · x shrinkᵀ                     mask_output = true
struct MatmulLaunch {
  i64 M = 0, depth = 0;
  Matrix x;
  Output s;  // of all layers side by side; rows begin at multiples of 16 bytes
  Layer layer[kMaxMembers];
  int layers = 1;
  bool s_given = false;  // s is read, not computed (split)
  bool mask_output = false;
  bool accumulate = false;  // y += instead of y =; the sum is rounded once more
  int block_m = 0, block_n = 0, block_k = 0;
  int shrink_group = 1;  // S tiles of a ticket
  u32* words = nullptr;  // words_of(launch), zero before the first launch and after each
  u32* error = nullptr;
};

struct Member {
  Matrix w, shrink, expand;
  Output y;
  const void* bias;
  const u64* seed_pointer;  // of the dropout mask, on the device, or null: the seed is `seed`
  u64 seed;
  float scale;
  int N, rank, rank_begin;
  int tiles_end;           // tiles of N of this and all earlier members
  int expand_by_elements;  // expand's rows cannot be read 16 bytes at a time
  int y_by_elements;       // y's rows cannot be written so
};

struct MatmulArgs {
  Matrix x;
  Output s;
  Member member[kMaxMembers];
  u32* words;
  u32* error;
  int M, D;
  int members;
  int tiles_m, group_m;  // tiles are walked in bands of group_m rows of tiles
  int chunks;            // of stacked ranks, per row of tiles; 0: s is given
  int chunk_begin[kMaxChunks +
                  1];  // chunk c computes ranks [chunk_begin[c], chunk_begin[c + 1]) of one scale and mask
  int shrink_by_elements;
  u32 threshold;  // of all masks; 0: none
  int mask_output, accumulate;
  int shrink_group;
};

inline std::string describe(const MatmulArgs& args) {
  std::string text = "M=" + std::to_string(args.M) + " depth=" + std::to_string(args.D);
  for (int i = 0; i < args.members; ++i)
    text += " columns=" + std::to_string(args.member[i].N) + " R=" + std::to_string(args.member[i].rank);
  return text;
}

}  // namespace lora_fused::sm80
