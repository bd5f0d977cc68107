// The launcher of matmul.cuh's kernels, for every device from sm_80 on.
#pragma once

#include "../launchers.h"
#include "arguments.h"

namespace lora_fused::sm80 {

// Words of the workspace that a launch with tiles of block_m rows uses.
i64 words_of(i64 M, int block_m);

// Throws std::invalid_argument for what the kernels do not serve and CudaError for what CUDA reports.
// Launches on the current device. Strides or addresses that are not multiples of 16 bytes take the kernel
// that reads by elements, whatever tile is asked for.
void launch_matmul(cuda::Math math, const MatmulLaunch& problem, cudaStream_t stream, bool dependent);

}  // namespace lora_fused::sm80
