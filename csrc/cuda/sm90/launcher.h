// The launcher of matmul.cuh's kernels, for devices of compute capability 9.0.
#pragma once

#include "../launchers.h"
#include "arguments.h"

namespace lora_fused::sm90 {

// Words of the workspace that a launch uses, and floats of its partial sums. gradient_columns: of the
// gradients that it sums up, each rounded up to a multiple of 16.
i64 words_of(i64 M, int cluster, i64 gradient_columns);
i64 partials_of(i64 M, i64 R, i64 gradient_columns, int parts);

// Throws std::invalid_argument for what the kernels do not serve (rows that are not 16-byte aligned, ...) and
// CudaError for what CUDA reports. Launches on the current device.
void launch_matmul(cuda::Math math, const MatmulLaunch& problem, cudaStream_t stream, bool dependent);

}  // namespace lora_fused::sm90
