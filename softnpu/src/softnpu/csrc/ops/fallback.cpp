// How an operator runs. Where its results' shapes are known beforehand (it works in place, or its meta kernel says), it is
// queued on the stream and returns at once, as on a device; the same task is what a graph records. Where the shapes depend
// on data, or the result is a plain number, or it draws random numbers, the stream is synchronised and the operator runs on
// the calling thread; a graph cannot record that: such a call raises. An operator without CPU kernel raises, with its name.
#include "ops/fallback.h"

#include <cstring>
#include <mutex>
#include <unordered_map>

#include "ops/arguments.h"
#include "ops/shapes.h"
#include "ops/tensors.h"

namespace softnpu::ops {
namespace {

using c10::IValue;
using torch::jit::Stack;

// Properties of an operator from its schema, looked up once.
struct Traits {
  bool random = false;
  bool returns_tensors = true;            // else only values, which need the data now
  std::vector<int> returned_argument;     // per return: the argument that it is (in place, out), or -1
  bool needs_shapes = false;              // some return is new, or an out argument may be resized
};

Traits describe(const c10::OperatorHandle& op) {
  Traits traits;
  const auto& schema = op.schema();
  traits.random = op.hasTag(at::Tag::nondeterministic_seeded);
  for (const auto& result : schema.returns()) {
    auto kind = result.type()->kind();
    bool tensors = kind == c10::TypeKind::TensorType || (kind == c10::TypeKind::ListType && result.type()->containedType(0)->kind() == c10::TypeKind::TensorType);
    traits.returns_tensors = traits.returns_tensors && tensors;
    int found = -1;
    for (size_t index = 0; index < schema.arguments().size() && result.alias_info(); index++) {
      auto* alias = schema.arguments()[index].alias_info();
      if (alias && alias->isWrite() && alias->beforeSets() == result.alias_info()->beforeSets()) found = static_cast<int>(index);
    }
    traits.returned_argument.push_back(found);
    traits.needs_shapes = traits.needs_shapes || found < 0;
  }
  for (const auto& argument : schema.arguments()) traits.needs_shapes = traits.needs_shapes || argument.is_out();
  return traits;
}

const Traits& traits_of(const c10::OperatorHandle& op) {
  static auto& mutex = *new std::mutex;
  static auto& known = *new std::unordered_map<const void*, Traits>;
  std::lock_guard<std::mutex> lock(mutex);
  const void* key = &op.operator_name();
  auto found = known.find(key);
  if (found == known.end()) found = known.emplace(key, describe(op)).first;
  return found->second;
}

bool draws_numbers(const c10::OperatorHandle& op, const Traits& traits, const std::vector<IValue>& arguments) {
  for (size_t index = 0; traits.random && index < arguments.size(); index++)
    if (op.schema().arguments()[index].name() == "dropout_p" && arguments[index].isDouble()) return arguments[index].toDouble() > 0;
  return traits.random;
}

// As torch reports it on other devices. An index (in a list of optional tensors) or a number may lie elsewhere.
void check_devices(const c10::OperatorHandle& op, const std::vector<IValue>& arguments, c10::Device device) {
  bool any = false;
  for (const auto& value : arguments)
    for (const auto& tensor : tensors_of(value)) any = any || on_npu(tensor);
  for (size_t index = 0; any && index < arguments.size(); index++)
    for (const auto& tensor : tensors_of(arguments[index]))
      TORCH_CHECK(!tensor.defined() || tensor.device() == device || tensor.dim() == 0, "Expected all tensors to be on the same device, but ", op.operator_name(),
                  " got one on ", device, " and argument '", op.schema().arguments()[index].name(), "' on ", tensor.device());
}

c10::Device device_of(const std::vector<IValue>& arguments) {
  std::optional<c10::Device> found;
  auto look = [&](const at::Tensor& tensor) {
    if (!found && on_npu(tensor)) found = tensor.device();
    return tensor;
  };
  for (const auto& value : arguments) {
    map_tensors(value, look);
    if (!found && value.isDevice() && value.toDevice().type() == c10::DeviceType::PrivateUse1 && value.toDevice().has_index()) found = value.toDevice();
  }
  return found ? *found : current_device();
}

Stack call(const c10::OperatorHandle& op, const std::vector<IValue>& arguments) {
  Stack stack(arguments.begin(), arguments.end());
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &stack);
  return stack;
}

void resize_outputs(const std::vector<at::Tensor>& outputs, const std::vector<at::Tensor>& wanted) {
  for (size_t index = 0; index < outputs.size(); index++)
    if (on_npu(outputs[index]) && outputs[index].sizes() != wanted[index].sizes()) outputs[index].resize_(wanted[index].sizes());
}

// The device tensors that the operator returns: its own arguments, or new ones of the shapes that are known.
std::vector<IValue> make_results(const Traits& traits, const std::vector<IValue>& arguments, const Stack* known, c10::Device device) {
  std::vector<IValue> results;
  for (size_t index = 0; index < traits.returned_argument.size(); index++) {
    int argument = traits.returned_argument[index];
    if (argument >= 0) {
      if (known) resize_outputs(tensors_of(arguments[argument]), tensors_of((*known)[index]));
      results.push_back(arguments[argument]);
    } else {
      results.push_back(map_tensors((*known)[index], [&](const at::Tensor& meta) { return meta.defined() ? npu_like(meta, device) : meta; }));
    }
  }
  return results;
}

// Queues the operator; its new results are copied into the memory that the caller already holds.
void queue_operator(const c10::OperatorHandle& op, const Traits& traits, const std::vector<IValue>& arguments, const std::vector<IValue>& results, c10::Device device) {
  auto view = [](const at::Tensor& tensor) { return on_npu(tensor) || !tensor.defined() ? cpu_view(tensor) : tensor.clone(); };
  std::vector<IValue> views = map_arguments(op.schema(), arguments, c10::Device(at::kCPU), view);
  std::vector<std::pair<size_t, std::vector<at::Tensor>>> targets;
  for (size_t index = 0; index < results.size(); index++) {
    if (traits.returned_argument[index] >= 0) continue;
    std::vector<at::Tensor> memory;
    for (const auto& tensor : tensors_of(results[index])) memory.push_back(cpu_view(tensor));
    targets.emplace_back(index, std::move(memory));
  }
  launch(op.schema().name(), device, [op, views, targets]() -> aclError {
    Stack computed = call(op, views);
    for (const auto& [index, memory] : targets) {
      auto produced = tensors_of(computed[index]);
      for (size_t k = 0; k < memory.size(); k++)
        if (memory[k].defined() && memory[k].numel()) memory[k].copy_(produced[k]);
    }
    return ACL_SUCCESS;
  });
}

// A result of the synchronous way as a device tensor: an argument itself, a view of one, or new memory.
at::Tensor bring_back(const at::Tensor& result, const std::vector<std::pair<at::Tensor, at::Tensor>>& seen, c10::Device device) {
  if (!result.defined() || result.device().type() != at::kCPU) return result;
  for (const auto& [npu, cpu] : seen)
    if (cpu.unsafeGetTensorImpl() == result.unsafeGetTensorImpl()) {
      if (npu.sizes() == result.sizes() && npu.data_ptr() == result.data_ptr()) return npu;
      npu.resize_(result.sizes());
      if (result.numel()) cpu_view(npu).copy_(result);
      return npu;
    }
  for (const auto& [npu, cpu] : seen)
    if (result.numel() && cpu.numel() && result.storage().data() == cpu.storage().data())
      return at::as_strided(npu, result.sizes(), result.strides(), npu.storage_offset() + result.storage_offset());
  at::Tensor dense = result.is_non_overlapping_and_dense() ? result : result.contiguous();
  at::Tensor npu = npu_like(dense, device);
  if (dense.numel()) std::memcpy(npu.data_ptr(), dense.data_ptr(), dense.numel() * dense.element_size());
  return npu;
}

void run_now(const c10::OperatorHandle& op, const Traits& traits, const std::vector<IValue>& arguments, c10::Device device, const std::string& reason, Stack* stack) {
  TORCH_CHECK(!capturing(current_stream(device)), op.operator_name(), " cannot be captured on the software NPU: ", reason);
  synchronize(device);
  std::vector<std::pair<at::Tensor, at::Tensor>> seen;
  auto view = [&](const at::Tensor& tensor) {
    if (!on_npu(tensor)) return tensor;
    // An empty out argument is resized by the kernel, so it must own its memory.
    at::Tensor cpu = tensor.numel() ? cpu_view(tensor) : at::empty(tensor.sizes(), tensor.options().device(at::kCPU));
    seen.emplace_back(tensor, cpu);
    return cpu;
  };
  std::vector<IValue> views = map_arguments(op.schema(), arguments, c10::Device(at::kCPU), view);
  Stack computed;
  if (traits.random)
    run_random(op, views, device, [&] { computed = call(op, views); });
  else
    computed = call(op, views);
  for (const auto& value : computed) stack->push_back(map_tensors(value, [&](const at::Tensor& result) { return bring_back(result, seen, device); }));
}

}  // namespace

void run_operator(const c10::OperatorHandle& op, Stack* stack) {
  const Traits& traits = traits_of(op);
  const size_t count = op.schema().arguments().size();
  std::vector<IValue> arguments(stack->end() - count, stack->end());
  stack->erase(stack->end() - count, stack->end());
  c10::Device device = device_of(arguments);
  TORCH_CHECK_NOT_IMPLEMENTED(op.hasComputedKernelForDispatchKey(c10::DispatchKey::CPU), "the software NPU has no operator ", op.operator_name(),
                              ": there is no CPU kernel behind it");
  check_devices(op, arguments, device);
  if (draws_numbers(op, traits, arguments)) return run_now(op, traits, arguments, device, "it draws random numbers", stack);
  if (!traits.returns_tensors) return run_now(op, traits, arguments, device, "it returns a plain value", stack);
  // In place, the shapes are known; asking for them still finds arguments that do not fit, before the stream fails on them.
  Shapes known = infer_shapes(op, arguments);
  bool wrong = !known.results && op.hasComputedKernelForDispatchKey(c10::DispatchKey::Meta);
  if (traits.needs_shapes ? !known.results : wrong && !capturing(current_stream(device)))
    return run_now(op, traits, arguments, device, known.reason, stack);
  auto results = make_results(traits, arguments, traits.needs_shapes ? known.results.get() : nullptr, device);
  queue_operator(op, traits, arguments, results, device);
  for (auto& result : results) stack->push_back(std::move(result));
}

}  // namespace softnpu::ops
