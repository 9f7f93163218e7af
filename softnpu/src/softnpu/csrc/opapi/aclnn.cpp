// libopapi.so: the aclnn functions that torch_npu calls past the dispatcher (list collectives pad and copy with them).
// Each is two calls: the first fixes the arguments, the second queues the work. A missing one raises in torch_npu,
// which looks the name up here.
#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>

#include <memory>
#include <vector>

#include "softnpu.h"

struct aclTensor {
  at::Tensor value;
};
struct aclScalar {
  at::Scalar value;
};
struct aclIntArray {
  std::vector<int64_t> value;
};
struct aclOpExecutor {
  std::function<void()> work;
};

namespace {

at::ScalarType scalar_type(aclDataType type) {
  switch (type) {
    case ACL_FLOAT: return at::kFloat;
    case ACL_FLOAT16: return at::kHalf;
    case ACL_BF16: return at::kBFloat16;
    case ACL_DOUBLE: return at::kDouble;
    case ACL_INT8: return at::kChar;
    case ACL_UINT8: return at::kByte;
    case ACL_INT16: return at::kShort;
    case ACL_INT32: return at::kInt;
    case ACL_INT64: return at::kLong;
    case ACL_BOOL: return at::kBool;
    default: TORCH_CHECK(false, "the software NPU has no aclnn data type ", static_cast<int>(type));
  }
}

// The first half of an aclnn call: no workspace is needed, the work is kept for the second half.
aclError prepare(uint64_t* workspace, aclOpExecutor** executor, std::function<void()> work) {
  *workspace = 0;
  *executor = new aclOpExecutor{std::move(work)};
  return ACL_SUCCESS;
}

aclError launch(const char* name, aclOpExecutor* executor, aclrtStream stream) {
  auto work = std::move(executor->work);
  delete executor;
  return softnpu::enqueue(stream, name, [work]() -> aclError {
    c10::InferenceMode guard(true);
    work();
    return ACL_SUCCESS;
  });
}

}  // namespace

#define SECOND_HALF(name) \
  aclError name(void*, uint64_t, aclOpExecutor* executor, aclrtStream stream) { return launch(#name, executor, stream); }

extern "C" {

aclTensor* aclCreateTensor(const int64_t* sizes, uint64_t dims, aclDataType type, const int64_t* strides, int64_t offset, aclFormat, const int64_t*, uint64_t,
                           void* address) {
  auto options = at::TensorOptions().dtype(scalar_type(type));
  std::vector<int64_t> shape(sizes, sizes + dims);
  int64_t count = 1;
  for (int64_t size : shape) count *= size;
  if (count == 0) return new aclTensor{at::empty(shape, options)};
  char* first = static_cast<char*>(address) + offset * static_cast<int64_t>(at::elementSize(scalar_type(type)));
  return new aclTensor{at::from_blob(first, shape, std::vector<int64_t>(strides, strides + dims), options)};
}
aclScalar* aclCreateScalar(void* value, aclDataType type) {
  return new aclScalar{at::from_blob(value, {}, at::TensorOptions().dtype(scalar_type(type))).item()};
}
aclIntArray* aclCreateIntArray(const int64_t* values, uint64_t count) { return new aclIntArray{{values, values + count}}; }

aclError aclDestroyTensor(const aclTensor* tensor) {
  delete tensor;
  return ACL_SUCCESS;
}
aclError aclDestroyScalar(const aclScalar* scalar) {
  delete scalar;
  return ACL_SUCCESS;
}
aclError aclDestroyIntArray(const aclIntArray* array) {
  delete array;
  return ACL_SUCCESS;
}

aclError aclnnInplaceCopyGetWorkspaceSize(aclTensor* self, const aclTensor* source, uint64_t* workspace, aclOpExecutor** executor) {
  return prepare(workspace, executor, [to = self->value, from = source->value] { to.copy_(from); });
}
SECOND_HALF(aclnnInplaceCopy)

aclError aclnnInplaceZeroGetWorkspaceSize(aclTensor* self, uint64_t* workspace, aclOpExecutor** executor) {
  return prepare(workspace, executor, [to = self->value] { to.zero_(); });
}
SECOND_HALF(aclnnInplaceZero)

aclError aclnnInplaceFillScalarGetWorkspaceSize(aclTensor* self, const aclScalar* value, uint64_t* workspace, aclOpExecutor** executor) {
  return prepare(workspace, executor, [to = self->value, fill = value->value] { to.fill_(fill); });
}
SECOND_HALF(aclnnInplaceFillScalar)

aclError aclnnConstantPadNdGetWorkspaceSize(const aclTensor* self, const aclIntArray* padding, const aclScalar* value, aclTensor* out, uint64_t* workspace,
                                            aclOpExecutor** executor) {
  return prepare(workspace, executor, [from = self->value, pads = padding->value, fill = value->value, to = out->value] {
    to.copy_(at::constant_pad_nd(from, pads, fill));
  });
}
SECOND_HALF(aclnnConstantPadNd)

}  // extern "C"
