// lora_fused._C.Layer: a whole direction of a layer in one call. It takes the tensors themselves, whose
// strides may change from call to call; that they fit the layer is checked in Python, once for all that look
// alike.
#include "arguments.h"
#include "cpu/layer.h"
#include "tensor.h"

namespace lora_fused {
namespace {

Layer make_layer(const std::string& isa, int dtype, i64 M, i64 N, i64 K, i64 R, int da_dtype, int db_dtype,
                 int threads) {
  check_sizes(M, N, K, R, threads);
  return {&kernels_of(isa), dtype_of(dtype), M, N, K, R, dtype_of(da_dtype), dtype_of(db_dtype), threads};
}

void* data_of(py::handle tensor) { return const_cast<void*>(matrix_of(tensor).data); }

void layer_forward(const Layer& layer, py::handle x, py::handle w, py::handle a, py::handle b,
                   py::handle bias, std::uintptr_t packed, float scale, u64 seed, i64 threshold, py::handle s,
                   py::handle y) {
  const LayerForward call{matrix_of(x),
                          matrix_of(w),
                          matrix_of(a),
                          matrix_of(b),
                          reinterpret_cast<const u32*>(packed),
                          data_of(bias),
                          scale,
                          seed,
                          threshold_of(threshold),
                          data_of(s),
                          data_of(y)};
  py::gil_scoped_release release;
  forward(layer, call);
}

void layer_backward(const Layer& layer, py::handle dy, py::handle x, py::handle s, py::handle w, py::handle a,
                    py::handle b, std::uintptr_t packed, float scale, u64 seed, i64 threshold, py::handle dx,
                    py::handle da, py::handle db) {
  const LayerBackward call{matrix_of(dy),
                           matrix_of(x),
                           matrix_of(w),
                           matrix_of(a),
                           matrix_of(b),
                           data_of(s),
                           reinterpret_cast<const u32*>(packed),
                           scale,
                           seed,
                           threshold_of(threshold),
                           data_of(dx),
                           data_of(da),
                           data_of(db)};
  py::gil_scoped_release release;
  backward(layer, call);
}

}  // namespace

void register_layer(py::module_& m) {
  m.def("bind_torch", bind_torch);
  m.def("facts", facts);
  py::class_<Layer>(m, "Layer")
      .def(py::init(&make_layer))
      .def("forward", layer_forward)
      .def("backward", layer_backward);
}

}  // namespace lora_fused
