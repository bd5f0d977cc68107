// Tiles in shared memory for the tall-and-skinny kernels, and the mma.sync fragments read from them.
//
// A tile [rows][columns] is cut into panels of 128-byte rows: eight chunks of 16 bytes, permuted within the
// row so that both the copies in and the fragment reads are free of bank conflicts. A step of mma is 32 bytes
// (two chunks) of the contraction for every element type.
#pragma once

#include "../dropout.h"
#include "arguments.h"
#include "numeric.cuh"

namespace lora_fused::cuda {

constexpr int kRowBytes = 128, kChunkBytes = 16, kChunks = kRowBytes / kChunkBytes;

// ---- element types ----------------------------------------------------------------------------------------

// fp32 rounded to TF32 (nearest, ties away from zero).
struct Tf32 {};
// fp32 multiplied without loss: three TF32 parts of 11, 11 and 2 bits; the three smallest of nine products,
// below 2^-32 of the result, are dropped.
struct Ieee {};

template <typename T>
struct Operand : Numeric<T> {
  using Storage = T;
};

template <>
struct Operand<Tf32> : Numeric<float> {
  using Storage = float;
  static LORA_FUSED_DEVICE u32 rounded(u32 bits) { return ptx::cvt_rna_tf32(__uint_as_float(bits)); }
  static LORA_FUSED_DEVICE void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    const u32 parts[4] = {rounded(a[0]), rounded(a[1]), rounded(a[2]), rounded(a[3])};
    ptx::mma_m16n8k8_tf32(c, parts, rounded(b0), rounded(b1));
  }
};

template <>
struct Operand<Ieee> : Numeric<float> {
  using Storage = float;
  static constexpr u32 kTop = 0xffffe000u;  // the bits that TF32 has
  // Part 0, 1 or 2 of a value. Infinities and NaN live in part 0 alone.
  template <int kPart>
  static LORA_FUSED_DEVICE u32 part(u32 bits) {
    const u32 top = bits & kTop;
    if constexpr (kPart == 0) return top;
    const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
    const u32 rest = finite ? __float_as_uint(__uint_as_float(bits) - __uint_as_float(top)) : 0u;
    if constexpr (kPart == 1) return rest & kTop;
    return __float_as_uint(__uint_as_float(rest) - __uint_as_float(rest & kTop));
  }
  template <int kA, int kB>
  static LORA_FUSED_DEVICE void product(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    const u32 parts[4] = {part<kA>(a[0]), part<kA>(a[1]), part<kA>(a[2]), part<kA>(a[3])};
    ptx::mma_m16n8k8_tf32(c, parts, part<kB>(b0), part<kB>(b1));
  }
  // The small products are summed apart and join in one rounding.
  static LORA_FUSED_DEVICE void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    float small[4] = {};
    product<2, 0>(small, a, b0, b1);
    product<0, 2>(small, a, b0, b1);
    product<1, 1>(small, a, b0, b1);
    product<1, 0>(small, a, b0, b1);
    product<0, 1>(small, a, b0, b1);
    product<0, 0>(c, a, b0, b1);
#pragma unroll
    for (int i = 0; i < 4; ++i) c[i] += small[i];
  }
};

template <typename T>
using Storage = typename Operand<T>::Storage;

template <typename T>
constexpr int kChunkElements = kChunkBytes / static_cast<int>(sizeof(Storage<T>));
template <typename T>
constexpr int kPanelColumns = kRowBytes / static_cast<int>(sizeof(Storage<T>));
template <typename T>
constexpr bool kIsFp32 = sizeof(Storage<T>) == 4;

// ---- addresses --------------------------------------------------------------------------------------------

// Along: fragments run along the rows (ldmatrix of 8 rows). Across: they run down a column; fp32 has no
// transposing ldmatrix and reads 4 rows x 8 columns of words at a time.
enum class Read { along, across };

template <typename T, Read kRead>
LORA_FUSED_DEVICE u32 tile_offset(int rows, int row, int column) {
  const int panel = column / kPanelColumns<T>;
  const int chunk = column % kPanelColumns<T> / kChunkElements<T>;
  const int swizzle = kIsFp32<T> && kRead == Read::across ? (row & 3) << 1 : row & 7;
  return static_cast<u32>((panel * rows + row) * kRowBytes + ((chunk ^ swizzle) << 4));
}

template <typename T>
constexpr int tile_bytes(int rows, int columns) {
  return (columns + kPanelColumns<T> - 1) / kPanelColumns<T> * rows * kRowBytes;
}

// ---- fragments --------------------------------------------------------------------------------------------

// a[16 x step] of a tile whose rows are the output rows: row0 the first, column0 the first of the step.
template <typename T>
LORA_FUSED_DEVICE void fragment_a_along(u32 (&a)[4], u32 tile, int rows, int row0, int column0) {
  const int lane = threadIdx.x & 31;
  ptx::ldmatrix_x4(a, tile + tile_offset<T, Read::along>(rows, row0 + (lane & 15),
                                                         column0 + (lane >> 4) * kChunkElements<T>));
}

// a[16 x step] of a tile whose columns are the output rows: column0 the first of them, row0 the first of the
// step.
template <typename T>
LORA_FUSED_DEVICE void fragment_a_across(u32 (&a)[4], u32 tile, int rows, int row0, int column0) {
  const int lane = threadIdx.x & 31;
  if constexpr (kIsFp32<T>) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = row0 + (lane & 3) + 4 * (i >> 1), column = column0 + (lane >> 2) + 8 * (i & 1);
      a[i] = ptx::ld_shared_32(tile + tile_offset<T, Read::across>(rows, row, column) + (column & 3) * 4);
    }
  } else {
    ptx::ldmatrix_x4_trans(a, tile + tile_offset<T, Read::across>(rows, row0 + (lane & 7) + (lane >> 4) * 8,
                                                                  column0 + (lane >> 3 & 1) * 8));
  }
}

// b[step x 16] as two n8 blocks, b[0..1] and b[2..3]. Along: tile rows are the output columns.
template <typename T>
LORA_FUSED_DEVICE void fragment_b_along(u32 (&b)[4], u32 tile, int rows, int row0, int column0) {
  const int lane = threadIdx.x & 31;
  ptx::ldmatrix_x4(b, tile + tile_offset<T, Read::along>(rows, row0 + (lane & 7) + (lane >> 4) * 8,
                                                         column0 + (lane >> 3 & 1) * kChunkElements<T>));
}

// Across: tile columns are the output columns, rows the contraction.
template <typename T>
LORA_FUSED_DEVICE void fragment_b_across(u32 (&b)[4], u32 tile, int rows, int row0, int column0) {
  const int lane = threadIdx.x & 31;
  if constexpr (kIsFp32<T>) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = row0 + (lane & 3) + 4 * (i & 1), column = column0 + (lane >> 2) + 8 * (i >> 1);
      b[i] = ptx::ld_shared_32(tile + tile_offset<T, Read::across>(rows, row, column) + (column & 3) * 4);
    }
  } else {
    ptx::ldmatrix_x4_trans(
        b, tile + tile_offset<T, Read::across>(rows, row0 + (lane & 15), column0 + (lane >> 4) * 8));
  }
}

// ---- copies in --------------------------------------------------------------------------------------------

// Whether every row of a matrix can be read in 16-byte pieces.
template <typename T>
LORA_FUSED_DEVICE bool has_vector_rows(const lora_fused::Matrix& m) {
  const i64 row_bytes = m.row_stride * static_cast<i64>(sizeof(Storage<T>));
  return m.col_stride == 1 &&
         (reinterpret_cast<std::uintptr_t>(m.data) | static_cast<u64>(row_bytes)) % 16 == 0;
}

LORA_FUSED_DEVICE u64 seed_of(const Mask& mask) { return mask.seed_pointer ? *mask.seed_pointer : mask.seed; }

// Bit e is set iff column `column` + e of this row is kept; column is a multiple of a chunk's elements.
template <typename T>
LORA_FUSED_DEVICE u32 kept(const Mask& mask, u64 seed, i64 row, i64 column) {
  const u64 index = static_cast<u64>(row) * philox::counters_per_row(mask.row_length) +
                    static_cast<u64>(column / philox::kElementsPerCounter);
  const u32 bits = philox::keep_bits(philox::generate(seed, index), mask.threshold);
  return bits >> (column % philox::kElementsPerCounter);
}

template <typename T>
LORA_FUSED_DEVICE u32 masked_word(u32 word, u32 bits) {
  if constexpr (kIsFp32<T>) return bits & 1 ? word : 0u;
  return word & ((bits & 1 ? 0xffffu : 0u) | (bits & 2 ? 0xffff0000u : 0u));
}

template <typename T>
LORA_FUSED_DEVICE uint4 masked(uint4 v, u32 bits) {
  constexpr int kPerWord = kChunkElements<T> / 4;
  return {masked_word<T>(v.x, bits), masked_word<T>(v.y, bits >> kPerWord),
          masked_word<T>(v.z, bits >> 2 * kPerWord), masked_word<T>(v.w, bits >> 3 * kPerWord)};
}

// One chunk, element by element: any strides and addresses. `valid` elements are inside the matrix.
template <typename T>
LORA_FUSED_DEVICE uint4 gather_chunk(const lora_fused::Matrix& m, i64 row, i64 column, int valid) {
  const Storage<T>* from =
      static_cast<const Storage<T>*>(m.data) + row * m.row_stride + column * m.col_stride;
  u32 words[4] = {};
#pragma unroll
  for (int e = 0; e < kChunkElements<T>; ++e) {
    if (e >= valid) continue;
    if constexpr (kIsFp32<T>)
      words[e] = ptx::ld_global_nc_32(from + e * m.col_stride);
    else
      words[e >> 1] |= static_cast<u32>(ptx::ld_global_nc_16(from + e * m.col_stride)) << 16 * (e & 1);
  }
  return {words[0], words[1], words[2], words[3]};
}

// How one matrix reaches shared memory, tile after tile. Rows and columns past the end are zero.
template <typename T, int kRows, int kColumns, int kThreads, Read kRead>
class TileCopy {
  static constexpr int kPerRow = kColumns / kChunkElements<T>;
  static constexpr int kTotal = kRows * kPerRow;
  static_assert(kColumns % kChunkElements<T> == 0, "a row of a tile is made of whole 16-byte chunks");

 public:
  static constexpr int kBytes = tile_bytes<T>(kRows, kColumns);

  LORA_FUSED_DEVICE TileCopy(const lora_fused::Matrix& m, i64 rows, i64 columns, const Mask& mask)
      : matrix_(m),
        mask_(mask),
        rows_(rows),
        columns_(columns),
        vector_(has_vector_rows<T>(m)),
        seed_(mask.threshold ? seed_of(mask) : 0) {}

  // Start the copy of the tile at (row0, col0); without vector rows it is complete on return.
  LORA_FUSED_DEVICE void start(u32 tile, i64 row0, i64 col0) const {
    if (vector_) {
#pragma unroll
      for (int i = threadIdx.x; i < (kTotal + kThreads - 1) / kThreads * kThreads; i += kThreads)
        if (kTotal % kThreads == 0 || i < kTotal)
          start_chunk(tile, i / kPerRow, i % kPerRow * kChunkElements<T>, row0, col0);
    } else if (matrix_.row_stride == 1) {
      // NOTE: neighbouring threads take neighbouring rows, which lie side by side in memory.
#pragma unroll 1
      for (int i = threadIdx.x; i < kTotal; i += kThreads)
        store_chunk(tile, i % kRows, i / kRows * kChunkElements<T>, row0, col0);
    } else {
#pragma unroll 1
      for (int i = threadIdx.x; i < kTotal; i += kThreads)
        store_chunk(tile, i / kPerRow, i % kPerRow * kChunkElements<T>, row0, col0);
    }
  }

  // Apply the mask to what this thread copied, between its wait and the block's barrier.
  LORA_FUSED_DEVICE void finish(u32 tile, i64 row0, i64 col0) const {
    if (mask_.threshold == 0 || !vector_) return;
#pragma unroll 1
    for (int i = threadIdx.x; i < kTotal; i += kThreads) {
      const int row = i / kPerRow, column = i % kPerRow * kChunkElements<T>;
      const u32 at = tile + tile_offset<T, kRead>(kRows, row, column);
      const u32 bits = kept<T>(mask_, seed_, row0 + row, col0 + column);
      ptx::st_shared_128(at, masked<T>(ptx::ld_shared_128(at), bits));
    }
  }

 private:
  // Elements of a chunk that are inside the matrix.
  LORA_FUSED_DEVICE int valid(i64 row, i64 column) const {
    const i64 left = row < rows_ ? columns_ - column : 0;
    return left <= 0 ? 0 : left < kChunkElements<T> ? static_cast<int>(left) : kChunkElements<T>;
  }

  LORA_FUSED_DEVICE void start_chunk(u32 tile, int row, int column, i64 row0, i64 col0) const {
    const i64 m = row0 + row, c = col0 + column;
    const int inside = valid(m, c);
    const Storage<T>* from = static_cast<const Storage<T>*>(matrix_.data);
    if (inside) from += m * matrix_.row_stride + c;
    ptx::cp_async_16(tile + tile_offset<T, kRead>(kRows, row, column), from,
                     static_cast<u32>(inside * sizeof(Storage<T>)));
  }

  LORA_FUSED_DEVICE void store_chunk(u32 tile, int row, int column, i64 row0, i64 col0) const {
    const i64 m = row0 + row, c = col0 + column;
    uint4 v = gather_chunk<T>(matrix_, m, c, valid(m, c));
    if (mask_.threshold) v = masked<T>(v, kept<T>(mask_, seed_, m, c));
    ptx::st_shared_128(tile + tile_offset<T, kRead>(kRows, row, column), v);
  }

  const lora_fused::Matrix& matrix_;
  const Mask& mask_;
  const i64 rows_, columns_;
  const bool vector_;
  const u64 seed_;
};

// ---- sums over blocks, and results out --------------------------------------------------------------------

// One accumulator tile per block, kept in fragment order: [parts][tiles][kBlocks][kThreads] float4.
template <int kBlocks, int kThreads>
class PartialSums {
 public:
  LORA_FUSED_DEVICE PartialSums(const Workspace& w, i64 tiles, i64 tile)
      : w_(w), tiles_(tiles), tile_(tile) {}

  // True in the last block to arrive, with the sum over all parts in their order in c; false in the others.
  LORA_FUSED_DEVICE bool sum(float (&c)[kBlocks][4], int part, int parts) const {
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) *at(part, j) = make_float4(c[j][0], c[j][1], c[j][2], c[j][3]);
    __shared__ u32 arrived;
    __syncthreads();
    if (threadIdx.x == 0) arrived = ptx::atom_inc_acq_rel(w_.tickets + tile_, parts - 1);
    __syncthreads();
    if (arrived != static_cast<u32>(parts - 1)) return false;
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
      float4 total = __ldcg(at(0, j));
      for (int p = 1; p < parts; ++p) {
        const float4 v = __ldcg(at(p, j));
        total = make_float4(total.x + v.x, total.y + v.y, total.z + v.z, total.w + v.w);
      }
      c[j][0] = total.x, c[j][1] = total.y, c[j][2] = total.z, c[j][3] = total.w;
    }
    return true;
  }

 private:
  LORA_FUSED_DEVICE float4* at(i64 part, int j) const {
    return reinterpret_cast<float4*>(w_.partials) + ((part * tiles_ + tile_) * kBlocks + j) * kThreads +
           threadIdx.x;
  }

  const Workspace& w_;
  const i64 tiles_, tile_;
};

LORA_FUSED_DEVICE void store_element(const Output& out, i64 row, i64 column, float value) {
  const i64 at = row * out.row_stride + column * out.col_stride;
  if (out.dtype == DType::f32)
    static_cast<float*>(out.data)[at] = value;
  else if (out.dtype == DType::bf16)
    static_cast<bf16*>(out.data)[at] = Numeric<bf16>::from_float(value);
  else
    static_cast<fp16*>(out.data)[at] = Numeric<fp16>::from_float(value);
}

// An accumulator c[16 x 8] at (row0, column0), within [rows, columns].
LORA_FUSED_DEVICE void store_fragment(const Output& out, const float (&c)[4], i64 row0, i64 column0, i64 rows,
                                      i64 columns) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const i64 row = row0 + (lane >> 2) + 8 * (e >> 1), column = column0 + (lane & 3) * 2 + (e & 1);
    if (row < rows && column < columns) store_element(out, row, column, c[e]);
  }
}

}  // namespace lora_fused::cuda
