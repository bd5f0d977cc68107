// Small kernels of plain CUDA C++: reductions, flags between blocks, named barriers, local memory.
#include <cstdint>

// out[0] += sum of x: shuffles inside warps, shared memory across them, one atomic per block.
extern "C" __global__ void __launch_bounds__(256) sum(const float* x, float* out, int n) {
  __shared__ float partial[8];
  float value = 0;
  for (int i = blockIdx.x * 256 + threadIdx.x; i < n; i += gridDim.x * 256) value += x[i];
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x < 32) {
    value = threadIdx.x < 8 ? partial[threadIdx.x] : 0.f;
    for (int offset = 4; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
    if (threadIdx.x == 0) atomicAdd(out, value);
  }
}

// bins[b] += how many x fall into b, counted in shared memory first.
extern "C" __global__ void __launch_bounds__(128) histogram(const uint32_t* x, uint32_t* bins, int n) {
  __shared__ uint32_t count[64];
  if (threadIdx.x < 64) count[threadIdx.x] = 0;
  __syncthreads();
  for (int i = blockIdx.x * 128 + threadIdx.x; i < n; i += gridDim.x * 128) atomicAdd(&count[x[i] % 64], 1u);
  __syncthreads();
  if (threadIdx.x < 64 && count[threadIdx.x]) atomicAdd(&bins[threadIdx.x], count[threadIdx.x]);
}

// A persistent pair of phases: tile t of `middle` is x + 1; out needs the tile of the block before.
extern "C" __global__ void __launch_bounds__(64)
    relay(const float* x, float* middle, float* out, unsigned* flags, int tiles) {
  for (int t = blockIdx.x; t < tiles; t += gridDim.x) {
    middle[t * 64 + threadIdx.x] = x[t * 64 + threadIdx.x] + 1.f;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(flags + t) : "memory");
  }
  for (int t = blockIdx.x; t < tiles; t += gridDim.x) {
    int other = (t + tiles - 1) % tiles;
    if (threadIdx.x == 0) {
      unsigned seen;
      do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(flags + other) : "memory");
      while (!seen);
    }
    __syncthreads();
    out[t * 64 + threadIdx.x] = 2.f * middle[other * 64 + threadIdx.x];
  }
}

// Two warps hand buffers to each other through named barriers: 1 = full, 2 = empty.
extern "C" __global__ void __launch_bounds__(64) handover(const int* x, int* out, int rounds) {
  __shared__ int buffer[32];
  int lane = threadIdx.x % 32;
  if (threadIdx.x < 32) {
    for (int i = 0; i < rounds; i++) {
      asm volatile("bar.sync 2, 64;" ::: "memory");
      buffer[lane] = x[i * 32 + lane] * 3;
      asm volatile("bar.arrive 1, 64;" ::: "memory");
    }
    asm volatile("bar.sync 2, 64;" ::: "memory");
  } else {
    for (int i = 0; i < rounds; i++) {
      asm volatile("bar.arrive 2, 64;" ::: "memory");
      asm volatile("bar.sync 1, 64;" ::: "memory");
      out[i * 32 + lane] = buffer[31 - lane];
    }
    asm volatile("bar.arrive 2, 64;" ::: "memory");
  }
}

// A local array with runtime indices, a jump table and loops whose trip counts differ by lane.
extern "C" __global__ void __launch_bounds__(64) scramble(const int* x, long long* out, int n) {
  int i = blockIdx.x * 64 + threadIdx.x;
  if (i >= n) return;
  int stack[16];
  for (int j = 0; j < 16; j++) stack[j] = x[i] * j;
  int steps = x[i] & 15;
  long long total = 0;
  for (int j = 0; j <= steps; j++) {
    int v = stack[(x[i] + j) & 15];
    switch (v & 7) {
      case 0:
        total += v;
        break;
      case 1:
        total -= v;
        break;
      case 2:
        total ^= v;
        break;
      case 3:
        total += v / 3;
        break;
      case 4:
        total += v % 5;
        break;
      case 5:
        total += (long long)v * v;
        break;
      case 6:
        total += __popc(v);
        break;
      default:
        total += __clz(v);
    }
  }
  out[i] = total / (steps + 1);
}
