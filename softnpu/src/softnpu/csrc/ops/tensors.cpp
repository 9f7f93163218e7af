#include "ops/tensors.h"

#include <c10/core/InferenceMode.h>

#include "torch_npu/csrc/core/npu/NPUStream.h"

namespace softnpu::ops {

bool on_npu(const at::Tensor& tensor) { return tensor.defined() && tensor.device().type() == c10::DeviceType::PrivateUse1; }

at::Tensor cpu_view(const at::Tensor& tensor) {
  if (!on_npu(tensor)) return tensor;
  auto options = at::TensorOptions().dtype(tensor.dtype()).device(at::kCPU);
  at::Tensor view = tensor.numel() == 0 && !tensor.data_ptr() ? at::empty_strided(tensor.sizes(), tensor.strides(), options)
                                                              : at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), options);
  view._set_conj(tensor.is_conj());
  view._set_neg(tensor.is_neg());
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) view.unsafeGetTensorImpl()->set_wrapped_number(true);
  return view;
}

at::Tensor meta_like(const at::Tensor& tensor) {
  bool number = tensor.defined() && tensor.unsafeGetTensorImpl()->is_wrapped_number();
  if (!tensor.defined() || number) return tensor;  // a Python number in a tensor: meta kernels read it
  return at::empty_strided(tensor.sizes(), tensor.strides(), at::TensorOptions().dtype(tensor.dtype()).device(at::kMeta));
}

at::Tensor npu_like(const at::Tensor& like, c10::Device device) {
  return at::empty_strided(like.sizes(), like.strides(), at::TensorOptions().dtype(like.dtype()).device(device));
}

aclrtStream current_stream(c10::Device device) { return c10_npu::getCurrentNPUStream(device.index()).stream(); }

void synchronize(c10::Device device) { c10_npu::getCurrentNPUStream(device.index()).synchronize(); }

c10::Device current_device() { return c10::Device(c10::DeviceType::PrivateUse1, c10_npu::getCurrentNPUStream().device_index()); }

void launch(const std::string& name, c10::Device device, Task task) {
  c10::DeviceGuard guard_of_device(device);  // as torch_npu's own operators
  aclError code = enqueue(current_stream(device), name, [task = std::move(task)]() -> aclError {
    c10::InferenceMode guard(true);
    return task();
  });
  TORCH_CHECK(code == ACL_SUCCESS, name, " on the software NPU: ", last_error(), " (error code ", code, ")");
}

}  // namespace softnpu::ops
