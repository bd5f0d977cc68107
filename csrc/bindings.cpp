// lora_fused._C: the native entry points. Pointers arrive as integers, strides in elements; the Python side
// (lora_fused/backends/cpu.py) owns the checks of tensors, this side those of its own arguments.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "arguments.h"
#include "cpu/scratch.h"

namespace py = pybind11;

#if defined(LORA_FUSED_HAVE_CUDA)
namespace lora_fused::cuda {
void register_cuda(py::module_ m);  // cuda/cuda_bindings.cpp
}
#endif

namespace lora_fused {

void register_layer(py::module_& m);  // layer_bindings.cpp

namespace {

using Pointer = std::uintptr_t;

Matrix matrix(Pointer data, i64 row_stride, i64 col_stride) {
  return {reinterpret_cast<const void*>(data), row_stride, col_stride};
}

Output output(Pointer data, i64 row_stride, i64 col_stride, DType dtype) {
  return {reinterpret_cast<void*>(data), row_stride, col_stride, dtype};
}

void matmul(const std::string& isa, int dtype, i64 M, i64 N, i64 K, i64 R, Pointer x, i64 x_sm, i64 x_sk,
            Pointer w, i64 w_sk, i64 w_sn, Pointer packed, Pointer s, i64 s_sm, Pointer l, i64 l_sr, i64 l_sn,
            Pointer bias, bool accumulate, u64 seed, i64 threshold, Pointer y, i64 y_sm, int threads) {
  check_sizes(M, N, K, R, threads);
  const Kernels& kernels = kernels_of(isa);
  const DType type = dtype_of(dtype);
  const MatmulArgs args{M,
                        N,
                        K,
                        R,
                        matrix(x, x_sm, x_sk),
                        matrix(w, w_sk, w_sn),
                        matrix(s, s_sm, 1),
                        matrix(l, l_sr, l_sn),
                        reinterpret_cast<const u32*>(packed),
                        reinterpret_cast<const void*>(bias),
                        accumulate,
                        {seed, threshold_of(threshold), N},
                        output(y, y_sm, 1, type),
                        threads};
  py::gil_scoped_release release;
  kernels.matmul(type, args);
}

void shrink(const std::string& isa, int dtype, i64 M, i64 K, i64 R, Pointer x, i64 x_sm, i64 x_sk, Pointer a,
            i64 a_sr, i64 a_sk, float scale, u64 seed, i64 threshold, Pointer s, int threads) {
  check_sizes(M, K, R, 0, threads);
  const Kernels& kernels = kernels_of(isa);
  const DType type = dtype_of(dtype);
  const ShrinkArgs args{M,
                        K,
                        R,
                        matrix(x, x_sm, x_sk),
                        matrix(a, a_sr, a_sk),
                        scale,
                        {seed, threshold_of(threshold), K},
                        output(s, R, 1, type),
                        threads};
  py::gil_scoped_release release;
  kernels.shrink(type, args);
}

void shrink_reduce(const std::string& isa, int dtype, i64 M, i64 N, i64 R, Pointer dy, i64 dy_sm, i64 dy_sn,
                   Pointer b, i64 b_sn, i64 b_sr, float scale, Pointer ds, Pointer s, Pointer db,
                   int db_dtype, i64 db_sn, i64 db_sr, int threads) {
  check_sizes(M, N, R, 0, threads);
  const Kernels& kernels = kernels_of(isa);
  const DType type = dtype_of(dtype);
  const ShrinkReduceArgs args{M,
                              N,
                              R,
                              matrix(dy, dy_sm, dy_sn),
                              matrix(b, b_sn, b_sr),
                              matrix(s, R, 1),
                              scale,
                              output(ds, R, 1, type),
                              output(db, db_sn, db_sr, dtype_of(db_dtype)),
                              threads};
  py::gil_scoped_release release;
  kernels.shrink_reduce(type, args);
}

void reduce(const std::string& isa, int dtype, i64 M, i64 K, i64 R, Pointer ds, Pointer x, i64 x_sm, i64 x_sk,
            u64 seed, i64 threshold, Pointer da, int da_dtype, i64 da_sr, i64 da_sk, int threads) {
  check_sizes(M, K, R, 0, threads);
  const Kernels& kernels = kernels_of(isa);
  const DType type = dtype_of(dtype);
  const ReduceArgs args{M,
                        K,
                        R,
                        matrix(ds, R, 1),
                        matrix(x, x_sm, x_sk),
                        {seed, threshold_of(threshold), K},
                        output(da, da_sr, da_sk, dtype_of(da_dtype)),
                        threads};
  py::gil_scoped_release release;
  kernels.reduce(type, args);
}

i64 packed_bytes(const std::string& isa, int dtype, i64 K, i64 N) {
  check_sizes(K, N, 0, 0, 1);
  return kernels_of(isa).packed_bytes(dtype_of(dtype), K, N);
}

void pack(const std::string& isa, int dtype, i64 K, i64 N, Pointer w, i64 w_sk, i64 w_sn, Pointer out,
          int threads) {
  check_sizes(K, N, 0, 0, threads);
  const Kernels& kernels = kernels_of(isa);
  const DType type = dtype_of(dtype);
  const PackArgs args{K, N, matrix(w, w_sk, w_sn), reinterpret_cast<u32*>(out), threads};
  py::gil_scoped_release release;
  kernels.pack(type, args);
}

void keep_mask(const std::string& isa, u64 seed, i64 threshold, i64 M, i64 K, Pointer out) {
  check_sizes(M, K, 0, 0, 1);
  kernels_of(isa).keep_mask({seed, threshold_of(threshold), K}, M, reinterpret_cast<unsigned char*>(out));
}

std::vector<std::string> names(const std::vector<const Kernels*>& list) {
  std::vector<std::string> result;
  for (const Kernels* kernels : list) result.push_back(kernels->isa);
  return result;
}

py::dict describe_cpu() {
  const CpuInfo info = cpu_info();
  using namespace py::literals;
  return py::dict("vendor"_a = info.vendor, "family"_a = info.family, "model"_a = info.model,
                  "brand"_a = info.brand, "flags"_a = info.flags);
}

}  // namespace
}  // namespace lora_fused

PYBIND11_MODULE(_C, m) {
  using namespace lora_fused;
  m.doc() = "Native kernels of lora_fused. Not a public interface.";
  m.def("compiled_isas", [] { return names(compiled_kernels()); });
  m.def("supported_isas", [] { return names(supported_kernels()); });
  m.def("cpu_info", describe_cpu);
  m.def("scratch_bytes", [] { return scratch_bytes(); });
  m.def("matmul", matmul);
  m.def("packed_bytes", packed_bytes);
  m.def("pack", pack);
  m.def("shrink", shrink);
  m.def("shrink_reduce", shrink_reduce);
  m.def("reduce", reduce);
  m.def("keep_mask", keep_mask);
  register_layer(m);
#if defined(LORA_FUSED_HAVE_CUDA)
  cuda::register_cuda(m.def_submodule("cuda"));
#endif
}
