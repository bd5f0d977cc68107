#include "launch.h"

#include <map>
#include <mutex>
#include <tuple>

#include "launchers.h"

namespace lora_fused::cuda {
namespace {

constexpr std::size_t kSharedWithoutOptIn = 48 * 1024;
constexpr int kFirstWithDependentLaunch = 90;

// The largest dynamic shared memory that was asked for so far, per device and kernel.
// NOTE: a mutex, not thread-local state: the attribute belongs to the context, and launches are microseconds
// apart.
cudaError_t allow_shared_bytes(const void* function, int device, std::size_t bytes) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, std::size_t> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  std::size_t& known = allowed[{device, function}];
  if (bytes <= known) return cudaSuccess;
  const cudaError_t code =
      cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (code == cudaSuccess) known = bytes;
  return code;
}

// The attributes of one launch; returns how many were written.
unsigned write_attributes(const Launch& how, int capability, cudaLaunchAttribute (&attributes)[2]) {
  unsigned count = 0;
  if (how.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = how.cluster;
    attributes[count].val.clusterDim.y = 1;
    attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  if (how.dependent && capability >= kFirstWithDependentLaunch) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count].val.programmaticStreamSerializationAllowed = 1;
    ++count;
  }
  return count;
}

}  // namespace

cudaError_t launch_raw(const Launch& how, void** args, const char** step) {
  if (how.grid.x == 0 || how.grid.y == 0 || how.grid.z == 0) return cudaSuccess;
  int device = 0;
  *step = "current device";
  if (const cudaError_t code = cudaGetDevice(&device); code != cudaSuccess) return code;
  if (how.shared_bytes > kSharedWithoutOptIn) {
    *step = "shared memory opt-in";
    const cudaError_t code = allow_shared_bytes(how.kernel.function, device, how.shared_bytes);
    if (code != cudaSuccess) return code;
  }
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = how.grid;
  config.blockDim = how.block;
  config.dynamicSmemBytes = how.shared_bytes;
  config.stream = how.stream;
  config.attrs = attributes;
  config.numAttrs =
      write_attributes(how, how.dependent ? device_properties(device).capability : 0, attributes);
  *step = "launch";
  return cudaLaunchKernelExC(&config, how.kernel.function, args);
}

void refuse(const char* what, i64 got, const std::string& expected) {
  throw std::invalid_argument(std::string(what) + ": got " + std::to_string(got) + ", expected " + expected);
}

unsigned grid_size(std::int64_t blocks) {
  if (blocks < 0 || blocks > 0x7fffffff) refuse("blocks of the grid", blocks, "at most 2^31 - 1");
  return static_cast<unsigned>(blocks);
}

int resident_blocks_per_sm(const Kernel& kernel, int threads, std::size_t shared_bytes) {
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, int, std::size_t>, int> known;
  int device = 0;
  check(cudaGetDevice(&device), kernel.name, "", "current device");
  const std::lock_guard<std::mutex> lock(mutex);
  int& blocks = known[{device, kernel.function, threads, shared_bytes}];
  if (blocks > 0) return blocks;
  if (shared_bytes > kSharedWithoutOptIn)
    check(allow_shared_bytes(kernel.function, device, shared_bytes), kernel.name, "", "shared memory opt-in");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel.function, threads, shared_bytes),
        kernel.name, "", "occupancy");
  return blocks;
}

}  // namespace lora_fused::cuda
