// The argument structs that host launchers and kernels share: one struct per kernel, passed by value. Sizes and
// strides are in elements, 64 bits wide.
#pragma once

#include <cstdint>
#include <string>

#include "../problem.h"

namespace lora_fused::cuda {

// The dropout mask of a [rows, row_length] matrix, as in ../dropout.h. The seed is read on the device where it
// lives there (no synchronisation), else it is `seed`. threshold 0 keeps everything.
struct Mask {
  const u64* seed_pointer = nullptr;
  u64 seed = 0;
  i64 row_length = 0;
  u32 threshold = 0;
};

// What a workspace's error word says when a bounded spin gave up before it trapped.
enum class SpinError : u32 { none = 0, flag_never_set = 1 };

}  // namespace lora_fused::cuda
