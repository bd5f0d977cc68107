// A torch.Tensor as native code sees it, without torch's headers.
#pragma once

#include <pybind11/pybind11.h>

#include "problem.h"

namespace lora_fused {

// The classes of plain tensors. Where `tensor` offers DLPack's exchange API (torch 2.10 and newer) tensors
// are read by it, a C function; else by their own methods.
void bind_torch(pybind11::type tensor, pybind11::type parameter);

// Where a tensor [rows, cols] lies; one of other dimensions must be contiguous and is [..., cols] as rows.
// A null matrix for None. Throws what torch raises where a tensor has no memory.
Matrix matrix_of(pybind11::handle tensor);

// What checks and choices depend on, as bytes to look up: of each tensor class, device, dtype, shape,
// requires_grad and the negative bit, of weight also the strides. None where a tensor is not plain or the
// exchange API is not there.
pybind11::object facts(pybind11::handle x, pybind11::handle weight, pybind11::handle lora_A,
                       pybind11::handle lora_B, pybind11::handle bias);

}  // namespace lora_fused
