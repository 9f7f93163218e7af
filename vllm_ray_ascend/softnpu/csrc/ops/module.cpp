// The Python module _softnpu_ops: puts the kernels of this folder behind the npu device.
#include <torch/extension.h>
#include <torch/library.h>

#include <set>

#include "ops/attention.h"
#include "ops/fallback.h"

namespace {

using namespace softnpu::ops;
using c10::DispatchKey;

std::vector<std::unique_ptr<torch::Library>>& libraries() {
  static auto* kept = new std::vector<std::unique_ptr<torch::Library>>;
  return *kept;
}

void unknown_operator(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, "the software NPU has no operator ", op.operator_name(),
                              ". Add it in vllm_ray_ascend/softnpu/ops, or run on a real NPU.");
}

std::string local_name(const c10::OperatorName& name) {
  std::string base = name.name.substr(name.name.find("::") + 2);
  return name.overload_name.empty() ? base : base + "." + name.overload_name;
}

// Replaces each kernel that `space` has for the npu device, but for those named in `keep`. Returns how many.
int replace_kernels(const std::string& space, const std::set<std::string>& keep, bool known) {
  auto& dispatcher = c10::Dispatcher::singleton();
  auto library = std::make_unique<torch::Library>(torch::Library::IMPL, space, DispatchKey::PrivateUse1, __FILE__, __LINE__);
  int count = 0;
  for (const auto& name : dispatcher.getRegistrationsForDispatchKey(DispatchKey::PrivateUse1)) {
    std::string local = local_name(name), base = name.name.substr(name.name.find("::") + 2);
    if (name.name.substr(0, space.size() + 2) != space + "::" || !dispatcher.findSchema(name) || keep.count(base) || keep.count(local)) continue;
    if (known)
      library->impl(local.c_str(), torch::CppFunction::makeFromBoxedFunction<&run_operator>());
    else
      library->impl(local.c_str(), torch::CppFunction::makeFromBoxedFunction<&unknown_operator>());
    count++;
  }
  libraries().push_back(std::move(library));
  return count;
}

int install_aten(const std::set<std::string>& keep) {
  remember_copy_kernel();
  auto kept = keep;
  kept.insert("copy_");
  int count = replace_kernels("aten", kept, true);
  auto library = std::make_unique<torch::Library>(torch::Library::IMPL, "aten", DispatchKey::PrivateUse1, __FILE__, __LINE__);
  library->impl("copy_", torch::CppFunction::makeFromUnboxedFunction(&copy_));
  libraries().push_back(std::move(library));
  return count + 1;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("install_aten", &install_aten, "Puts CPU kernels behind the npu device's aten operators, but for `keep`.");
  module.def("refuse", [](const std::string& space, const std::set<std::string>& keep) { return replace_kernels(space, keep, false); },
             "Lets every other operator of namespace `space` raise NotImplementedError with its name.");
  module.def("attention", &attention, py::call_guard<py::gil_scoped_release>());
}
