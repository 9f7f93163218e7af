#include "ops/grouped_matmul.h"

#include "ops/tensors.h"

namespace softnpu::ops {

void grouped_matmul(const at::Tensor& out, const at::Tensor& rows, const at::Tensor& matrices, const at::Tensor& group_list, bool sizes) {
  at::Tensor o = cpu_view(out), r = cpu_view(rows), m = cpu_view(matrices), list = cpu_view(group_list);
  launch("npu_grouped_matmul", rows.device(), [=]() -> aclError {
    at::Tensor groups = list.to(at::kLong);
    int64_t begin = 0;
    for (int64_t group = 0; group < groups.numel(); group++) {
      int64_t bound = groups[group].item<int64_t>(), end = sizes ? begin + bound : bound;
      if (end > begin) o.slice(0, begin, end).copy_(at::matmul(r.slice(0, begin, end), m[group]));
      begin = std::max(begin, end);
    }
    o.slice(0, begin).zero_();
    return ACL_SUCCESS;
  });
}

}  // namespace softnpu::ops
