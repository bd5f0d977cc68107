// The launchers of the kernels in this folder: check, choose the instantiation, launch on the current device.
#pragma once

#include "arguments.h"
#include "launch.h"

namespace lora_fused::cuda {

// Sizes of the workspace, in 4-byte words, that a launch with these arguments uses.
struct WorkspaceSize {
  i64 partials = 0;
  i64 tickets = 0;
};

WorkspaceSize workspace_of(Math math, const ShrinkLaunch& problem);
WorkspaceSize workspace_of(Math math, const ReduceLaunch& problem);
WorkspaceSize workspace_of(Math math, const DecodeLaunch& problem);

// Each throws std::invalid_argument for arguments that the kernel does not serve and CudaError for what CUDA
// reports.
void launch_shrink(Math math, const ShrinkLaunch& problem, cudaStream_t stream, bool dependent);
void launch_reduce(Math math, const ReduceLaunch& problem, cudaStream_t stream, bool dependent);
void launch_decode(Math math, const DecodeLaunch& problem, cudaStream_t stream, bool dependent);

// Throws std::invalid_argument: "<what>: got <got>, expected <expected>".
[[noreturn]] void refuse(const char* what, i64 got, const std::string& expected);

// Ranks per block: kernels exist for 16, 64 and, for 16-bit types, 128.
inline int rank_tile(Math math, i64 R) {
  const bool fp32 = math == Math::ieee || math == Math::tf32;
  return R <= 16 ? 16 : R <= 64 || fp32 ? 64 : 128;
}

// Of an output that a kernel writes in the dtype of its operands.
inline void check_dtype(const char* what, const Output& output, Math math) {
  const bool bf16 = math == Math::bf16, f16 = math == Math::f16;
  const DType wanted = bf16 ? DType::bf16 : f16 ? DType::f16 : DType::f32;
  if (output.dtype != wanted)
    refuse(what, static_cast<i64>(output.dtype),
           std::to_string(static_cast<int>(wanted)) + ", the operands'");
}

inline i64 tiles(i64 size, i64 tile) { return (size + tile - 1) / tile; }

}  // namespace lora_fused::cuda
