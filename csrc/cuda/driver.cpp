#include "driver.h"

#include <map>
#include <memory>
#include <mutex>

namespace lora_fused::cuda {
namespace {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// What is missing, where the machine cannot run CUDA at all; null for every other code.
const char* missing(cudaError_t code) {
  if (code == cudaErrorInsufficientDriver || code == cudaErrorStubLibrary) return "no CUDA driver: ";
  return code == cudaErrorNoDevice ? "no CUDA device: " : nullptr;
}

std::string subject(const std::string& who, const std::string& problem) {
  return problem.empty() ? who : who + " (" + problem + ")";
}

void* driver_function(const char* name, unsigned version, cudaDriverEntryPointQueryResult* status) {
  void* function = nullptr;
#if CUDART_VERSION >= 12050
  const cudaError_t code =
      cudaGetDriverEntryPointByVersion(name, &function, version, cudaEnableDefault, status);
#else
  (void)version;  // 12.4 has no ByVersion; its own version is the one that was asked for
  const cudaError_t code = cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, status);
#endif
  check(code, "lora_fused", name, "driver entry point");
  return function;
}

// NOTE: a static local is filled by one thread only, and an exception leaves it empty for the next try.
EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    cudaDriverEntryPointQueryResult status = cudaDriverEntryPointSymbolNotFound;
    void* found = driver_function("cuTensorMapEncodeTiled", 12000, &status);
    if (status != cudaDriverEntryPointSuccess || found == nullptr)
      throw CudaError("lora_fused: this driver has no cuTensorMapEncodeTiled, which needs CUDA 12.0 or later",
                      cudaErrorNotSupported);
    return reinterpret_cast<EncodeTiled>(found);
  }();
  return function;
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "lora_fused", "device " + std::to_string(device),
        "device attribute");
  return value;
}

std::string device_name(int device) {
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, device), "lora_fused", "device " + std::to_string(device),
        "device properties");
  return properties.name;
}

DeviceProperties read_properties(int device) {
  DeviceProperties p;
  p.name = device_name(device);
  p.capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
                 attribute(cudaDevAttrComputeCapabilityMinor, device);
  p.sms = attribute(cudaDevAttrMultiProcessorCount, device);
  p.shared_bytes_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  p.shared_bytes_per_sm = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  p.registers_per_sm = attribute(cudaDevAttrMaxRegistersPerMultiprocessor, device);
  p.threads_per_sm = attribute(cudaDevAttrMaxThreadsPerMultiProcessor, device);
  p.l2_bytes = attribute(cudaDevAttrL2CacheSize, device);
  check(cudaDriverGetVersion(&p.driver_version), "lora_fused", "", "driver version");
  return p;
}

std::uint32_t element_bytes(CUtensorMapDataType dtype) {
  switch (dtype) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8:
      return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
      return 2;
    case CU_TENSOR_MAP_DATA_TYPE_INT64:
    case CU_TENSOR_MAP_DATA_TYPE_UINT64:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT64:
      return 8;
    default:
      return 4;
  }
}

std::uint32_t swizzle_bytes(CUtensorMapSwizzle swizzle) {
  switch (swizzle) {
    case CU_TENSOR_MAP_SWIZZLE_32B:
      return 32;
    case CU_TENSOR_MAP_SWIZZLE_64B:
      return 64;
    case CU_TENSOR_MAP_SWIZZLE_128B:
      return 128;
    default:
      return 0;
  }
}

std::string expected(const std::string& what, std::uint64_t got, const std::string& wanted) {
  return what + ": got " + std::to_string(got) + ", expected " + wanted;
}

std::string box_problem(const TensorMapRequest& r) {
  for (int d = 0; d < r.rank; ++d)
    if (r.box[d] < 1 || r.box[d] > 256)
      return expected("box of dimension " + std::to_string(d), r.box[d], "1 to 256 elements");
  const std::uint64_t row = std::uint64_t{r.box[0]} * element_bytes(r.dtype);
  if (row % 16 != 0) return expected("row of the box", row, "a multiple of 16 bytes");
  const std::uint32_t widest = swizzle_bytes(r.swizzle);
  if (widest != 0 && row > widest)
    return expected("row of the box", row, "at most the " + std::to_string(widest) + " bytes of the swizzle");
  return "";
}

}  // namespace

void check(cudaError_t code, const std::string& who, const std::string& problem, const char* step) {
  if (code == cudaSuccess) return;
  // Take the error off the thread's state: the next launch, torch's too, must not report it again.
  (void)cudaGetLastError();
  const std::string where = subject(who, problem) + ": ";
  if (const char* what = missing(code)) throw CudaError(where + what + cudaGetErrorString(code), code);
  throw CudaError(where + step + ": " + cudaGetErrorName(code) + ": " + cudaGetErrorString(code), code);
}

int device_count() noexcept {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  (void)cudaGetLastError();
  return 0;
}

const DeviceProperties& device_properties(int device) {
  static std::mutex mutex;
  static std::map<int, std::unique_ptr<const DeviceProperties>> known;
  const std::lock_guard<std::mutex> lock(mutex);
  auto& entry = known[device];
  if (entry == nullptr) {
    int count = 0;
    check(cudaGetDeviceCount(&count), "lora_fused", "device " + std::to_string(device), "device count");
    if (device < 0 || device >= count)
      throw std::invalid_argument("device: got " + std::to_string(device) + ", expected 0 to " +
                                  std::to_string(count - 1));
    entry = std::make_unique<const DeviceProperties>(read_properties(device));
  }
  return *entry;
}

DeviceGuard::DeviceGuard(int device) {
  const std::string problem = "device " + std::to_string(device);
  int current = -1;
  check(cudaGetDevice(&current), "lora_fused", problem, "current device");
  if (current == device) return;
  check(cudaSetDevice(device), "lora_fused", problem, "set device");
  previous_ = current;
}

DeviceGuard::~DeviceGuard() {
  if (previous_ >= 0) (void)cudaSetDevice(previous_);
}

std::string tensor_map_problem(const TensorMapRequest& r) {
  if (r.rank < 1 || r.rank > 5) return expected("rank", static_cast<std::uint64_t>(r.rank), "1 to 5");
  if (reinterpret_cast<std::uintptr_t>(r.data) % 16 != 0)
    return expected("address modulo 16", reinterpret_cast<std::uintptr_t>(r.data) % 16, "0");
  for (int d = 0; d < r.rank; ++d)
    if (r.size[d] < 1 || r.size[d] > (std::uint64_t{1} << 32))
      return expected("size of dimension " + std::to_string(d), r.size[d], "1 to 2^32");
  for (int d = 0; d + 1 < r.rank; ++d)
    if (r.stride_bytes[d] % 16 != 0 || r.stride_bytes[d] >= (std::uint64_t{1} << 40))
      return expected("stride of dimension " + std::to_string(d + 1), r.stride_bytes[d],
                      "a multiple of 16 bytes below 2^40");
  return box_problem(r);
}

CUtensorMap encode_tensor_map(const char* kernel, const TensorMapRequest& r) {
  const std::string problem = tensor_map_problem(r);
  if (!problem.empty())
    throw std::invalid_argument(std::string(kernel) + ": tensor map of " + r.tensor + ": " + problem);
  const std::uint32_t element_strides[5] = {1, 1, 1, 1, 1};
  CUtensorMap map{};
  const CUresult result =
      encode_tiled()(&map, r.dtype, static_cast<std::uint32_t>(r.rank), const_cast<void*>(r.data), r.size,
                     r.stride_bytes, r.box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, r.swizzle,
                     r.l2_promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw CudaError(std::string(kernel) + ": tensor map of " + r.tensor + ": the driver refused it, code " +
                        std::to_string(static_cast<int>(result)),
                    static_cast<int>(result));
  return map;
}

}  // namespace lora_fused::cuda
