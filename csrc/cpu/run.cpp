// The one place where engines and loop nests are instantiated.
#include "gemm.h"
#include "operations.h"
#include "outer.h"
#include "small.h"

namespace lora_fused::LORA_FUSED_ISA {
namespace {

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

template <class Engine>
i64 panel_words(i64 K) {
  return padded_words<Engine>(K) * kPanel;
}

Matrix transposed(const Matrix& m) { return {m.data, m.col_stride, m.row_stride}; }

// Few rows of a against many columns of b, which lie along the contraction. NOTE: panels of b would be a
// transposition of all of it, read but few times; turned, the few rows are transposed and b is read as it is.
template <class Engine>
bool is_turned(const Gemm& g) {
  const bool plain = g.drop_a.threshold == 0 && g.drop_b.threshold == 0 && g.drop_rank.threshold == 0;
  const bool small = ceil_div(g.M, kPanel) * panel_words<Engine>(g.K) * 4 <= kMaxPackedRows;
  return plain && small && g.M <= Engine::kTurnedTokens && g.M <= g.N && g.packed == nullptr &&
         g.b.row_stride == 1 && g.K > 0 && g.scale == 1.0f;
}

// y' = b' a' + l' s'
Gemm turn(DType dtype, const Gemm& g, int threads) {
  Gemm t = g;
  t.M = g.N, t.N = g.M;
  t.a = transposed(g.b), t.b = transposed(g.a), t.s = transposed(g.l), t.l = transposed(g.s);
  t.y.row_stride = g.y.col_stride, t.y.col_stride = g.y.row_stride;
  t.turned = true;
  u32* panels =
      static_cast<u32*>(scratch(Slot::turned, static_cast<std::size_t>(packed_bytes(dtype, g.K, g.M))));
  pack(dtype, {g.K, g.M, t.b, panels, threads});
  t.packed = panels;
  return t;
}

}  // namespace

void run(DType dtype, const Gemm& gemm, int threads) {
  with_engine(dtype, [&]<class Engine, class T>() {
    const auto go = [&](auto body) { parallel(threads, body); };
    if (is_dot<Engine>(gemm)) return go(DotRun<T, Engine::kIsPairs>(gemm));
    if constexpr (Engine::kReadsPanels)
      if (gemm.over_tokens && gemm.b.col_stride == 1 && gemm.K > kShortContraction)
        return go(OuterRun<Engine, T>(gemm));
    if (is_axpy<Engine>(gemm)) return go(AxpyRun<T>(gemm));
    go(GemmRun<Engine, T>(is_turned<Engine>(gemm) ? turn(dtype, gemm, threads) : gemm));
  });
}

void write_sums(const Gemm& gemm, i64 rows, i64 cols, const float* sums, i64 pitch) {
  for (i64 r = 0; r < rows; r += kLanes)
    write_output<float>(gemm, r, min(kLanes, rows - r), 0, cols, sums + r * pitch, pitch);
}

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
