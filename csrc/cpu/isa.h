// The instruction sets this module was compiled for, and which of them this CPU and operating system can run.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace lora_fused {

struct CpuInfo {
  std::string vendor, brand;
  int family = 0, model = 0;
  std::vector<std::string> flags;  // of those the kernels or the vendor's GEMM care about
};

CpuInfo cpu_info();

// Ascending: a later one runs everything an earlier one does, and is faster.
std::vector<const Kernels*> compiled_kernels();
std::vector<const Kernels*> supported_kernels();

}  // namespace lora_fused
