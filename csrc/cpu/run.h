// Chooses the loop nest of a product by its shape, and the engine by its dtype.
#pragma once

#include "gemm.h"
#include "small.h"

namespace lora_fused::LORA_FUSED_ISA {

// Calls f with the engine and the element type that serve dtype here.
template <class F>
LORA_FUSED_INLINE void with_engine(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f.template operator()<VectorEngine<false>, float>();
    case DType::f16:
      return f.template operator()<VectorEngine<false>, Float16>();
#if defined(__AMX_BF16__)
    case DType::bf16:
      return f.template operator()<AmxEngine, BFloat16>();
#elif defined(__AVX512BF16__)
    case DType::bf16:
      return f.template operator()<VectorEngine<true>, BFloat16>();
#else
    case DType::bf16:
      return f.template operator()<VectorEngine<false>, BFloat16>();
#endif
  }
}

// A contraction over tokens goes in blocks whose panels stay in the first-level cache (measured).
constexpr i64 kTokenBlockWords = 128;
constexpr i64 kMinBlockTokens = 64;

template <class Engine, class T>
static void run_on(const Gemm& gemm, int threads) {
  const auto go = [&](auto run) { parallel(threads, run); };
  if (is_dot(gemm)) return go(DotRun<T, Engine::kIsPairs>(gemm));
  if (is_axpy(gemm)) return go(AxpyRun<T>(gemm));
  go(GemmRun<Engine, T>(gemm));
}

static void run(DType dtype, const Gemm& gemm, int threads) {
  with_engine(dtype, [&]<class Engine, class T>() { run_on<Engine, T>(gemm, threads); });
}

}  // namespace lora_fused::LORA_FUSED_ISA
