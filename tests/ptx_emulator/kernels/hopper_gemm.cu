// y[M, N] = x[M, K] w[N, K]^T in bf16 for sm_90a: clusters of two blocks share the w tile by
// multicast; one producer warp feeds a ring of stages, one warpgroup multiplies and stores by TMA.
#include <cuda.h>
#include <cuda_bf16.h>

#include <cstdint>

constexpr int BLOCK_M = 64, BLOCK_N = 64, BLOCK_K = 64, STAGES = 3;
constexpr uint32_t X_BYTES = BLOCK_M * BLOCK_K * 2, W_BYTES = BLOCK_N * BLOCK_K * 2;

__device__ uint32_t address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
__device__ void wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra "
      "over;\nbra again;\nover:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
__device__ void arrive(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, "
      "%1;\nmbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
__device__ uint64_t descriptor(uint32_t at) {
  return (at & 0x3FFFF) >> 4 | uint64_t(1024 >> 4) << 32 | 1ull << 62;
}
__device__ void multiply(float (&d)[32], uint64_t a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%"
      "27,%28,%29,%30,%31}, "
      "%32, %33, p, 1, 1, 0, 0;\n}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
        "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]),
        "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]),
        "+f"(d[30]), "+f"(d[31])
      : "l"(a), "l"(b), "r"(accumulate));
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(256, 1)
    hopper_gemm(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap w,
                const __grid_constant__ CUtensorMap y, int K) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t stages = address(memory), bars = stages + STAGES * (X_BYTES + W_BYTES);
  const int thread = threadIdx.x, blocks = (K + BLOCK_K - 1) / BLOCK_K;
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  auto full = [&](int i) { return bars + 8 * i; };
  auto empty = [&](int i) { return bars + 8 * (STAGES + i); };
  if (thread == 0) {
    for (int i = 0; i < STAGES; i++) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full(i)));
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 2;" ::"r"(empty(i)));
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
  const int row0 = blockIdx.x * BLOCK_M, column0 = blockIdx.y * BLOCK_N;
  if (thread >= 128) {  // producer
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (thread == 128) {
      for (int k = 0; k < blocks; k++) {
        const int i = k % STAGES;
        const uint32_t x_tile = stages + i * (X_BYTES + W_BYTES), half = X_BYTES + rank * (W_BYTES / 2);
        wait(empty(i), (k / STAGES & 1) ^ 1);
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full(i)),
                     "r"(X_BYTES + W_BYTES)
                     : "memory");
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, "
            "%4}], [%2];" ::"r"(x_tile),
            "l"(&x), "r"(full(i)), "r"(k * BLOCK_K), "r"(row0)
            : "memory");
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
            "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(x_tile + half),
            "l"(&w), "r"(full(i)), "r"(k * BLOCK_K), "r"(column0 + int(rank) * BLOCK_N / 2), "h"((uint16_t)3)
            : "memory");
      }
    }
    __syncwarp();
  } else {  // the warpgroup that multiplies
    asm volatile("setmaxnreg.inc.sync.aligned.u32 200;");
    float sum[32];
    for (int k = 0; k < blocks; k++) {
      const int i = k % STAGES;
      const uint32_t x_tile = stages + i * (X_BYTES + W_BYTES), w_tile = x_tile + X_BYTES;
      wait(full(i), k / STAGES & 1);
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
      for (int step = 0; step < 4; step++)
        multiply(sum, descriptor(x_tile + step * 32), descriptor(w_tile + step * 32), k | step);
      asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
      if (thread < 2) arrive(empty(i), thread);
    }
    uint32_t packed[16];
    for (int i = 0; i < 16; i++) {
      __nv_bfloat162 two = __floats2bfloat162_rn(sum[2 * i], sum[2 * i + 1]);
      packed[i] = *(uint32_t*)&two;
    }
    asm volatile("bar.sync 1, 128;" ::: "memory");
    const int row = thread / 32 * 16 + thread % 16;  // 64 columns of bf16: rows of 128 bytes, swizzled
    for (int j = 0; j < 4; j++) {
      const uint32_t at = stages + row * 128 + (((j * 2 + thread % 32 / 16) ^ row % 8) << 4);
      asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at),
                   "r"(packed[4 * j]), "r"(packed[4 * j + 1]), "r"(packed[4 * j + 2]), "r"(packed[4 * j + 3])
                   : "memory");
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    asm volatile("bar.sync 1, 128;" ::: "memory");
    if (thread == 0) {
      asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&y),
                   "r"(stages), "r"(column0), "r"(row0)
                   : "memory");
      asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;" ::: "memory");
    }
    __syncwarp();
  }
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
