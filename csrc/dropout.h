// The dropout generator: Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011;
// 7 rounds is the fewest that passed BigCrush there). One definition for CPU and CUDA;
// lora_fused/reference.py states the same in torch, and the tests hold the two together bit for bit.
//
//   key     = (seed lo, seed hi)
//   counter = (index lo, index hi, 0, 0),  index = row * ceil(row_length / 8) + col / 8
//   element col % 8 = e takes the 16 bits  (word[e / 2] >> 16 * (e % 2)) & 0xffff
//   kept iff these bits >= threshold = round(p * 65536)
//
// The mask of an element depends on (seed, row, col, row_length) alone: no tiling or thread count can change
// it.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define LORA_FUSED_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LORA_FUSED_HOST_DEVICE inline
#endif

namespace lora_fused::philox {

constexpr std::uint32_t kMultiplier0 = 0xD2511F53u;
constexpr std::uint32_t kMultiplier1 = 0xCD9E8D57u;
constexpr std::uint32_t kWeyl0 = 0x9E3779B9u;
constexpr std::uint32_t kWeyl1 = 0xBB67AE85u;
constexpr int kRounds = 7;
constexpr int kElementsPerCounter = 8;

struct Words {
  std::uint32_t word[4];
};

LORA_FUSED_HOST_DEVICE Words generate(std::uint64_t seed, std::uint64_t index) {
  std::uint32_t key0 = static_cast<std::uint32_t>(seed), key1 = static_cast<std::uint32_t>(seed >> 32);
  std::uint32_t c0 = static_cast<std::uint32_t>(index), c1 = static_cast<std::uint32_t>(index >> 32);
  std::uint32_t c2 = 0, c3 = 0;
  for (int round = 0; round < kRounds; ++round) {
    const std::uint64_t product0 = static_cast<std::uint64_t>(kMultiplier0) * c0;
    const std::uint64_t product1 = static_cast<std::uint64_t>(kMultiplier1) * c2;
    c0 = static_cast<std::uint32_t>(product1 >> 32) ^ c1 ^ key0;
    c1 = static_cast<std::uint32_t>(product1);
    c2 = static_cast<std::uint32_t>(product0 >> 32) ^ c3 ^ key1;
    c3 = static_cast<std::uint32_t>(product0);
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

// The counters that one row takes: rows start on a counter of their own.
LORA_FUSED_HOST_DEVICE std::uint64_t counters_per_row(std::int64_t row_length) {
  return static_cast<std::uint64_t>((row_length + kElementsPerCounter - 1) / kElementsPerCounter);
}

// Bit e is set iff element e of this counter is kept.
LORA_FUSED_HOST_DEVICE std::uint32_t keep_bits(const Words& random, std::uint32_t threshold) {
  std::uint32_t bits = 0;
  for (int e = 0; e < kElementsPerCounter; ++e) {
    const std::uint32_t value = (random.word[e >> 1] >> (16 * (e & 1))) & 0xffffu;
    bits |= static_cast<std::uint32_t>(value >= threshold) << e;
  }
  return bits;
}

}  // namespace lora_fused::philox
