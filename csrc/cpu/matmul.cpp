// matmul with the rank folded into the contraction (forward and dx), and the panels that it can take
// ready-made.
#include "operations.h"
#include "run.h"

namespace lora_fused::LORA_FUSED_ISA {

void matmul(DType dtype, const MatmulArgs& args) {
  Gemm gemm;
  gemm.M = args.M, gemm.N = args.N, gemm.K = args.K, gemm.R = args.R;
  gemm.a = args.x, gemm.b = args.w, gemm.s = args.s, gemm.l = args.l;
  gemm.drop_rank = args.dropout;
  gemm.packed = args.packed;
  gemm.bias = args.bias;
  gemm.accumulate = args.accumulate;
  gemm.y = args.y;
  run(dtype, gemm, args.threads);
}

namespace {

template <class Engine>
i64 panel_words(i64 K) {
  return padded_words<Engine>(K) * kPanel;
}

}  // namespace

i64 packed_bytes(DType dtype, i64 K, i64 N) {
  i64 bytes = 0;
  with_engine(dtype,
              [&]<class Engine, class T>() { bytes = ceil_div(N, kPanel) * panel_words<Engine>(K) * 4; });
  return bytes;
}

void pack(DType dtype, const PackArgs& args) {
  with_engine(dtype, [&]<class Engine, class T>() {
    const i64 panels = ceil_div(args.N, kPanel);
    auto body = [&](int thread, int num_threads) {
      for (i64 p = panels * thread / num_threads; p < panels * (thread + 1) / num_threads; ++p)
        pack_panels<T, Engine::kIsPairs>(args.w, p * kPanel, min(kPanel, args.N - p * kPanel), 0, args.K,
                                         padded_words<Engine>(args.K),
                                         args.packed + p * panel_words<Engine>(args.K), 0);
    };
    parallel(args.threads, body);
  });
}

}  // namespace lora_fused::LORA_FUSED_ISA
