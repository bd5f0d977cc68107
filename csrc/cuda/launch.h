// How every kernel is launched. A kernel takes one struct by value,
//
//   extern "C" __global__ void lora_<op>_<arch>_<dtype>_<variant>(const __grid_constant__ Args args);
//
// and `std::string describe(const Args&)`, found by argument-dependent lookup, is the problem in an error's
// sentence
// ("M=8192 K=4096 R=16"); it runs only when there is an error.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "driver.h"

namespace lora_fused::cuda {

// One kernel of the module: what a launcher's table holds.
struct Kernel {
  const char* name;      // as in the PTX
  const void* function;  // the host side of the __global__ function
};

struct Launch {
  Kernel kernel;
  dim3 grid, block;
  unsigned cluster = 1;          // blocks per cluster, along x; the grid's x is a multiple of it
  std::size_t shared_bytes = 0;  // dynamic; above 48 KB the opt-in is made, once per device and kernel
  cudaStream_t stream = nullptr;
  // Programmatic dependent launch: this kernel may start while the one before it in the stream still runs,
  // and executes griddepcontrol.wait before it touches what that one wrote. Ignored below sm_90.
  bool dependent = false;
};

// cudaLaunchKernelExC with the attributes that `how` asks for, on the current device. Empty grids launch
// nothing.
cudaError_t launch_raw(const Launch& how, void** args, const char** step);

// Throws CudaError with the kernel's name and the problem.
template <class Args>
void launch(const Launch& how, const Args& args) {
  void* pointers[] = {const_cast<Args*>(&args)};
  const char* step = "launch";
  const cudaError_t code = launch_raw(how, pointers, &step);
  if (code != cudaSuccess) check(code, how.kernel.name, describe(args), step);
}

// launch(kernel name, function, grid, block, cluster, shared bytes, stream, args, dependent) in one line.
template <class Args>
void launch(const Kernel& kernel, dim3 grid, dim3 block, unsigned cluster, std::size_t shared_bytes,
            cudaStream_t stream, const Args& args, bool dependent = false) {
  launch(Launch{kernel, grid, block, cluster, shared_bytes, stream, dependent}, args);
}

// A number of blocks as the x of a grid. Throws std::invalid_argument beyond the 2^31 - 1 that CUDA takes.
unsigned grid_size(std::int64_t blocks);

// Blocks of this kernel that one multiprocessor of the current device holds at a time, for persistent grids
// and for kernels whose blocks wait for each other. Asked once per device, kernel and shape. Throws
// CudaError.
int resident_blocks_per_sm(const Kernel& kernel, int threads, std::size_t shared_bytes);

}  // namespace lora_fused::cuda
