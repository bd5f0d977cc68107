// lora_fused._C.cuda: the native entry points of the CUDA backend. Pointers and streams arrive as integers,
// strides in elements; lora_fused/backends/cuda.py owns the checks of tensors, the launchers those of their
// own arguments.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "launchers.h"
#include "sm80/launcher.h"
#include "sm90/launcher.h"

namespace py = pybind11;

namespace lora_fused::cuda {
namespace {

using Pointer = std::uintptr_t;
using MatrixTuple = std::tuple<Pointer, i64, i64>;             // data, row stride, column stride
using OutputTuple = std::tuple<Pointer, i64, i64, int>;        // data, row stride, column stride, DType
using MaskTuple = std::tuple<Pointer, u64, i64>;               // seed on the device or null, seed, threshold
using WorkspaceTuple = std::tuple<Pointer, Pointer, Pointer>;  // partials, tickets, error
using WhereTuple = std::tuple<int, Pointer, bool>;             // device, stream, dependent

Math math_of(int code) {
  if (code < 0 || code >= kMaths) refuse("dtype", code, "0 (fp32), 1 (bf16), 2 (fp16) or 3 (TF32)");
  return static_cast<Math>(code);
}

void check_size(const char* what, i64 size) {
  if (size < 0) refuse(what, size, "at least 0");
}

Matrix matrix(const MatrixTuple& m) {
  return {reinterpret_cast<const void*>(std::get<0>(m)), std::get<1>(m), std::get<2>(m)};
}

Output output(const OutputTuple& m) {
  if (std::get<3>(m) < 0 || std::get<3>(m) > 2)
    refuse("output dtype", std::get<3>(m), "0 (fp32), 1 (bf16) or 2 (fp16)");
  return {reinterpret_cast<void*>(std::get<0>(m)), std::get<1>(m), std::get<2>(m),
          static_cast<DType>(std::get<3>(m))};
}

Mask mask(const MaskTuple& m, i64 row_length) {
  const i64 threshold = std::get<2>(m);
  if (threshold < 0 || threshold > 65536) refuse("threshold", threshold, "0 to 65536");
  return {reinterpret_cast<const u64*>(std::get<0>(m)), std::get<1>(m), row_length,
          static_cast<u32>(threshold)};
}

Workspace workspace(const WorkspaceTuple& w) {
  return {reinterpret_cast<float*>(std::get<0>(w)), reinterpret_cast<u32*>(std::get<1>(w)),
          reinterpret_cast<u32*>(std::get<2>(w))};
}

// Launch on the device and stream of `where`, without the interpreter's lock.
template <class Problem>
void launch_at(const WhereTuple& where, void (*launcher)(Math, const Problem&, cudaStream_t, bool), Math math,
               const Problem& problem) {
  py::gil_scoped_release release;
  const DeviceGuard guard(std::get<0>(where));
  launcher(math, problem, reinterpret_cast<cudaStream_t>(std::get<1>(where)), std::get<2>(where));
}

template <class Problem>
std::tuple<i64, i64> words_of(Math math, const Problem& problem) {
  const WorkspaceSize size = workspace_of(math, problem);
  return {size.partials, size.tickets};
}

void shrink(const WhereTuple& where, int math, i64 M, i64 K, i64 R, const MatrixTuple& x,
            const MatrixTuple& a, const MaskTuple& dropout, float scale, const OutputTuple& s, int splits,
            const WorkspaceTuple& space) {
  check_size("M", M), check_size("K", K), check_size("R", R);
  launch_at(where, launch_shrink, math_of(math),
            ShrinkLaunch{M, K, R, matrix(x), matrix(a), mask(dropout, K), output(s), workspace(space), scale,
                         splits});
}

std::tuple<i64, i64> shrink_workspace(int math, i64 M, i64 R, int splits) {
  ShrinkLaunch p{};
  p.M = M, p.R = R, p.splits = splits;
  return words_of(math_of(math), p);
}

// P, z, t, mask, out
using GradientTuple = std::tuple<i64, MatrixTuple, MatrixTuple, MaskTuple, OutputTuple>;

Gradient gradient(const GradientTuple& g) {
  check_size("columns", std::get<0>(g));
  return {std::get<0>(g), matrix(std::get<1>(g)), matrix(std::get<2>(g)),
          mask(std::get<3>(g), std::get<0>(g)), output(std::get<4>(g))};
}

void reduce(const WhereTuple& where, int math, i64 M, i64 R, const std::vector<GradientTuple>& gradients,
            int splits, const WorkspaceTuple& space) {
  check_size("M", M), check_size("R", R);
  ReduceLaunch p{M, R, {}, workspace(space), static_cast<int>(gradients.size()), splits};
  for (std::size_t i = 0; i < gradients.size() && i < 2; ++i) p.gradients[i] = gradient(gradients[i]);
  launch_at(where, launch_reduce, math_of(math), p);
}

std::tuple<i64, i64> reduce_workspace(int math, const std::vector<i64>& columns, i64 R, int splits) {
  ReduceLaunch p{};
  p.R = R, p.splits = splits, p.count = static_cast<int>(columns.size());
  if (columns.size() > 2) refuse("gradients", p.count, "1 or 2");
  for (std::size_t i = 0; i < columns.size(); ++i) p.gradients[i].P = columns[i];
  return words_of(math_of(math), p);
}

void decode(const WhereTuple& where, int math, i64 M, i64 K, i64 N, i64 R, const MatrixTuple& x,
            const MatrixTuple& w, const MatrixTuple& a, const MatrixTuple& b, Pointer bias, float scale,
            const OutputTuple& y, const OutputTuple& s, int splits, int s_splits,
            const WorkspaceTuple& space) {
  check_size("M", M), check_size("K", K), check_size("N", N), check_size("R", R);
  launch_at(where, launch_decode, math_of(math),
            DecodeLaunch{M, K, N, R, matrix(x), matrix(w), matrix(a), matrix(b),
                         reinterpret_cast<const void*>(bias), output(y), output(s), workspace(space), scale,
                         splits, s_splits});
}

std::tuple<i64, i64> decode_workspace(i64 N, i64 R, int splits, int s_splits) {
  DecodeLaunch p{};
  p.N = N, p.R = R, p.splits = splits, p.s_splits = s_splits;
  return words_of(Math::bf16, p);
}

#ifdef LORA_FUSED_HAVE_SM90
// x, w, a, b, s, y; bias, mask; columns, depth, R; scale; where the S tiles write and how many columns
using LayerTuple = std::tuple<MatrixTuple, MatrixTuple, MatrixTuple, MatrixTuple, OutputTuple, OutputTuple,
                              Pointer, MaskTuple, i64, i64, i64, float, OutputTuple, i64>;

sm90::Layer layer(const LayerTuple& t, bool dx) {
  const i64 columns = std::get<8>(t), depth = std::get<9>(t);
  return {matrix(std::get<0>(t)),
          matrix(std::get<1>(t)),
          matrix(std::get<2>(t)),
          matrix(std::get<3>(t)),
          output(std::get<4>(t)),
          output(std::get<5>(t)),
          reinterpret_cast<const void*>(std::get<6>(t)),
          mask(std::get<7>(t), dx ? columns : depth),
          columns,
          depth,
          std::get<10>(t),
          std::get<11>(t),
          output(std::get<12>(t)),
          std::get<13>(t)};
}

// tile: block_n, blocks of a cluster, blocks of 64 columns of an S tile, S tiles of a ticket, parts of the
// tokens that `gradients` are summed in: none, or those of lora_A and lora_B, of 0 columns where not wanted.
void matmul_sm90(const WhereTuple& where, int math, bool dx, i64 M, const std::vector<LayerTuple>& layers,
                 const std::tuple<int, int, int, int, int>& tile, const std::vector<GradientTuple>& gradients,
                 const WorkspaceTuple& space) {
  sm90::MatmulLaunch p{};
  p.M = M, p.dx = dx, p.members = static_cast<int>(layers.size());
  for (std::size_t i = 0; i < layers.size() && i < sm90::kMaxMembers; ++i) p.layer[i] = layer(layers[i], dx);
  p.words = workspace(space).tickets, p.error = workspace(space).error;
  p.partials = workspace(space).partials;
  std::tie(p.block_n, p.cluster, p.shrink_blocks, p.shrink_group, p.reduce_parts) = tile;
  for (std::size_t i = 0; i < gradients.size() && i < 2; ++i) p.gradient[i] = gradient(gradients[i]);
  launch_at(where, sm90::launch_matmul, math_of(math), p);
}
#endif

// 0 where the stream is not being captured into a graph, else a number that the capture has to itself.
u64 capture_id(Pointer stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  check(cudaStreamGetCaptureInfo(reinterpret_cast<cudaStream_t>(stream), &status, &id), "lora_fused", "",
        "capture info");
  return status == cudaStreamCaptureStatusNone ? 0 : id;
}

// w, shrink, expand, y; bias, mask; columns, R, first column of its s; scale
using Sm80LayerTuple =
    std::tuple<MatrixTuple, MatrixTuple, MatrixTuple, OutputTuple, Pointer, MaskTuple, i64, i64, i64, float>;

sm80::Layer sm80_layer(const Sm80LayerTuple& t) {
  return {matrix(std::get<0>(t)),
          matrix(std::get<1>(t)),
          matrix(std::get<2>(t)),
          output(std::get<3>(t)),
          reinterpret_cast<const void*>(std::get<4>(t)),
          mask(std::get<5>(t), 0),
          std::get<6>(t),
          std::get<7>(t),
          std::get<8>(t),
          std::get<9>(t)};
}

// tile: block_m, block_n, block_k, S tiles of a ticket. flags: s is given, the mask is over y, y is added to.
void matmul_sm80(const WhereTuple& where, int math, i64 M, i64 depth, const MatrixTuple& x,
                 const OutputTuple& s, const std::vector<Sm80LayerTuple>& layers,
                 const std::tuple<int, int, int, int>& tile, const std::tuple<bool, bool, bool>& flags,
                 const WorkspaceTuple& space) {
  sm80::MatmulLaunch p;
  p.M = M, p.depth = depth, p.x = matrix(x), p.s = output(s);
  p.layers = static_cast<int>(layers.size());
  for (std::size_t i = 0; i < layers.size() && i < sm80::kMaxMembers; ++i) p.layer[i] = sm80_layer(layers[i]);
  std::tie(p.block_m, p.block_n, p.block_k, p.shrink_group) = tile;
  std::tie(p.s_given, p.mask_output, p.accumulate) = flags;
  p.words = workspace(space).tickets, p.error = workspace(space).error;
  launch_at(where, sm80::launch_matmul, math_of(math), p);
}

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
  py::register_local_exception<CudaError>(m, "CudaError", PyExc_RuntimeError);
  m.def("device_count", device_count);
  m.def("device_properties", describe_device);
  m.def("capture_id", capture_id);
  m.def("matmul_sm80", matmul_sm80);
  m.def("matmul_sm80_words", sm80::words_of);
  m.def("shrink", shrink);
  m.def("shrink_workspace", shrink_workspace);
  m.def("reduce", reduce);
  m.def("reduce_workspace", reduce_workspace);
  m.def("decode", decode);
  m.def("decode_workspace", decode_workspace);
#ifdef LORA_FUSED_HAVE_SM90
  m.def("matmul_sm90", matmul_sm90);
  m.def("matmul_sm90_words", sm90::words_of);
  m.def("matmul_sm90_partials", sm90::partials_of);
#endif
}

}  // namespace lora_fused::cuda
