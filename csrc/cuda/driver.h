// The CUDA runtime and driver as the launchers see them: every return code becomes an exception that says in
// one sentence which kernel and which problem it hit. The runtime is linked statically and libcuda is reached
// at run time, through the runtime's driver entry point, so that the module imports on machines without a
// driver.
//
// All functions may be called from several threads at once.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace lora_fused::cuda {

// what() is one sentence: "<kernel> (<problem>): <step>: <name of the code>: <CUDA's words>".
class CudaError : public std::runtime_error {
 public:
  CudaError(const std::string& sentence, int code) : std::runtime_error(sentence), code_(code) {}
  int code() const { return code_; }

 private:
  int code_;
};

// Throws CudaError unless code is cudaSuccess. `who` is a kernel's name or "lora_fused", `problem` may be
// empty, `step` is what was attempted ("launch", "shared memory opt-in", ...).
void check(cudaError_t code, const std::string& who, const std::string& problem, const char* step);

// What the launchers and the candidate lists ask about a device; read once per device and then remembered.
struct DeviceProperties {
  std::string name;
  int capability = 0;              // 80 for sm_80, 90 for sm_90, ...
  int sms = 0;                     // multiprocessors
  int shared_bytes_per_block = 0;  // with opt-in
  int shared_bytes_per_sm = 0;
  int registers_per_sm = 0;
  int threads_per_sm = 0;
  std::int64_t l2_bytes = 0;
  int driver_version = 0;  // 12040 for 12.4
};

// Devices that the runtime sees; 0 where there is no driver or no device. Never throws.
int device_count() noexcept;

// Throws std::invalid_argument for a device that is not there, CudaError "... no CUDA driver ..." without a
// driver.
const DeviceProperties& device_properties(int device);

// Makes `device` current for the calling thread and puts the previous one back.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = -1;  // -1: nothing to put back
};

// A tiled tensor map without element strides and interleaving. Sizes and box are in elements, innermost
// dimension first; strides are in bytes, of the dimensions from the second on. Out-of-bounds elements read as
// zero.
struct TensorMapRequest {
  const char* tensor = "";  // its name in messages: "x", "weight"
  CUtensorMapDataType dtype = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const void* data = nullptr;
  int rank = 2;  // 1 to 5
  std::uint64_t size[5] = {};
  std::uint64_t stride_bytes[4] = {};
  std::uint32_t box[5] = {};
  CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_128B;
  CUtensorMapL2promotion l2_promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B;
};

// Why the hardware cannot describe this tensor (16-byte address and strides, boxes of at most 256 elements,
// rows no wider than the swizzle); empty where it can. Asks no driver.
std::string tensor_map_problem(const TensorMapRequest& request);

// cuTensorMapEncodeTiled. Throws std::invalid_argument with tensor_map_problem's sentence, CudaError for what
// the driver refuses.
CUtensorMap encode_tensor_map(const char* kernel, const TensorMapRequest& request);

}  // namespace lora_fused::cuda
