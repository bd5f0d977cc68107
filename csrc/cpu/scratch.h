// Scratch memory that a thread keeps between calls (fresh pages cost more than small kernels do). Its size is
// bounded by the blocking constants, not by the problem, except for the packed rows of x, bounded by
// kMaxPackedRows bytes, and s or ds where nobody else reads them, bounded by kMaxKeptBytes.
#pragma once

#include <cstddef>

namespace lora_fused {

enum class Slot : int {
  rows,
  rank_rows,
  panels,
  rank_panels,
  accumulators,
  sums,
  skinny,
  turned,
  keep,
  row,
  rank,
  count
};

// At least `bytes` bytes, 64-byte aligned, contents undefined, owned by the calling thread and valid until
// its next call with the same slot. Throws std::bad_alloc.
void* scratch(Slot slot, std::size_t bytes);

// Bytes that the calling thread holds.
std::size_t scratch_bytes();

}  // namespace lora_fused
