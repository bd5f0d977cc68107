// The launcher of matmul.cuh's kernels, for devices of compute capability 9.0.
#pragma once

#include "../launchers.h"
#include "arguments.h"

namespace lora_fused::sm90 {

// Words of the workspace that a launch uses.
i64 words_of(i64 M, int cluster);

// Throws std::invalid_argument for what the kernels do not serve (rows that are not 16-byte aligned, ...) and
// CudaError for what CUDA reports. Launches on the current device.
void launch_matmul(cuda::Math math, const MatmulLaunch& problem, cudaStream_t stream, bool dependent);

}  // namespace lora_fused::sm90
