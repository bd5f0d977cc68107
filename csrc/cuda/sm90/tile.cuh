// Sizes of a block's work and where its parts lie in shared memory.
#pragma once

#include "arguments.h"
#include "wgmma.cuh"

namespace lora_fused::sm90 {

// dx_masked is dx with dropout: the rank-R part is masked before it is added.
enum class Direction { forward, dx, dx_masked };

// y tiles of 128 x BLOCK_N, two consumer warpgroups of 64 rows each; the contraction runs in blocks of 64.
template <typename T_, int BLOCK_N_, Direction kDirection_>
struct Tiling {
  using T = T_;
  static constexpr bool kForward = kDirection_ == Direction::forward;
  static constexpr bool kMasked = kDirection_ == Direction::dx_masked;
  // Whether it may sum up the gradients of the adapters too.
  static constexpr bool kReduces = kDirection_ == Direction::dx && BLOCK_N_ == 256;
  // w, a and b as they are stored: the contraction is their rows in dx, their columns in the forward pass.
  static constexpr bool kMnMajor = !kForward;

  static constexpr int BLOCK_M = 128, BLOCK_N = BLOCK_N_, BLOCK_K = 64;
  static constexpr int kConsumers = 2;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kAccumulators = BLOCK_N / 2;

  static constexpr int kXBytes = BLOCK_M * BLOCK_K * sizeof(T);
  static constexpr int kWBytes = BLOCK_N * BLOCK_K * sizeof(T);
  static constexpr int kStageBytes = kXBytes + kWBytes;
  static constexpr int kStages = 192 * 1024 / kStageBytes;

  // Each consumer warp stores 16 x 64 pieces of y from two buffers.
  static constexpr int kPieceBytes = 16 * kSwizzleRow;
  static constexpr int kStagingBytes = kConsumers * 4 * 2 * kPieceBytes;

  static constexpr int kSharedBytes = 1024 + kStages * kStageBytes + kStagingBytes + kStages * 32;

  static_assert(BLOCK_N == 128 || BLOCK_N == 256, "a warpgroup holds 64 x BLOCK_N accumulators");
  static_assert(kSharedBytes <= 232448, "what a block of sm_90 may have");
};

// Shared memory of a block; all addresses are in the shared window.
template <class G>
struct Shared {
  std::uint32_t base;

  LORA_FUSED_DEVICE std::uint32_t x(int stage) const { return base + stage * G::kStageBytes; }
  LORA_FUSED_DEVICE std::uint32_t w(int stage) const { return x(stage) + G::kXBytes; }
  LORA_FUSED_DEVICE std::uint32_t staging(int warp) const {
    return base + G::kStages * G::kStageBytes + warp * 2 * G::kPieceBytes;
  }
  // mbarriers: a stage's bytes have landed; nobody in the cluster reads a stage; a tile is announced.
  LORA_FUSED_DEVICE std::uint32_t full(int stage) const { return control() + 8 * stage; }
  LORA_FUSED_DEVICE std::uint32_t empty(int stage) const { return full(stage) + 8 * G::kStages; }
  LORA_FUSED_DEVICE std::uint32_t announced(int slot) const { return full(slot) + 16 * G::kStages; }
  LORA_FUSED_DEVICE std::uint32_t tile(int slot) const { return full(slot) + 24 * G::kStages; }

 private:
  LORA_FUSED_DEVICE std::uint32_t control() const { return staging(4 * G::kConsumers); }
};

// A position in a ring of kStages with the parity that its barriers wait for.
template <int kStages>
struct Ring {
  int index = 0;
  std::uint32_t parity = 0;

  LORA_FUSED_DEVICE void next() {
    if (++index == kStages) {
      index = 0;
      parity ^= 1;
    }
  }
};

LORA_FUSED_DEVICE void wait_barrier(std::uint32_t barrier, std::uint32_t parity) {
  while (!ptx::mbarrier_try_wait(barrier, parity)) {
  }
}

}  // namespace lora_fused::sm90
