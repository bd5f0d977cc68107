// Every function of ptx.cuh, flags.cuh and numeric.cuh in small kernels, so that each is compiled and
// executed.
#include "flags.cuh"
#include "numeric.cuh"

using namespace lora_fused;

// to[i] = from[i] for 32 rows of 16 bytes, through shared memory by every kind of copy.
extern "C" __global__ void copies(const std::uint32_t* from, std::uint32_t* to, int rows) {
  __shared__ __align__(16) std::uint32_t tile[3][32][4];
  const int lane = threadIdx.x;
  const std::uint32_t valid = lane < rows ? 16 : 0, at = ptx::shared_address(tile[0][lane]);
  constexpr std::uint32_t kTile = sizeof(tile[0]);
  const std::uint32_t* row = from + (lane < rows ? lane * 4 : 0);
  ptx::cp_async_16(at, row, valid);
  ptx::cp_async_commit();
  ptx::cp_async_8(at + kTile, row, valid / 2);
  ptx::cp_async_8(at + kTile + 8, row + 2, valid / 2);
  for (int i = 0; i < 4; ++i) ptx::cp_async_4(at + 2 * kTile + 4 * i, row + i, valid / 4);
  ptx::cp_async_commit();
  ptx::cp_async_wait<1>();
  const uint4 first = ptx::ld_shared_128(at);
  ptx::cp_async_wait_all();
  const std::uint32_t direct = ptx::ld_global_nc_32(row);
  const std::uint32_t half = ptx::ld_global_nc_16(row);
  const std::uint64_t pair = ptx::ld_global_nc_64(row);
  const uint4 once = ptx::ld_global_once_128(row);
  uint4 sum;
  sum.x = first.x + ptx::ld_shared_32(at + kTile) + ptx::ld_shared_32(at + 2 * kTile) + direct;
  sum.y = first.y + ptx::ld_shared_32(at + kTile + 4) + ptx::ld_shared_32(at + 2 * kTile + 4) + half;
  sum.z = first.z + ptx::ld_shared_32(at + kTile + 8) + ptx::ld_shared_32(at + 2 * kTile + 8) +
          static_cast<std::uint32_t>(pair >> 32);
  sum.w = first.w + ptx::ld_shared_32(at + kTile + 12) + ptx::ld_shared_32(at + 2 * kTile + 12) + once.w;
  ptx::st_global_streaming_128(to + lane * 4, sum);
}

// c[16, 8] = a[16, kMmaK] b[8, kMmaK]^T for one warp; operands reach the fragments through ldmatrix.
template <typename T>
LORA_FUSED_DEVICE void multiply(const T* a, const T* b, float* c) {
  constexpr int kRow = 32;
  __shared__ __align__(16) std::uint8_t tile[24 * kRow];
  const int lane = threadIdx.x;
  const std::uint32_t base = ptx::shared_address(tile);
  const uint4* from = reinterpret_cast<const uint4*>(lane < 16 ? a : b);
  if (lane < 24) {
    const int row = lane < 16 ? lane : lane - 16;
    ptx::st_shared_128(base + lane * kRow, from[row * 2]);
    ptx::st_shared_128(base + lane * kRow + 16, from[row * 2 + 1]);
  }
  __syncwarp();
  std::uint32_t left[4], right[2];
  ptx::ldmatrix_x4(left, base + (lane % 16) * kRow + lane / 16 * 16);
  ptx::ldmatrix_x2(right, base + (16 + lane % 8) * kRow + lane / 8 % 2 * 16);
  float sum[4] = {};
  Numeric<T>::mma(sum, left, right[0], right[1]);
  for (int i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sum[i];
}
extern "C" __global__ void multiply_bf16(const bf16* a, const bf16* b, float* c) { multiply(a, b, c); }
extern "C" __global__ void multiply_fp16(const fp16* a, const fp16* b, float* c) { multiply(a, b, c); }
extern "C" __global__ void multiply_fp32(const float* a, const float* b, float* c) { multiply(a, b, c); }

// to[8 i + j][r] = from[r][8 i + j]: a 16 x 16 transpose of 16-bit elements by ldmatrix.trans, x4 and x2.
extern "C" __global__ void transposes(const uint4* from, std::uint32_t* to) {
  __shared__ __align__(16) std::uint8_t tile[16 * 32];
  const int lane = threadIdx.x;
  const std::uint32_t base = ptx::shared_address(tile);
  ptx::st_shared_128(base + lane * 16, from[lane]);
  __syncwarp();
  std::uint32_t r[4], half[2];
  ptx::ldmatrix_x4_trans(r, base + (lane % 16) * 32 + lane / 16 * 16);
  ptx::ldmatrix_x2_trans(half, base + (lane % 16) * 32);
  if (half[0] != r[0] || half[1] != r[1]) ptx::trap();
  for (int i = 0; i < 4; ++i) to[(lane / 4 + i / 2 * 8) * 8 + i % 2 * 4 + lane % 4] = r[i];
}

// Rounding: out[i] = pack(in[2 i], in[2 i + 1]), back[i] = unpack(out[i]), tf32[i] = in[i] rounded to TF32.
extern "C" __global__ void rounding(const float* in, std::uint32_t* as_bf16, std::uint32_t* as_fp16,
                                    float2* back, std::uint32_t* as_tf32) {
  const int i = threadIdx.x;
  as_bf16[i] = Numeric<bf16>::pack(in[2 * i], in[2 * i + 1]);
  as_fp16[i] = Numeric<fp16>::pack(in[2 * i], in[2 * i + 1]);
  back[2 * i] = Numeric<bf16>::unpack(as_bf16[i]);
  back[2 * i + 1] = Numeric<fp16>::unpack(as_fp16[i]);
  as_tf32[2 * i] = ptx::cvt_rna_tf32(in[2 * i]);
  as_tf32[2 * i + 1] = ptx::cvt_rna_tf32(in[2 * i + 1]);
}

// Blocks take tickets; ticket 0 writes `data` and posts a flag, the others wait for it and copy `data`.
// The block that leaves last puts the workspace (ticket, flag, left, error) back to zero.
extern "C" __global__ void handover(std::uint32_t* workspace, std::uint32_t* data, std::uint32_t* out) {
  __shared__ std::uint32_t ticket;
  std::uint32_t* flag = workspace + 1;
  if (threadIdx.x == 0) ticket = ptx::atom_inc_acq_rel(workspace, gridDim.x - 1);
  __syncthreads();
  const std::uint32_t mine = ticket;
  if (mine == 0) data[threadIdx.x] = 7 * threadIdx.x;
  __syncthreads();
  if (threadIdx.x == 0) {
    if (mine == 0) ptx::red_add_release(flag, 1);
    wait_flag(flag, 1, workspace + 3);
  }
  __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = data[threadIdx.x];
  __syncthreads();
  if (threadIdx.x == 0 && ptx::atom_add_acq_rel(workspace + 2, 1) == gridDim.x - 1) {
    ptx::st_relaxed(flag, 0);
    ptx::st_release(workspace + 2, 0);
  }
}

// A flag that nobody raises.
extern "C" __global__ void forsaken(std::uint32_t* workspace) { wait_flag(workspace, 1, workspace + 1); }
