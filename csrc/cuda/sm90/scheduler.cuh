// Which tile a cluster computes next: tickets from a counter in global memory, so that fast clusters take
// more.
//
// S tiles have the first tickets, shrink_group of them each: an S tile is a part of a tile of y, and a few on
// one cluster delay the last round less than one on each of many. A block that waits for s waits for tiles
// whose clusters have started and wait for nothing themselves, however few clusters are resident. Every
// cluster takes one ticket more than there are tickets for it; the counter wraps to zero with the last of
// these. Reduce tiles (gradient.cuh) come between the tiles of y, a few at a time, so that their reads of
// memory hide behind the tensor cores; the last half fills the clusters that the last round leaves idle.
#pragma once

#include "tile.cuh"

namespace lora_fused::sm90 {

// Row tile (of the cluster) and column tile; column < 0: the S tile number -1 - column; column >=
// args.column_tiles: a reduce tile of the tokens' part `row`. row < 0: no more work.
struct Tile {
  int row, column;
};

// Column tiles are visited for 8 row tiles at a time: together these share what they read through L2.
constexpr int kRasterRows = 8;

// Reduce tiles in their order: the second gradient's, which need no S tile, before the first's.
LORA_FUSED_DEVICE Tile reduce_tile_of(const MatmulArgs& args, std::uint32_t number) {
  const std::uint32_t first = args.reduction[0].tiles, second = args.reduction[1].tiles;
  const std::uint32_t of_second = args.reduce_parts * second;
  if (number >= args.reduce_tiles) return {-1, 0};
  if (number < of_second) return {int(number / second), args.column_tiles + int(number % second)};
  number -= of_second;
  return {int(number / first), args.column_tiles + int(second + number % first)};
}

// The tile at a place of the list: all S tiles, row tile by row tile, then those of y and the reduce tiles.
template <class G>
LORA_FUSED_DEVICE Tile tile_of(const MatmulArgs& args, std::uint32_t place) {
  const std::uint32_t per_row = args.shrink_members * args.shrink_passes;
  if (place < args.row_tiles * per_row) return {int(place / per_row), -1 - int(place % per_row)};
  place -= args.row_tiles * per_row;
  if constexpr (G::kReduces) {
    const std::uint32_t early = args.reduce_early, every = args.reduce_every;
    const std::uint32_t mixed = early + std::uint32_t(args.row_tiles) * args.column_tiles;
    if (place >= mixed) return reduce_tile_of(args, early + place - mixed);
    const std::uint32_t before = min(place / every, early);
    if (before < early && place % every == every - 1) return reduce_tile_of(args, before);
    place -= before;
  }
  if (place >= std::uint32_t(args.row_tiles) * args.column_tiles) return {-1, 0};
  const std::uint32_t per_group = kRasterRows * args.column_tiles;
  const int group = place / per_group, inside = place % per_group;
  const int rows = min(kRasterRows, args.row_tiles - group * kRasterRows);
  return {group * kRasterRows + inside % rows, inside / rows};
}

// A cluster's share of the list: the places of one ticket after the other.
struct Share {
  std::uint32_t place, end;

  LORA_FUSED_DEVICE void next(const MatmulArgs& args, std::uint32_t clusters) {
    if (++place < end) return;
    const std::uint32_t group = args.shrink_group;
    const std::uint32_t shrink = args.row_tiles * args.shrink_members * args.shrink_passes;
    const std::uint32_t shrink_tickets = (shrink + group - 1) / group;
    const std::uint32_t tickets = shrink_tickets + args.row_tiles * args.column_tiles + args.reduce_tiles;
    const std::uint32_t ticket = ptx::atom_inc_acq_rel(args.words + kTicket, tickets + clusters - 1);
    if (ticket < shrink_tickets) {
      place = ticket * group;
      end = min(place + group, shrink);
    } else {
      place = ticket - shrink_tickets + shrink;
      end = place + 1;
    }
  }
};

// Tells every block of the cluster its next tile. NOTE: the slot is free: its last tile began at least
// kStages stages ago, and the caller has seen all of the cluster's consumers release the stage it now fills.
template <class G>
LORA_FUSED_DEVICE void announce(const Shared<G>& shared, int slot, Tile tile) {
  for (std::uint32_t rank = 0; rank < ptx::cluster_size(); ++rank) {
    ptx::st_cluster_64(ptx::map_to_rank(shared.tile(slot), rank), tile.row, tile.column);
    ptx::mbarrier_arrive_cluster(ptx::map_to_rank(shared.announced(slot), rank));
  }
}

template <class G>
LORA_FUSED_DEVICE Tile announced_tile(const Shared<G>& shared, int slot) {
  const uint2 words = ptx::ld_shared_64(shared.tile(slot));
  return {int(words.x), int(words.y)};
}

// The member of a group that owns a column tile of y.
LORA_FUSED_DEVICE int member_of(const MatmulArgs& args, int column) {
  return (column >= args.member[1].first_tile) + (column >= args.member[2].first_tile);
}

// Puts the flags back to zero once every block of the grid has read those it needed. One warp.
LORA_FUSED_DEVICE void leave(const MatmulArgs& args) {
  std::uint32_t before = 0;
  const int lane = threadIdx.x % 32;
  if (lane == 0) before = ptx::atom_inc_acq_rel(args.words + kLeft, gridDim.x - 1);
  before = __shfl_sync(0xffffffffu, before, 0);
  __syncwarp();  // what lane 0 acquired is known to all lanes
  if (before != gridDim.x - 1) return;
  const int flags = args.row_tiles * ptx::cluster_size();
  for (int i = lane; i < flags; i += 32) {
    ptx::st_relaxed(args.words + kFlags + i, 0);
  }
}

}  // namespace lora_fused::sm90
