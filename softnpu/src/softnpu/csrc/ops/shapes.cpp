#include "ops/shapes.h"

#include <mutex>
#include <unordered_map>

#include "ops/arguments.h"
#include "ops/tensors.h"

namespace softnpu::ops {
namespace {

constexpr size_t kRemembered = 1 << 14;

void append(std::string& key, int64_t number) { key.append(reinterpret_cast<const char*>(&number), sizeof number); }

void append(std::string& key, const at::Tensor& tensor) {
  key += 't';
  if (!tensor.defined()) return;
  append(key, static_cast<int64_t>(tensor.scalar_type()) << 1 | tensor.unsafeGetTensorImpl()->is_wrapped_number());
  append(key, tensor.dim());
  for (int64_t size : tensor.sizes()) append(key, size);
  for (int64_t stride : tensor.strides()) append(key, stride);
}

// Adds what the meta kernel can see of an argument. Returns false for a kind that is not cached.
bool append(std::string& key, const IValue& value) {
  if (value.isNone()) return key += 'n', true;
  if (value.isTensor()) return append(key, value.toTensor()), true;
  if (value.isInt()) return key += 'i', append(key, value.toInt()), true;
  if (value.isBool()) return key += value.toBool() ? 'T' : 'F', true;
  if (value.isDouble()) {
    double number = value.toDouble();
    key += 'd';
    key.append(reinterpret_cast<const char*>(&number), sizeof number);
    return true;
  }
  if (value.isString()) return key += 's' + value.toStringRef() + '\0', true;
  if (value.isDevice()) return key += 'v', true;
  if (!value.isList()) return false;
  key += 'l';
  append(key, static_cast<int64_t>(value.toListRef().size()));
  for (const IValue& entry : value.toListRef())
    if (!append(key, entry)) return false;
  return true;
}

Shapes ask_meta_kernel(const c10::OperatorHandle& op, const std::vector<IValue>& arguments) {
  if (!op.hasComputedKernelForDispatchKey(c10::DispatchKey::Meta)) return {nullptr, "it has no meta kernel"};
  // A user's error raises here as well: the synchronous path then hits it again, and raises the CPU kernel's message.
  try {
    auto mapped = map_arguments(op.schema(), arguments, c10::Device(at::kMeta), meta_like);
    auto stack = std::make_shared<torch::jit::Stack>(mapped.begin(), mapped.end());
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::Meta), stack.get());
    return {stack, ""};
  } catch (const c10::Error& error) {
    return {nullptr, std::string("its shapes are not known before it runs: ") + error.what_without_backtrace()};
  } catch (const std::exception& error) {
    return {nullptr, std::string("its shapes are not known before it runs: ") + error.what()};
  }
}

}  // namespace

Shapes infer_shapes(const c10::OperatorHandle& op, const std::vector<IValue>& arguments) {
  static auto& mutex = *new std::mutex;
  static auto& remembered = *new std::unordered_map<std::string, Shapes>;
  std::string key;
  append(key, reinterpret_cast<int64_t>(&op.operator_name()));
  append(key, static_cast<int64_t>(at::get_default_dtype_as_scalartype()));  // a meta kernel may depend on it
  for (const auto& argument : arguments)
    if (!append(key, argument)) return ask_meta_kernel(op, arguments);
  {
    std::lock_guard<std::mutex> lock(mutex);
    if (auto found = remembered.find(key); found != remembered.end()) return found->second;
  }
  Shapes shapes = ask_meta_kernel(op, arguments);
  std::lock_guard<std::mutex> lock(mutex);
  if (remembered.size() >= kRemembered) remembered.clear();
  return remembered.emplace(key, shapes).first->second;
}

}  // namespace softnpu::ops
