// y[M, N] = x[M, K] w[N, K]^T in bf16: mma.sync with a three-stage cp.async pipeline.
// One block of four warps owns a 64 x 64 tile; rows and columns past the end are zero-filled.
#include <cuda_bf16.h>

#include <cstdint>

constexpr int BLOCK = 64, BLOCK_K = 32, STAGES = 3, ROW = BLOCK_K * 2, TILE = BLOCK * ROW;

__device__ uint32_t swizzled(int row, int chunk) { return row * ROW + ((chunk ^ (row >> 1 & 3)) << 4); }

__device__ void copy16(uint32_t to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0));
}
__device__ void load_matrices(uint32_t (&r)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at));
}
__device__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ void load_tile(uint32_t to, const __nv_bfloat16* from, int rows, int row0, int k0, int K) {
  for (int i = threadIdx.x; i < BLOCK * 4; i += 128) {
    int row = i / 4, chunk = i % 4;
    bool inside = row0 + row < rows && k0 + chunk * 8 < K;
    copy16(to + swizzled(row, chunk), inside ? from + size_t(row0 + row) * K + k0 + chunk * 8 : from, inside);
  }
}

extern "C" __global__ void __launch_bounds__(128)
    tile_gemm(const __nv_bfloat16* x, const __nv_bfloat16* w, __nv_bfloat16* y, int M, int N, int K) {
  __shared__ __align__(128) uint8_t tiles[STAGES][2][TILE];
  uint32_t base = (uint32_t)__cvta_generic_to_shared(tiles);
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int row0 = blockIdx.x * BLOCK, column0 = blockIdx.y * BLOCK, blocks = (K + BLOCK_K - 1) / BLOCK_K;
  float sum[8][4] = {};
  auto fetch = [&](int k) {
    if (k < blocks) {
      load_tile(base + k % STAGES * 2 * TILE, x, M, row0, k * BLOCK_K, K);
      load_tile(base + (k % STAGES * 2 + 1) * TILE, w, N, column0, k * BLOCK_K, K);
    }
    asm volatile("cp.async.commit_group;");
  };
  fetch(0);
  fetch(1);
  for (int k = 0; k < blocks; k++) {
    asm volatile("cp.async.wait_group 1;");
    __syncthreads();
    fetch(k + 2);
    uint32_t a_tile = base + k % STAGES * 2 * TILE, b_tile = a_tile + TILE;
    for (int step = 0; step < 2; step++) {
      uint32_t a[4], b[4];
      load_matrices(a, a_tile + swizzled(warp * 16 + lane % 16, step * 2 + lane / 16));
      for (int j = 0; j < 4; j++) {
        load_matrices(b, b_tile + swizzled(j * 16 + lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2));
        multiply(sum[2 * j], a, b[0], b[1]);
        multiply(sum[2 * j + 1], a, b[2], b[3]);
      }
    }
  }
  asm volatile("cp.async.wait_all;");
  for (int j = 0; j < 8; j++)
    for (int half = 0; half < 2; half++) {
      int row = row0 + warp * 16 + lane / 4 + half * 8, column = column0 + j * 8 + lane % 4 * 2;
      if (row < M && column < N)
        *(__nv_bfloat162*)(y + size_t(row) * N + column) =
            __floats2bfloat162_rn(sum[j][half * 2], sum[j][half * 2 + 1]);
    }
}

// y[K, M] = x[M, K]^T for one 8 x 8 tile per warp, through ldmatrix.trans.
extern "C" __global__ void __launch_bounds__(32) transpose(const uint4* x, uint32_t* y, int M, int K) {
  __shared__ __align__(16) uint4 tile[8];
  uint32_t r, at = (uint32_t)__cvta_generic_to_shared(tile + threadIdx.x % 8);
  if (threadIdx.x < 8) tile[threadIdx.x] = x[(blockIdx.x * 8 + threadIdx.x) * (K / 8) + blockIdx.y];
  __syncwarp();
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r) : "r"(at));
  y[(blockIdx.y * 8 + threadIdx.x / 4) * (M / 2) + blockIdx.x * 4 + threadIdx.x % 4] = r;
}
