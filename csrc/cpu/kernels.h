// One table of native operations per instruction set. The same sources (matmul.cpp, shrink.cpp, reduce.cpp)
// are compiled once for each, in a namespace of its own; isa.cpp chooses by cpuid at run time.
#pragma once

#include "../problem.h"

namespace lora_fused {

struct Kernels {
  const char* isa;
  void (*matmul)(DType, const MatmulArgs&);
  void (*shrink)(DType, const ShrinkArgs&);
  void (*shrink_reduce)(DType, const ShrinkReduceArgs&);
  void (*reduce)(DType, const ReduceArgs&);
  void (*pack)(DType, const PackArgs&);
  i64 (*packed_bytes)(DType, i64 K, i64 N);
  void (*keep_mask)(const Dropout&, i64 rows, unsigned char* mask);
};

#ifdef LORA_FUSED_HAVE_AVX2
namespace avx2 {
extern const Kernels kernels;
}
#endif
#ifdef LORA_FUSED_HAVE_AVX512
namespace avx512 {
extern const Kernels kernels;
}
#endif
#ifdef LORA_FUSED_HAVE_AVX512_BF16
namespace avx512_bf16 {
extern const Kernels kernels;
}
#endif
#ifdef LORA_FUSED_HAVE_AMX_BF16
namespace amx_bf16 {
extern const Kernels kernels;
}
#endif

}  // namespace lora_fused
