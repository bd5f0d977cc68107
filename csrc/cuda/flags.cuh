// Waiting for another block: a bounded spin. A kernel that would hang says why and traps instead.
#pragma once

#include "ptx.cuh"

#ifndef LORA_FUSED_SPIN_NANOSECONDS
#define LORA_FUSED_SPIN_NANOSECONDS 2000000000ull
#endif

namespace lora_fused {

// What a kernel writes to the error word of its workspace before it traps. 0: no error.
enum class KernelError : std::uint32_t { none = 0, flag_timeout = 1 };

// Wait until *flag >= count; everything released before the flag was raised is visible to this thread then.
LORA_FUSED_DEVICE void wait_flag(const std::uint32_t* flag, std::uint32_t count, std::uint32_t* error) {
  if (ptx::ld_acquire(flag) >= count) return;
  const std::uint64_t begin = ptx::globaltimer();
  while (ptx::ld_acquire(flag) < count) {
    ptx::nanosleep(64);
    if (ptx::globaltimer() - begin > LORA_FUSED_SPIN_NANOSECONDS) {
      ptx::st_relaxed(error, static_cast<std::uint32_t>(KernelError::flag_timeout));
      ptx::trap();
    }
  }
}

}  // namespace lora_fused
