// Device tensors seen as CPU tensors: the memory of a software NPU is host memory, so no bytes move.
#pragma once

#include <ATen/ATen.h>

#include "softnpu.h"

namespace softnpu::ops {

bool on_npu(const at::Tensor& tensor);

// A CPU tensor over the same bytes. It owns nothing: as on a device, memory that is freed while work is queued on
// it is reused, which is correct because of the caching allocator's stream order.
at::Tensor cpu_view(const at::Tensor& tensor);

// Same sizes, strides and type without bytes.
at::Tensor meta_like(const at::Tensor& tensor);

// New device memory with the sizes, strides and type of `like`.
at::Tensor npu_like(const at::Tensor& like, c10::Device device);

// The stream that torch_npu uses now on `device`, after its own host queue has been emptied into it.
aclrtStream current_stream(c10::Device device);
void synchronize(c10::Device device);

// Queues a task of the operator library on that stream; it runs in inference mode. Raises where that is rejected.
void launch(const std::string& name, c10::Device device, Task task);

c10::Device current_device();

}  // namespace softnpu::ops
