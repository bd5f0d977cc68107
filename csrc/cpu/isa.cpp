#include "isa.h"

#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#define LORA_FUSED_X86 1
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lora_fused {
namespace {

struct Features {
  bool avx2 = false, avx512 = false, avx512_bf16 = false, avx512_fp16 = false, amx_bf16 = false;
};

#ifdef LORA_FUSED_X86
struct Registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf = 0) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

bool bit(unsigned value, int position) { return (value >> position) & 1; }

u64 enabled_states() {
  if (!bit(cpuid(1).ecx, 27)) return 0;  // OSXSAVE
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<u64>(high) << 32) | low;
}

// Linux hands out the 8 KiB of tile registers only to processes that ask.
bool request_tiles() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Features detect() {
  Features f;
  const u64 states = enabled_states();
  const bool ymm = (states & 0x6) == 0x6, zmm = (states & 0xe6) == 0xe6,
             tiles = (states & 0x60000) == 0x60000;
  const Registers one = cpuid(1), seven = cpuid(7), seven1 = cpuid(7, 1);
  f.avx2 = ymm && bit(seven.ebx, 5) && bit(one.ecx, 12) && bit(one.ecx, 29);  // AVX2, FMA, F16C
  f.avx512 = f.avx2 && zmm && bit(seven.ebx, 16) && bit(seven.ebx, 17) && bit(seven.ebx, 30) &&
             bit(seven.ebx, 31);  // F, DQ, BW, VL
  f.avx512_bf16 = f.avx512 && bit(seven1.eax, 5);
  f.avx512_fp16 = f.avx512 && bit(seven.edx, 23);
  f.amx_bf16 = f.avx512_bf16 && tiles && bit(seven.edx, 24) && bit(seven.edx, 22) && request_tiles();
  return f;
}

void read_names(CpuInfo& info) {
  const Registers zero = cpuid(0);
  char vendor[13] = {};
  std::memcpy(vendor, &zero.ebx, 4);
  std::memcpy(vendor + 4, &zero.edx, 4);
  std::memcpy(vendor + 8, &zero.ecx, 4);
  info.vendor = vendor;
  const unsigned eax = cpuid(1).eax;
  const int base_family = (eax >> 8) & 15;
  info.family = base_family + (base_family == 15 ? (eax >> 20) & 255 : 0);
  info.model = ((eax >> 4) & 15) | (base_family == 6 || base_family == 15 ? ((eax >> 16) & 15) << 4 : 0);
  if (cpuid(0x80000000).eax < 0x80000004) return;
  char brand[49] = {};
  for (unsigned i = 0; i < 3; ++i) {
    const Registers part = cpuid(0x80000002 + i);
    std::memcpy(brand + 16 * i, &part, 16);
  }
  info.brand = brand;
}
#else
Features detect() { return {}; }
void read_names(CpuInfo&) {}
#endif

const Features& features() {
  static const Features found = detect();
  return found;
}

bool supported(const Kernels& kernels) {
  const Features& f = features();
  const std::string isa = kernels.isa;
  return (isa == "avx2" && f.avx2) || (isa == "avx512" && f.avx512) ||
         (isa == "avx512_bf16" && f.avx512_bf16) || (isa == "amx_bf16" && f.amx_bf16);
}

}  // namespace

CpuInfo cpu_info() {
  CpuInfo info;
  read_names(info);
  const Features& f = features();
  if (f.avx2) info.flags.push_back("avx2");
  if (f.avx512) info.flags.push_back("avx512");
  if (f.avx512_bf16) info.flags.push_back("avx512_bf16");
  if (f.avx512_fp16) info.flags.push_back("avx512_fp16");
  if (f.amx_bf16) info.flags.push_back("amx_bf16");
  return info;
}

std::vector<const Kernels*> compiled_kernels() {
  return {
#ifdef LORA_FUSED_HAVE_AVX2
      &avx2::kernels,
#endif
#ifdef LORA_FUSED_HAVE_AVX512
      &avx512::kernels,
#endif
#ifdef LORA_FUSED_HAVE_AVX512_BF16
      &avx512_bf16::kernels,
#endif
#ifdef LORA_FUSED_HAVE_AMX_BF16
      &amx_bf16::kernels,
#endif
  };
}

std::vector<const Kernels*> supported_kernels() {
  std::vector<const Kernels*> result;
  for (const Kernels* kernels : compiled_kernels())
    if (supported(*kernels)) result.push_back(kernels);
  return result;
}

}  // namespace lora_fused
