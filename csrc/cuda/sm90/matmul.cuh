// Matmul with the contraction extended by the rank, for sm_90a.
//
//   forward   y  [M, N] = x  [M, K] w [N, K]^T + s  [M, R] b [N, R]^T + bias     s  = scale (keep * x) a^T
//   dx        dx [M, K] = dy [M, N] w [N, K]   + keep * (ds [M, R] a [R, K])     ds = scale dy b
//
// In the code the names are those of the forward pass in both directions: dx has dy for x, ds for s, lora_B
// for a, lora_A for b. Weights and adapters are read as they are stored; in dx they are MN-major operands.
//
// One persistent launch. A block has a producer warpgroup, of which one thread issues tensor copies into a
// ring of stages, and two consumer warpgroups (producer.cuh, consumer.cuh, epilogue.cuh). Clusters of two
// blocks (or one) share the columns of their tiles: each loads a part of w and multicasts it. Tiles come from
// a ticket counter (scheduler.cuh): first the S tiles, which compute s for 128 rows and raise a flag, then
// the tiles of y, whose last stages carry s and b. Without S tiles s comes from another kernel (split).
//
// A dx launch of one layer can sum up the gradients of the adapters as well, by reduce tiles (gradient.cuh).
//
// Up to three layers that share x are one launch: their columns stand side by side (forward), their
// contractions one after the other (dx).
//
// Workspace: zero before the first launch; every launch leaves it zero. Launches that share one must not
// overlap. Not handled: rows that are not 16-byte aligned; M, N, K, R of zero; operands with a unit stride
// elsewhere.
#pragma once

#include "consumer.cuh"
#include "producer.cuh"

namespace lora_fused::sm90 {

constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

template <class G>
LORA_FUSED_DEVICE void matmul(const MatmulArgs& args) {
  extern __shared__ std::uint8_t memory[];
  const Shared<G> shared{(ptx::shared_address(memory) + 1023) & ~1023u};

  // Initialise the barriers
  if (threadIdx.x == 0) {
    for (int i = 0; i < G::kStages; ++i) {
      ptx::mbarrier_init(shared.full(i), 1);
      ptx::mbarrier_init(shared.empty(i), G::kConsumers * ptx::cluster_size());
      ptx::mbarrier_init(shared.announced(i), 1);
    }
    ptx::fence_mbarrier_init();
  }
  __syncwarp();
  ptx::cluster_arrive();
  ptx::cluster_wait();

  // Wait for the kernel before, whose results this one may read
  ptx::griddepcontrol_wait();

  if (threadIdx.x >= 128 * G::kConsumers) {
    ptx::setmaxnreg_dec<kProducerRegisters>();
    if (threadIdx.x / 32 == 4 * G::kConsumers) {
      if (threadIdx.x % 32 == 0) Producer<G>{args, shared}.run();
      __syncwarp();
      ptx::griddepcontrol_launch_dependents();
      if (args.shrink_members > 0) leave(args);
    }
  } else {
    ptx::setmaxnreg_inc<kConsumerRegisters>();
    Consumer<G>{args, shared}.run();
  }

  // Stay until no block of the cluster arrives here any more
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

}  // namespace lora_fused::sm90
