#include "tensor.h"

#include <cstring>

namespace lora_fused {
namespace {

namespace py = pybind11;

// As dmlc/dlpack 1.3 lays them out (include/dlpack/dlpack.h); they are fixed within a major version.
struct DLDevice {
  std::int32_t type, id;
};
struct DLDataType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  std::int32_t dims;
  DLDataType dtype;
  i64* shape;
  i64* strides;
  u64 byte_offset;
};
struct DLPackExchangeAPI {
  u32 major, minor;
  const void* previous;
  void (*allocate)();
  void (*to_managed)();
  void (*from_managed)();
  int (*read)(void* tensor, DLTensor* out);
  void (*current_stream)();
};
constexpr u32 kMajor = 1;

struct Torch {
  PyTypeObject *tensor = nullptr, *parameter = nullptr;
  const DLPackExchangeAPI* api = nullptr;
} torch;

const DLPackExchangeAPI* exchange_api_of(const py::type& tensor) {
  const py::object capsule = py::getattr(tensor, "__dlpack_c_exchange_api__", py::none());
  if (capsule.is_none()) return nullptr;
  const void* found = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
  if (found == nullptr) throw py::error_already_set();
  const auto* api = static_cast<const DLPackExchangeAPI*>(found);
  return api->major == kMajor ? api : nullptr;
}

Matrix read_by_methods(py::handle tensor) {
  const auto data = reinterpret_cast<const void*>(py::cast<std::uintptr_t>(tensor.attr("data_ptr")()));
  const py::tuple strides = tensor.attr("stride")(), shape = tensor.attr("shape");
  if (strides.size() == 2) return {data, py::cast<i64>(strides[0]), py::cast<i64>(strides[1])};
  return {data, shape.size() == 0 ? 1 : py::cast<i64>(shape[shape.size() - 1]), 1};
}

// The facts of several tensors, one after the other.
class Facts {
 public:
  // False where they cannot be told from those of another tensor.
  bool add(py::handle tensor, bool with_strides) {
    if (tensor.is_none()) return put('0');
    const bool is_parameter = Py_TYPE(tensor.ptr()) == torch.parameter;
    if (!is_parameter && Py_TYPE(tensor.ptr()) != torch.tensor) return false;
    DLTensor read;
    if (torch.api->read(tensor.ptr(), &read) != 0) {
      PyErr_Clear();
      return false;
    }
    static PyObject* const requires_grad = PyUnicode_InternFromString("requires_grad");
    static PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
    const py::object grad = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor.ptr(), requires_grad));
    const py::object negative =
        py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor.ptr(), is_neg));
    if (!grad || !negative) throw py::error_already_set();
    const std::size_t dims = static_cast<std::size_t>(read.dims);
    return put(is_parameter ? 'p' : 't') && put(grad.ptr() == Py_True) && put(negative.ptr() == Py_True) &&
           put(read.device) && put(read.dtype) && put(read.dims) && put(read.shape, dims) &&
           (!with_strides || put(read.strides, dims));
  }

  py::bytes bytes() const { return py::bytes(buffer_, size_); }

 private:
  template <class T>
  bool put(const T& value) {
    return put(&value, 1);
  }

  template <class T>
  bool put(const T* values, std::size_t count) {
    const std::size_t bytes = count * sizeof(T);
    if (size_ + bytes > sizeof buffer_) return false;
    std::memcpy(buffer_ + size_, values, bytes);
    size_ += bytes;
    return true;
  }

  char buffer_[1024];
  std::size_t size_ = 0;
};

}  // namespace

void bind_torch(py::type tensor, py::type parameter) {
  torch.tensor = reinterpret_cast<PyTypeObject*>(tensor.ptr());
  torch.parameter = reinterpret_cast<PyTypeObject*>(parameter.ptr());
  torch.api = exchange_api_of(tensor);
}

Matrix matrix_of(py::handle tensor) {
  if (tensor.is_none()) return {};
  if (torch.api == nullptr) return read_by_methods(tensor);
  DLTensor read;
  if (torch.api->read(tensor.ptr(), &read) != 0) throw py::error_already_set();
  const char* data = static_cast<const char*>(read.data) + read.byte_offset;
  if (read.dims == 2) return {data, read.strides[0], read.strides[1]};
  return {data, read.dims == 0 ? 1 : read.shape[read.dims - 1], 1};
}

py::object facts(py::handle x, py::handle weight, py::handle lora_A, py::handle lora_B, py::handle bias) {
  Facts all;
  const bool known = torch.api != nullptr && all.add(x, false) && all.add(weight, true) &&
                     all.add(lora_A, false) && all.add(lora_B, false) && all.add(bias, false);
  return known ? py::object(all.bytes()) : py::none();
}

}  // namespace lora_fused
