// The arithmetic roof of one core: independent multiply-adds in registers, no memory traffic.
// Built and called by roof.py. Each function runs `n` steps and returns the FLOPs it has done, or 0
// where the compiler's target or this CPU has no such instruction.
#include <immintrin.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

#define CHAINS 12  // enough to cover the latency of two units
static volatile float sink;

__attribute__((target("avx512f"), noinline)) static double fp32_avx512(int64_t n) {
  __m512 c[CHAINS], a = _mm512_set1_ps(1e-9f), b = _mm512_set1_ps(0.5f);
  for (int i = 0; i < CHAINS; i++) c[i] = _mm512_set1_ps((float)i);
  for (int64_t k = 0; k < n; k++)
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS; i++) c[i] = _mm512_fmadd_ps(c[i], b, a);
  for (int i = 0; i < CHAINS; i++) sink = _mm512_cvtss_f32(c[i]);
  return 2.0 * 16 * CHAINS * (double)n;
}

__attribute__((target("avx2,fma"), noinline)) static double fp32_avx2(int64_t n) {
  __m256 c[CHAINS], a = _mm256_set1_ps(1e-9f), b = _mm256_set1_ps(0.5f);
  for (int i = 0; i < CHAINS; i++) c[i] = _mm256_set1_ps((float)i);
  for (int64_t k = 0; k < n; k++)
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS; i++) c[i] = _mm256_fmadd_ps(c[i], b, a);
  for (int i = 0; i < CHAINS; i++) sink = _mm256_cvtss_f32(c[i]);
  return 2.0 * 8 * CHAINS * (double)n;
}

__attribute__((target("avx512f,avx512bf16"), noinline)) static double bf16_dot(int64_t n) {
  __m512 c[CHAINS];
  __m512bh a = (__m512bh)_mm512_set1_epi32(0x3f003f00), b = (__m512bh)_mm512_set1_epi32(0x30003000);
  for (int i = 0; i < CHAINS; i++) c[i] = _mm512_set1_ps((float)i);
  for (int64_t k = 0; k < n; k++) {
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS; i++) c[i] = _mm512_dpbf16_ps(c[i], a, b);
    __asm__ volatile("" : "+v"(a), "+v"(b));
  }
  for (int i = 0; i < CHAINS; i++) sink = _mm512_cvtss_f32(c[i]);
  return 2.0 * 32 * CHAINS * (double)n;
}

__attribute__((target("amx-tile,amx-bf16"), noinline)) static double bf16_amx(int64_t n) {
  enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18, ARCH_PRCTL = 158 };
  if (syscall(ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA)) return 0;
  struct {
    uint8_t palette, start_row, zero[14];
    uint16_t bytes_per_row[16];
    uint8_t rows[16];
  } __attribute__((packed)) config = {.palette = 1};
  for (int i = 0; i < 8; i++) config.bytes_per_row[i] = 64, config.rows[i] = 16;
  __asm__ volatile("" : : "r"(&config) : "memory");  // gcc 12 thinks only 8 bytes of it are read
  _tile_loadconfig(&config);
  _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
  _tile_zero(4); _tile_zero(5); _tile_zero(6); _tile_zero(7);
  for (int64_t k = 0; k < n; k++) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return 4.0 * 2 * 16 * 16 * 32 * (double)n;
}

double fp32_peak_step(int64_t n) {
  if (__builtin_cpu_supports("avx512f")) return fp32_avx512(n);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return fp32_avx2(n);
  return 0;
}

double bf16_peak_step(int64_t n, int has_amx) {
  if (has_amx) return bf16_amx(n);
  return __builtin_cpu_supports("avx512bf16") ? bf16_dot(n) : fp32_peak_step(n);
}
