// One boxed kernel for every aten operator of the npu device: the CPU kernel, run as a task of the current stream.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

namespace softnpu::ops {

void run_operator(const c10::OperatorHandle& op, torch::jit::Stack* stack);
at::Tensor& copy_(c10::DispatchKeySet keys, at::Tensor& self, const at::Tensor& source, bool non_blocking);

// Remembers torch_npu's own copy_ kernel, which plain copies keep using.
void remember_copy_kernel();

// random.cpp: runs `call` on the stack with randomness that follows the device's generator, seed and offset.
void run_random(const c10::OperatorHandle& op, std::vector<c10::IValue>& arguments, c10::Device device, const std::function<void()>& call);

}  // namespace softnpu::ops
