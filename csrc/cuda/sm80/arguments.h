// What sm80/matmul is asked to do: shared by the device code and its launcher. Strides count elements.
//
// Every matrix is seen as [its free index, the index that is summed over], for both directions:
//
//             x [M, D]   w [N, D]       shrink [R, D]   s [M, R]   expand [N, R]
//   forward   x [M, K]   weight [N, K]  lora_A [R, K]   s          lora_B [N, R]
//   dx        dy [M, N]  weightᵀ [K, N] lora_Bᵀ [R, N]  ds         lora_Aᵀ [K, R]
//
// so that dx is the same problem with other strides: nothing is copied or transposed.
#pragma once

#include "../../problem.h"

namespace lora_fused::sm80 {

constexpr int kMaxMembers = 3;  // projections of one input in a launch: q/k/v, gate/up
constexpr int kMaxChunks = 24;  // pieces of the stacked rank that an S tile computes
constexpr int kTicket = 0, kLeft = 1, kError = 2,
              kFlags = 4;  // words of the workspace; flags: one per row of tiles

// One projection. Its s is columns [rank_begin, rank_begin + rank) of the stacked s; rank_begin % 8 == 0.
struct Member {
  Matrix w, shrink, expand;
  const void* bias;         // [N] in the compute dtype, or null
  Output y;                 // [M, N] in the compute dtype
  const u64* seed_pointer;  // of the dropout mask, on the device, or null: the seed is `seed`
  u64 seed;
  int N, rank, rank_begin;
  int tiles_end;           // tiles of N of this and all earlier members
  int expand_by_elements;  // expand's rows cannot be read 16 bytes at a time
  int y_by_elements;       // likewise y's
};

// y = x wᵀ + s expandᵀ + bias,  s = scale · (mask ⊙ x) shrinkᵀ              mask_output = 0
// y = x wᵀ + mask ⊙ (s expandᵀ),  s = scale · x shrinkᵀ                     mask_output = 1
struct MatmulLaunch {
  Matrix x;
  Output s;
  Member member[kMaxMembers];
  float scale;
  int M, D;
  int members;
  int tiles_m, group_m;             // tiles are walked in bands of group_m rows of tiles
  int chunks;                       // per row of tiles; 0: s is given, not computed
  int chunk_begin[kMaxChunks + 1];  // chunk c computes stacked ranks [chunk_begin[c], chunk_begin[c + 1])
  int shrink_by_elements;
  u32 threshold;    // dropout; 0: none
  int mask_output;  // the mask is over y (dx), not over x (forward)
  u32* workspace;   // kFlags + tiles_m words, zero before the first launch and after each
};

}  // namespace lora_fused::sm80
