#pragma once

#include <ATen/ATen.h>

namespace softnpu::ops {

// Queues out[r] = rows[r] matrices[g] for each row r of group g, and 0 for rows behind the last group. rows: (rows, in),
// matrices: (groups, in, out), out: (rows, out). group_list: where each group ends, or (`sizes`) how many rows it has; read
// when the task runs, so that a graph can hold it.
void grouped_matmul(const at::Tensor& out, const at::Tensor& rows, const at::Tensor& matrices, const at::Tensor& group_list, bool sizes);

}  // namespace softnpu::ops
