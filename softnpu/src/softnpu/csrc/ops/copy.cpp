// copy_: plain copies use torch_npu's own asynchronous path; those that change type or layout use the CPU's copy_.
#include "ops/fallback.h"
#include "ops/tensors.h"

namespace softnpu::ops {
namespace {

std::optional<c10::SafeKernelFunction> g_torch_npu_copy;

const c10::OperatorHandle& copy_operator() {
  static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::copy_", "");
  return op;
}

bool plain(const at::Tensor& self, const at::Tensor& source) {
  return self.scalar_type() == source.scalar_type() && self.sizes() == source.sizes() && self.is_contiguous() && source.is_contiguous() && !self.is_conj() &&
         !source.is_conj() && !self.is_neg() && !source.is_neg();
}

// torch_npu copies a source in host memory to the device as it is, and converts it there.
void queue_copy(const at::Tensor& self, const at::Tensor& source, c10::Device device) {
  aclrtStream stream = current_stream(device);
  if (!on_npu(source) && source.numel())
    TORCH_CHECK(check_pageable(self.data_ptr(), source.data_ptr(), stream) == ACL_SUCCESS, "copy_ on the software NPU: ", last_error());
  bool read_later = on_npu(source) || capturing(stream);  // a graph reads at each replay
  at::Tensor to = cpu_view(self), from = on_npu(source) ? cpu_view(source) : read_later ? source : source.clone();
  launch("aten::copy_", device, [to, from]() -> aclError {
    to.copy_(from);
    return ACL_SUCCESS;
  });
}

}  // namespace

void remember_copy_kernel() { g_torch_npu_copy = copy_operator().getComputedKernelForDispatchKey(c10::DispatchKey::PrivateUse1); }

at::Tensor& copy_(c10::DispatchKeySet keys, at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  if (self.numel() == 0) return self;
  if (plain(self, source)) {
    torch::jit::Stack stack{self, source, non_blocking};
    g_torch_npu_copy->callBoxed(copy_operator(), keys, &stack);
    return self;
  }
  bool two_devices = on_npu(self) && on_npu(source) && self.device() != source.device();
  if (two_devices) synchronize(source.device());
  if (on_npu(self)) {
    queue_copy(self, source, self.device());
    if (two_devices || (!on_npu(source) && !non_blocking)) synchronize(self.device());
    return self;
  }
  TORCH_CHECK(!capturing(current_stream(source.device())), "a copy to the host that changes type or layout cannot be captured");
  synchronize(source.device());
  at::NoGradGuard no_grad;
  self.copy_(cpu_view(source));
  return self;
}

}  // namespace softnpu::ops
