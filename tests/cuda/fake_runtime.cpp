// A CUDA runtime without a GPU, for tests: the module's own objects are linked with this instead of
// libcudart. It knows the devices it is told about, records every call, fails where it is asked to, and hands
// launches and tensor maps to Python, which may execute the kernel in the emulator.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace py = pybind11;

namespace lora_fused::cuda {
void register_cuda(py::module_ m);
}

namespace {

struct State {
  std::recursive_mutex mutex;
  std::vector<std::map<std::string, int>> devices;
  std::map<std::string, int> failures;       // function -> the code of every call
  std::map<const void*, std::string> names;  // host function -> kernel
  std::vector<std::map<std::string, std::string>> calls;
  unsigned long long capture = 0;
  py::object on_launch, on_tensor_map;
};

State& state() {
  static State* instance =
      new State;  // never destroyed: kernels are unregistered after the interpreter is gone
  return *instance;
}

thread_local int current_device = 0;

using Call = std::map<std::string, std::string>;

cudaError_t record(const char* function, Call call = {}) {
  const std::lock_guard<std::recursive_mutex> lock(state().mutex);
  call["function"] = function;
  call["device"] = std::to_string(current_device);
  state().calls.push_back(call);
  const auto failure = state().failures.find(function);
  return failure == state().failures.end() ? cudaSuccess : static_cast<cudaError_t>(failure->second);
}

std::string text(dim3 d) {
  return std::to_string(d.x) + "," + std::to_string(d.y) + "," + std::to_string(d.z);
}

std::string name_of(const void* function) {
  const auto found = state().names.find(function);
  return found == state().names.end() ? "?" : found->second;
}

Call describe(const cudaLaunchConfig_t& config, const void* function) {
  Call call{{"kernel", name_of(function)},
            {"grid", text(config.gridDim)},
            {"block", text(config.blockDim)},
            {"shared", std::to_string(config.dynamicSmemBytes)},
            {"stream", std::to_string(reinterpret_cast<std::uintptr_t>(config.stream))}};
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension)
      call["cluster"] = std::to_string(attribute.val.clusterDim.x) + "," +
                        std::to_string(attribute.val.clusterDim.y) + "," +
                        std::to_string(attribute.val.clusterDim.z);
    else if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization)
      call["dependent"] = std::to_string(attribute.val.programmaticStreamSerializationAllowed);
    else
      call["attribute"] = std::to_string(attribute.id);
  }
  return call;
}

CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType dtype, cuuint32_t rank, void* address,
                      const cuuint64_t* size, const cuuint64_t* stride, const cuuint32_t* box,
                      const cuuint32_t* element_stride, CUtensorMapInterleave interleave,
                      CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                      CUtensorMapFloatOOBfill fill) {
  const cudaError_t code = record("cuTensorMapEncodeTiled");
  if (code != cudaSuccess) return static_cast<CUresult>(code);
  py::gil_scoped_acquire gil;
  using namespace py::literals;
  const py::dict request(
      "dtype"_a = static_cast<int>(dtype), "address"_a = reinterpret_cast<std::uintptr_t>(address),
      "size"_a = std::vector<std::uint64_t>(size, size + rank),
      "stride_bytes"_a = std::vector<std::uint64_t>(stride, stride + rank - 1),
      "box"_a = std::vector<std::uint32_t>(box, box + rank),
      "element_stride"_a = std::vector<std::uint32_t>(element_stride, element_stride + rank),
      "interleave"_a = static_cast<int>(interleave), "swizzle"_a = static_cast<int>(swizzle),
      "l2_promotion"_a = static_cast<int>(promotion), "fill"_a = static_cast<int>(fill));
  if (state().on_tensor_map) {
    const auto bytes = state().on_tensor_map(request).cast<std::string>();
    std::copy_n(bytes.data(), std::min(bytes.size(), sizeof *map), reinterpret_cast<char*>(map));
  }
  return CUDA_SUCCESS;
}

}  // namespace

// ---- what nvcc's host code calls --------------------------------------------------------------------------

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*,
                            dim3*, int*) {
  state().names[host] = name;
}
char __cudaInitModule(void**) { return 0; }
unsigned __cudaPushCallConfiguration(dim3, dim3, std::size_t, CUstream_st*) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, std::size_t*, void*) { return cudaErrorUnknown; }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaErrorUnknown; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, std::size_t, cudaStream_t) {
  return cudaErrorUnknown;
}
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, std::size_t, cudaStream_t) {
  return cudaErrorUnknown;
}

// ---- what the launchers call ------------------------------------------------------------------------------

const char* cudaGetErrorName(cudaError_t code) {
  static thread_local std::string name;
  name = "cudaError" + std::to_string(static_cast<int>(code));
  return name.c_str();
}
const char* cudaGetErrorString(cudaError_t) { return "as the test asked"; }
cudaError_t cudaGetLastError() { return record("cudaGetLastError"); }
cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return record("cudaDriverGetVersion");
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = static_cast<int>(state().devices.size());
  return record("cudaGetDeviceCount");
}
cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return record("cudaGetDevice");
}
cudaError_t cudaSetDevice(int device) {
  const cudaError_t code = record("cudaSetDevice", {{"to", std::to_string(device)}});
  if (code == cudaSuccess) current_device = device;
  return code;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  static const std::map<int, const char*> names = {
      {cudaDevAttrComputeCapabilityMajor, "major"},
      {cudaDevAttrComputeCapabilityMinor, "minor"},
      {cudaDevAttrMultiProcessorCount, "sms"},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, "shared_bytes_per_block"},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, "shared_bytes_per_sm"},
      {cudaDevAttrMaxRegistersPerMultiprocessor, "registers_per_sm"},
      {cudaDevAttrMaxThreadsPerMultiProcessor, "threads_per_sm"},
      {cudaDevAttrL2CacheSize, "l2_bytes"}};
  *value = state().devices.at(device).at(names.at(attribute));
  return record("cudaDeviceGetAttribute");
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  std::copy_n("Fake GPU", 9, properties->name);
  return record("cudaGetDeviceProperties");
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  return record("cudaFuncSetAttribute", {{"kernel", name_of(function)},
                                         {"attribute", std::to_string(attribute)},
                                         {"value", std::to_string(value)}});
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function, int threads,
                                                          std::size_t shared) {
  *blocks = 2;
  return record("cudaOccupancyMaxActiveBlocksPerMultiprocessor", {{"kernel", name_of(function)},
                                                                  {"threads", std::to_string(threads)},
                                                                  {"shared", std::to_string(shared)}});
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned version,
                                             unsigned long long, cudaDriverEntryPointQueryResult* status) {
  *function = reinterpret_cast<void*>(&encode_tiled);
  *status = cudaDriverEntryPointSuccess;
  return record("cudaGetDriverEntryPointByVersion",
                {{"symbol", symbol}, {"version", std::to_string(version)}});
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t*, const cudaGraphNode_t**, const cudaGraphEdgeData**,
                                     std::size_t*) {
  *id = state().capture;
  *status = state().capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return record("cudaStreamGetCaptureInfo");
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** args) {
  const Call call = describe(*config, function);
  const cudaError_t code = record("cudaLaunchKernelExC", call);
  if (code != cudaSuccess) return code;
  py::gil_scoped_acquire gil;
  if (state().on_launch) state().on_launch(call, reinterpret_cast<std::uintptr_t>(args[0]));
  return cudaSuccess;
}

}  // extern "C"

PYBIND11_MODULE(fake_cuda, m) {
  m.doc() = "lora_fused._C.cuda on a runtime that records what it is asked.";
  lora_fused::cuda::register_cuda(m);
  py::module_ control = m.def_submodule("control");
  control.def("reset", [](const std::vector<std::map<std::string, int>>& devices) {
    const std::lock_guard<std::recursive_mutex> lock(state().mutex);
    state().devices = devices;
    state().failures.clear();
    state().calls.clear();
    state().capture = 0;
    state().on_launch = py::object();
    state().on_tensor_map = py::object();
    current_device = 0;
  });
  control.def("fail", [](const std::string& function, int code) { state().failures[function] = code; });
  control.def("capture", [](unsigned long long id) { state().capture = id; });
  control.def("calls", [] { return state().calls; });
  control.def("kernels", [] {
    std::vector<std::string> names;
    for (const auto& [host, name] : state().names) names.push_back(name);
    return names;
  });
  control.def("on_launch", [](const py::object& function) { state().on_launch = function; });
  control.def("on_tensor_map", [](const py::object& function) { state().on_tensor_map = function; });
}
