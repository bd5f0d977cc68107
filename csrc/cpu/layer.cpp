#include "layer.h"

#include <cstdlib>
#include <memory>
#include <new>

#include "scratch.h"

namespace lora_fused {
namespace {

constexpr std::size_t kMaxKeptBytes = std::size_t{1} << 20;  // of s or ds: more is given back after the call
constexpr std::size_t kAlignment = 64;

Matrix transposed(const Matrix& m) { return {m.data, m.col_stride, m.row_stride}; }

// [M, R] in the compute dtype, for the duration of one call: the caller's, or memory of its own.
class RankBuffer {
 public:
  explicit RankBuffer(void* data) : data_(data) {}

  explicit RankBuffer(const Layer& layer) {
    const std::size_t bytes =
        static_cast<std::size_t>(layer.M * layer.R) * (layer.dtype == DType::f32 ? 4 : 2);
    if (bytes <= kMaxKeptBytes) {
      data_ = scratch(Slot::rank, bytes);
      return;
    }
    owned_.reset(std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment));
    if (owned_ == nullptr) throw std::bad_alloc();
    data_ = owned_.get();
  }

  void* data() const { return data_; }

 private:
  struct Free {
    void operator()(void* block) const { std::free(block); }
  };
  void* data_;
  std::unique_ptr<void, Free> owned_;
};

}  // namespace

void forward(const Layer& layer, const LayerForward& call) {
  const auto [kernels, dtype, M, N, K, R, da_dtype, db_dtype, threads] = layer;
  const RankBuffer buffer = call.s == nullptr ? RankBuffer(layer) : RankBuffer(call.s);
  void* const s = buffer.data();
  kernels->shrink(
      dtype,
      {M, K, R, call.x, call.a, call.scale, {call.seed, call.threshold, K}, {s, R, 1, dtype}, threads});
  kernels->matmul(dtype, {M,
                          N,
                          K,
                          R,
                          call.x,
                          transposed(call.w),
                          {s, R, 1},
                          transposed(call.b),
                          call.packed,
                          call.bias,
                          false,
                          {},
                          {call.y, N, 1, dtype},
                          threads});
}

void backward(const Layer& layer, const LayerBackward& call) {
  const auto [kernels, dtype, M, N, K, R, da_dtype, db_dtype, threads] = layer;
  const bool reads_ds = call.dx != nullptr || call.da != nullptr;
  const RankBuffer buffer = reads_ds ? RankBuffer(layer) : RankBuffer(nullptr);
  void* const ds = buffer.data();
  const Dropout dropout{call.seed, call.threshold, K};
  if (reads_ds || call.db != nullptr)
    kernels->shrink_reduce(dtype, {M,
                                   N,
                                   R,
                                   call.dy,
                                   call.b,
                                   {call.s, R, 1},
                                   call.scale,
                                   {ds, R, 1, dtype},
                                   {call.db, R, 1, db_dtype},
                                   threads});
  if (call.dx != nullptr)
    kernels->matmul(dtype, {M,
                            K,
                            N,
                            R,
                            call.dy,
                            call.w,
                            {ds, R, 1},
                            call.a,
                            call.packed,
                            nullptr,
                            false,
                            dropout,
                            {call.dx, K, 1, dtype},
                            threads});
  if (call.da != nullptr)
    kernels->reduce(dtype, {M, K, R, {ds, R, 1}, call.x, dropout, {call.da, K, 1, da_dtype}, threads});
}

}  // namespace lora_fused
