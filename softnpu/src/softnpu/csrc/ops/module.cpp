// The Python module _softnpu_ops: puts the kernels of this folder behind the npu device.
#include <torch/extension.h>
#include <torch/library.h>

#include <set>

#include "ops/attention.h"
#include "ops/fallback.h"
#include "ops/grouped_matmul.h"

namespace {

using namespace softnpu::ops;
using c10::DispatchKey;

std::vector<std::unique_ptr<torch::Library>>& libraries() {
  static auto* kept = new std::vector<std::unique_ptr<torch::Library>>;
  return *kept;
}

void unknown_operator(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, "the software NPU has no operator ", op.operator_name(),
                              ". Add it in softnpu/src/softnpu/ops, or run on a real NPU.");
}

// torch_npu has autograd kernels of its own for some operators of aten, which call its kernels past the dispatcher. The
// CPU's do what they do on any device: they call other operators, or note the operator for the backward pass.
void autograd_of_cpu(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  op.getComputedKernelForDispatchKey(DispatchKey::AutogradCPU).callBoxed(op, keys, stack);
}

std::string local_name(const c10::OperatorName& name) {
  std::string base = name.name.substr(name.name.find("::") + 2);
  return name.overload_name.empty() ? base : base + "." + name.overload_name;
}

// Replaces each kernel that `space` has under `key`, but for those named in `keep`. Returns how many.
template <class Replacement>
int replace_kernels(const std::string& space, DispatchKey key, const std::set<std::string>& keep, const Replacement& replacement) {
  auto& dispatcher = c10::Dispatcher::singleton();
  auto library = std::make_unique<torch::Library>(torch::Library::IMPL, space, key, __FILE__, __LINE__);
  int count = 0;
  for (const auto& name : dispatcher.getRegistrationsForDispatchKey(key)) {
    std::string local = local_name(name), base = name.name.substr(name.name.find("::") + 2);
    if (name.name.substr(0, space.size() + 2) != space + "::" || !dispatcher.findSchema(name) || keep.count(base) || keep.count(local)) continue;
    library->impl(local.c_str(), replacement());
    count++;
  }
  libraries().push_back(std::move(library));
  return count;
}

int install_aten(const std::set<std::string>& keep) {
  remember_copy_kernel();
  auto kept = keep;
  kept.insert("copy_");
  int count = replace_kernels("aten", DispatchKey::PrivateUse1, kept, [] { return torch::CppFunction::makeFromBoxedFunction<&run_operator>(); });
  replace_kernels("aten", DispatchKey::AutogradPrivateUse1, kept, [] { return torch::CppFunction::makeFromBoxedFunction<&autograd_of_cpu>(); });
  auto library = std::make_unique<torch::Library>(torch::Library::IMPL, "aten", DispatchKey::PrivateUse1, __FILE__, __LINE__);
  library->impl("copy_", torch::CppFunction::makeFromUnboxedFunction(&copy_));
  libraries().push_back(std::move(library));
  return count + 1;
}

int refuse(const std::string& space, const std::set<std::string>& keep) {
  return replace_kernels(space, DispatchKey::PrivateUse1, keep, [] { return torch::CppFunction::makeFromBoxedFunction<&unknown_operator>(); });
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("install_aten", &install_aten, "Installs CPU kernels for the npu device's aten operators, except those in `keep`.");
  module.def("refuse", &refuse, "Makes every other operator of namespace `space` raise NotImplementedError with its name.");
  module.def("attention", &attention, py::call_guard<py::gil_scoped_release>());
  module.def("grouped_matmul", &grouped_matmul, py::call_guard<py::gil_scoped_release>());
  module.def("write_cache", &write_cache, py::call_guard<py::gil_scoped_release>());
}
