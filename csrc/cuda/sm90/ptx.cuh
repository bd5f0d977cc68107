// One PTX instruction per function for sm_90a: clusters, mbarriers, tensor copies, register budgets.
// The matrix instruction itself is in wgmma.cuh. Names follow the PTX ISA; addresses are 32-bit addresses in
// the shared window, of this block unless the name says cluster.
#pragma once

#include <cuda.h>

#include "../ptx.cuh"

namespace lora_fused::ptx {

// ---- clusters -------------------------------------------------------------------------------------------

LORA_FUSED_DEVICE std::uint32_t cluster_rank() {
  std::uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

LORA_FUSED_DEVICE std::uint32_t cluster_size() {
  std::uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

LORA_FUSED_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.aligned;" ::: "memory"); }

LORA_FUSED_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }

// The address of the same place in the block of that rank.
LORA_FUSED_DEVICE std::uint32_t map_to_rank(std::uint32_t shared, std::uint32_t rank) {
  std::uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared), "r"(rank));
  return there;
}

LORA_FUSED_DEVICE void st_cluster_64(std::uint32_t cluster, std::uint32_t v0, std::uint32_t v1) {
  asm volatile("st.shared::cluster.v2.u32 [%0], {%1, %2};" ::"r"(cluster), "r"(v0), "r"(v1) : "memory");
}

LORA_FUSED_DEVICE uint2 ld_shared_64(std::uint32_t shared) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(shared) : "memory");
  return v;
}

// ---- mbarriers ------------------------------------------------------------------------------------------

LORA_FUSED_DEVICE void mbarrier_init(std::uint32_t barrier, std::uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Makes initialised barriers known to the cluster and to the copy engine.
LORA_FUSED_DEVICE void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

LORA_FUSED_DEVICE void mbarrier_arrive_expect_tx(std::uint32_t barrier, std::uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

LORA_FUSED_DEVICE void mbarrier_arrive(std::uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

LORA_FUSED_DEVICE void mbarrier_arrive_cluster(std::uint32_t cluster) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(cluster) : "memory");
}

// Whether the phase of that parity is complete; may wait a while before it says no.
LORA_FUSED_DEVICE bool mbarrier_try_wait(std::uint32_t barrier, std::uint32_t parity) {
  std::uint32_t done;
  asm volatile(
      "{\n.reg .pred done;\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}

// ---- tensor copies --------------------------------------------------------------------------------------

// A box of a matrix from (row, column); its bytes complete transactions of `barrier`.
LORA_FUSED_DEVICE void tensor_load(std::uint32_t shared, const CUtensorMap* map, std::uint32_t barrier,
                                   int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
      "[%2];" ::"r"(shared),
      "l"(map), "r"(barrier), "r"(column), "r"(row)
      : "memory");
}

// The same into every block of the cluster whose bit is set: same place, each block's own barrier.
LORA_FUSED_DEVICE void tensor_load_multicast(std::uint32_t shared, const CUtensorMap* map,
                                             std::uint32_t barrier, int column, int row,
                                             std::uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%3, %4}], [%2], %5;" ::"r"(shared),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "h"(blocks)
      : "memory");
}

LORA_FUSED_DEVICE void tensor_store(const CUtensorMap* map, std::uint32_t shared, int column, int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
               "r"(shared), "r"(column), "r"(row)
               : "memory");
}

LORA_FUSED_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Wait until at most kPending of this thread's groups still have to read their source.
template <int kPending>
LORA_FUSED_DEVICE void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

LORA_FUSED_DEVICE void bulk_wait_all() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Ordinary accesses before it come before copies by the engine after it, and the other way round.
LORA_FUSED_DEVICE void fence_proxy_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

LORA_FUSED_DEVICE void fence_proxy_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// ---- warpgroups -----------------------------------------------------------------------------------------

template <int kRegisters>
LORA_FUSED_DEVICE void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
LORA_FUSED_DEVICE void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Barrier `id` among `threads` threads; 0 is __syncthreads.
LORA_FUSED_DEVICE void bar_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Four 8 x 8 tiles of 16-bit elements; lane 8 i + j gives the address of row j of tile i.
LORA_FUSED_DEVICE void stmatrix_x4(std::uint32_t shared, std::uint32_t r0, std::uint32_t r1, std::uint32_t r2,
                                   std::uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(r0),
               "r"(r1), "r"(r2), "r"(r3)
               : "memory");
}

LORA_FUSED_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

LORA_FUSED_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
LORA_FUSED_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

}  // namespace lora_fused::ptx
