// Element types of the kernels: bf16, fp16, fp32. Conversions round to nearest even; accumulators are fp32.
//
//   Numeric<T>::mma   c[16 x 8] += a[16 x kMmaK] b[kMmaK x 8]. A step is 32 bytes of a row for every T, so
//   that
//                     fragments come from ldmatrix in the same way; fp32 is multiplied as TF32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ptx.cuh"

namespace lora_fused {

using bf16 = __nv_bfloat16;
using fp16 = __half;

template <typename T>
struct Numeric;

template <>
struct Numeric<bf16> {
  static constexpr int kMmaK = 16;
  static LORA_FUSED_DEVICE float to_float(bf16 v) { return __bfloat162float(v); }
  static LORA_FUSED_DEVICE bf16 from_float(float v) { return __float2bfloat16_rn(v); }
  static LORA_FUSED_DEVICE std::uint32_t pack(float low, float high) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const std::uint32_t&>(v);
  }
  static LORA_FUSED_DEVICE float2 unpack(std::uint32_t v) {
    return {__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u)};
  }
  static LORA_FUSED_DEVICE void mma(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                    std::uint32_t b1) {
    ptx::mma_m16n8k16_bf16(c, a, b0, b1);
  }
};

template <>
struct Numeric<fp16> {
  static constexpr int kMmaK = 16;
  static LORA_FUSED_DEVICE float to_float(fp16 v) { return __half2float(v); }
  static LORA_FUSED_DEVICE fp16 from_float(float v) { return __float2half_rn(v); }
  static LORA_FUSED_DEVICE std::uint32_t pack(float low, float high) {
    const __half2 v = __floats2half2_rn(low, high);
    return reinterpret_cast<const std::uint32_t&>(v);
  }
  static LORA_FUSED_DEVICE float2 unpack(std::uint32_t v) {
    return __half22float2(reinterpret_cast<const __half2&>(v));
  }
  static LORA_FUSED_DEVICE void mma(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                    std::uint32_t b1) {
    ptx::mma_m16n8k16_f16(c, a, b0, b1);
  }
};

template <>
struct Numeric<float> {
  static constexpr int kMmaK = 8;
  static LORA_FUSED_DEVICE float to_float(float v) { return v; }
  static LORA_FUSED_DEVICE float from_float(float v) { return v; }
  static LORA_FUSED_DEVICE void mma(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                    std::uint32_t b1) {
    ptx::mma_m16n8k8_tf32(c, a, b0, b1);
  }
};

}  // namespace lora_fused
