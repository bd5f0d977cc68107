// One PTX instruction per function, for sm_80 and later. Kernels contain no `asm`.
// Names follow the PTX ISA; "shared" addresses are 32-bit addresses in the shared window.
#pragma once

#include <cstdint>

#define LORA_FUSED_DEVICE __device__ __forceinline__

namespace lora_fused::ptx {

LORA_FUSED_DEVICE std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

// The same value, but the compiler does not know: what depends on it is computed where it is used, instead of
// early and at the price of registers.
LORA_FUSED_DEVICE int opaque(int value) {
  asm volatile("mov.b32 %0, %0;" : "+r"(value));
  return value;
}

// ---- asynchronous copies: global to shared memory -------------------------------------------------------

// 16 bytes past L1, of which the first `bytes` are read and the rest is zero. 0 reads nothing.
LORA_FUSED_DEVICE void cp_async_16(std::uint32_t shared, const void* global, std::uint32_t bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes)
               : "memory");
}

LORA_FUSED_DEVICE void cp_async_8(std::uint32_t shared, const void* global, std::uint32_t bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared), "l"(global), "r"(bytes)
               : "memory");
}

LORA_FUSED_DEVICE void cp_async_4(std::uint32_t shared, const void* global, std::uint32_t bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global), "r"(bytes)
               : "memory");
}

LORA_FUSED_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait until at most kPending of this thread's groups are under way.
template <int kPending>
LORA_FUSED_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

LORA_FUSED_DEVICE void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// ---- shared memory --------------------------------------------------------------------------------------

// Four 8 x 8 tiles of 16-bit elements; lane 8 i + j gives the address of row j of tile i.
LORA_FUSED_DEVICE void ldmatrix_x4(std::uint32_t (&r)[4], std::uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}

LORA_FUSED_DEVICE void ldmatrix_x4_trans(std::uint32_t (&r)[4], std::uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}

LORA_FUSED_DEVICE void ldmatrix_x2(std::uint32_t (&r)[2], std::uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared)
               : "memory");
}

LORA_FUSED_DEVICE void ldmatrix_x2_trans(std::uint32_t (&r)[2], std::uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared)
               : "memory");
}

LORA_FUSED_DEVICE std::uint32_t ld_shared_32(std::uint32_t shared) {
  std::uint32_t value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(shared) : "memory");
  return value;
}

LORA_FUSED_DEVICE uint4 ld_shared_128(std::uint32_t shared) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(shared)
               : "memory");
  return v;
}

LORA_FUSED_DEVICE void st_shared_16(std::uint32_t shared, std::uint16_t value) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(shared), "h"(value) : "memory");
}

LORA_FUSED_DEVICE void st_shared_32(std::uint32_t shared, std::uint32_t value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(shared), "r"(value) : "memory");
}

LORA_FUSED_DEVICE void st_shared_64(std::uint32_t shared, std::uint32_t v0, std::uint32_t v1) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(shared), "r"(v0), "r"(v1) : "memory");
}

LORA_FUSED_DEVICE void st_shared_128(std::uint32_t shared, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

// ---- tensor cores: c += a b, fp32 accumulators ----------------------------------------------------------

LORA_FUSED_DEVICE void mma_m16n8k16_bf16(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                         std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

LORA_FUSED_DEVICE void mma_m16n8k16_f16(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                        std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

LORA_FUSED_DEVICE void mma_m16n8k8_tf32(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                        std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// fp32 to the nearest TF32, ties away from zero; NaN stays NaN.
LORA_FUSED_DEVICE std::uint32_t cvt_rna_tf32(float value) {
  std::uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

// ---- global memory with cache hints ---------------------------------------------------------------------

// Read-only data that this SM needs once: past L1.
LORA_FUSED_DEVICE uint4 ld_global_once_128(const void* global) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(global));
  return v;
}

LORA_FUSED_DEVICE std::uint16_t ld_global_nc_16(const void* global) {
  std::uint16_t v;
  asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(v) : "l"(global));
  return v;
}

LORA_FUSED_DEVICE std::uint32_t ld_global_nc_32(const void* global) {
  std::uint32_t v;
  asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(global));
  return v;
}

LORA_FUSED_DEVICE std::uint64_t ld_global_nc_64(const void* global) {
  std::uint64_t v;
  asm volatile("ld.global.nc.u64 %0, [%1];" : "=l"(v) : "l"(global));
  return v;
}

// Written once and not read again by this kernel.
LORA_FUSED_DEVICE void st_global_streaming_128(void* global, uint4 v) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

// ---- order between blocks -------------------------------------------------------------------------------

// A ticket: the old value; counts 0, 1, ..., last, 0, ... so that the counter is back at 0 after last + 1
// calls. NOTE: acq_rel, because a relaxed atomic behind a block barrier does not release the other threads'
// stores.
LORA_FUSED_DEVICE std::uint32_t atom_inc_acq_rel(std::uint32_t* counter, std::uint32_t last) {
  std::uint32_t old;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(counter), "r"(last)
               : "memory");
  return old;
}

LORA_FUSED_DEVICE std::uint32_t atom_add_acq_rel(std::uint32_t* counter, std::uint32_t value) {
  std::uint32_t old;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(counter), "r"(value)
               : "memory");
  return old;
}

LORA_FUSED_DEVICE std::uint32_t ld_acquire(const std::uint32_t* flag) {
  std::uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}

LORA_FUSED_DEVICE void st_release(std::uint32_t* flag, std::uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

LORA_FUSED_DEVICE void st_relaxed(std::uint32_t* flag, std::uint32_t value) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

LORA_FUSED_DEVICE void red_add_release(std::uint32_t* flag, std::uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

LORA_FUSED_DEVICE void fence_acq_rel() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

LORA_FUSED_DEVICE std::uint64_t globaltimer() {
  std::uint64_t nanoseconds;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(nanoseconds));
  return nanoseconds;
}

LORA_FUSED_DEVICE void nanosleep(std::uint32_t nanoseconds) {
  asm volatile("nanosleep.u32 %0;" ::"r"(nanoseconds));
}

LORA_FUSED_DEVICE void trap() { asm volatile("trap;"); }

// ---- dependent launches (no effect below sm_90) ---------------------------------------------------------

LORA_FUSED_DEVICE void griddepcontrol_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

LORA_FUSED_DEVICE void griddepcontrol_launch_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace lora_fused::ptx
