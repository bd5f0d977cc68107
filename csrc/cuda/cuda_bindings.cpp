// lora_fused._C.cuda: the native entry points of the CUDA backend. Pointers and streams arrive as integers,
// strides in elements; lora_fused/backends/cuda.py owns the checks of tensors, the launchers those of their
// own arguments.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "driver.h"

namespace py = pybind11;

namespace lora_fused::cuda {
namespace {

py::dict describe_device(int device) {
  const DeviceProperties& p = device_properties(device);
  using namespace py::literals;
  return py::dict("name"_a = p.name, "capability"_a = p.capability, "sms"_a = p.sms,
                  "shared_bytes_per_block"_a = p.shared_bytes_per_block,
                  "shared_bytes_per_sm"_a = p.shared_bytes_per_sm, "registers_per_sm"_a = p.registers_per_sm,
                  "threads_per_sm"_a = p.threads_per_sm, "l2_bytes"_a = p.l2_bytes,
                  "driver_version"_a = p.driver_version);
}

}  // namespace

void register_cuda(py::module_ m) {
  m.doc() = "CUDA kernels of lora_fused. Not a public interface.";
  py::register_exception<CudaError>(m, "CudaError", PyExc_RuntimeError);
  m.def("device_count", device_count);
  m.def("device_properties", describe_device);
}

}  // namespace lora_fused::cuda
