#include "scratch.h"

#include <cstdlib>
#include <new>

namespace lora_fused {
namespace {

constexpr std::size_t kAlignment = 64;

struct Buffers {
  void* data[static_cast<int>(Slot::count)] = {};
  std::size_t size[static_cast<int>(Slot::count)] = {};
  ~Buffers() {
    for (void* block : data) std::free(block);
  }
};

thread_local Buffers buffers;

}  // namespace

void* scratch(Slot slot, std::size_t bytes) {
  const int i = static_cast<int>(slot);
  if (buffers.size[i] < bytes) {
    std::free(buffers.data[i]);
    buffers.size[i] = 0;
    const std::size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    buffers.data[i] = std::aligned_alloc(kAlignment, rounded);
    if (buffers.data[i] == nullptr) throw std::bad_alloc();
    buffers.size[i] = rounded;
  }
  return buffers.data[i];
}

std::size_t scratch_bytes() {
  std::size_t total = 0;
  for (std::size_t size : buffers.size) total += size;
  return total;
}

}  // namespace lora_fused
