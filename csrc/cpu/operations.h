// The operations of one instruction set, as kernels.h lists them.
#pragma once

#include "../problem.h"

namespace lora_fused::LORA_FUSED_ISA {

void matmul(DType dtype, const MatmulArgs& args);
i64 packed_bytes(DType dtype, i64 K, i64 N);
void pack(DType dtype, const PackArgs& args);
void shrink(DType dtype, const ShrinkArgs& args);
void shrink_reduce(DType dtype, const ShrinkReduceArgs& args);
void reduce(DType dtype, const ReduceArgs& args);
void keep_mask(const Dropout& dropout, i64 rows, unsigned char* mask);

}  // namespace lora_fused::LORA_FUSED_ISA
