// Element types and reductions.
#pragma once

#include <vector>

#include "hccl/common.h"

namespace softnpu::hccl {

size_t size_of(HcclDataType type);  // bytes of one element; 0: no such type
std::string type_name(HcclDataType type);
bool can_reduce(HcclDataType type);

// out[i] = in[0][i] op in[1][i] op ..., in that order; 16-bit floats are rounded once, at the end. `out` may be any of
// `in`.
void reduce(void* out, const std::vector<const char*>& in, uint64_t count, HcclDataType type, HcclReduceOp op);

}  // namespace softnpu::hccl
