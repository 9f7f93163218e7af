// The shapes of an operator's results, known before it runs.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <memory>
#include <string>
#include <vector>

namespace softnpu::ops {

struct Shapes {
  std::shared_ptr<const torch::jit::Stack> results;  // as meta tensors; null: `reason` says why they are unknown
  std::string reason;
};

// Computed by the operator's meta kernel, cached by arguments: many meta kernels are Python, and slow.
Shapes infer_shapes(const c10::OperatorHandle& op, const std::vector<c10::IValue>& arguments);

}  // namespace softnpu::ops
