// Elementwise kernels that pull in much of the compiler's arithmetic: its own exp, log, erf, pow and
// sin (whose slow path keeps an array in local memory), 64-bit division, packed bf16 and half.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

extern "C" __global__ void functions(const float* x, float* y) {
  const float v = x[threadIdx.x];
  y[threadIdx.x] = expf(v) + logf(v) + sqrtf(v) + rsqrtf(v) + 1.f / v + tanhf(v) + erff(v) + powf(v, 1.5f) +
                   fminf(v, 2.f) + floorf(v) + ceilf(v) + truncf(v) + rintf(v) + fmodf(v, 0.75f) + __expf(v) +
                   __logf(v) + __fdividef(v, 3.f);
}

extern "C" __global__ void sine(const float* x, float* y) { y[threadIdx.x] = sinf(x[threadIdx.x]); }

extern "C" __global__ void wide(const unsigned long long* x, unsigned long long* y, unsigned m) {
  const unsigned long long v = x[threadIdx.x];
  y[threadIdx.x] = v / m + v % 7 + __umul64hi(v, v) + __popcll(v) + __clzll(v) + __brevll(v) + __ffsll(v);
}

extern "C" __global__ void packed(const __nv_bfloat162* x, __nv_bfloat162* y) {
  const __nv_bfloat162 v = x[threadIdx.x];
  y[threadIdx.x] = __hmax2(__hfma2(v, v, __hadd2(v, __hmul2(v, v))), v);
}

extern "C" __global__ void doubles(const double* x, double* y) {
  const double v = x[threadIdx.x];
  y[threadIdx.x] = sqrt(v) + 1.0 / v + fma(v, 3.0, -floor(v)) + (double)(long long)v;
}
