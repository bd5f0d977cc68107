// What the native entry points refuse, each in one sentence.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "cpu/isa.h"
#include "problem.h"

namespace lora_fused {

namespace py = pybind11;

inline const Kernels& kernels_of(const std::string& isa) {
  std::string names;
  for (const Kernels* kernels : supported_kernels()) {
    if (isa == kernels->isa) return *kernels;
    names += (names.empty() ? "" : ", ") + std::string(kernels->isa);
  }
  throw py::value_error("isa: got '" + isa +
                        "', expected one that this CPU runs: " + (names.empty() ? "none" : names));
}

inline DType dtype_of(int code) {
  if (code < 0 || code > 2)
    throw py::value_error("dtype: got code " + std::to_string(code) +
                          ", expected 0 (fp32), 1 (bf16) or 2 (fp16)");
  return static_cast<DType>(code);
}

inline void check_sizes(i64 first, i64 second, i64 third, i64 fourth, int threads) {
  if (first < 0 || second < 0 || third < 0 || fourth < 0)
    throw py::value_error("sizes: got a negative one, expected all >= 0");
  if (threads < 1) throw py::value_error("threads: got " + std::to_string(threads) + ", expected at least 1");
}

inline u32 threshold_of(i64 threshold) {
  if (threshold < 0 || threshold > 65536)
    throw py::value_error("threshold: got " + std::to_string(threshold) + ", expected 0 to 65536");
  return static_cast<u32>(threshold);
}

}  // namespace lora_fused
