// The boxed arguments of an operator, and the tensors inside them.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>
#include <vector>

namespace softnpu::ops {

using c10::IValue;

// Calls `visit` on each tensor inside an argument, and puts what it returns in its place.
template <class Visit>
IValue map_tensors(const IValue& value, const Visit& visit) {
  if (value.isTensor()) return visit(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> mapped;
    for (const at::Tensor& tensor : value.toTensorVector()) mapped.push_back(visit(tensor));
    return mapped;
  }
  bool optional_list = value.isOptionalTensorList() || (value.isList() && value.toList().elementType()->kind() == c10::TypeKind::OptionalType &&
                                                        value.toList().elementType()->containedType(0)->kind() == c10::TypeKind::TensorType);
  if (!optional_list) return value;
  c10::List<std::optional<at::Tensor>> mapped;
  for (const IValue& entry : value.toListRef()) mapped.push_back(entry.isTensor() ? std::optional<at::Tensor>(visit(entry.toTensor())) : std::nullopt);
  return mapped;
}

// The arguments for another device: tensors through `visit`, and the device argument, if there is one.
template <class Visit>
std::vector<IValue> map_arguments(const c10::FunctionSchema& schema, const std::vector<IValue>& arguments, c10::Device device, const Visit& visit) {
  std::vector<IValue> mapped;
  for (size_t index = 0; index < arguments.size(); index++) {
    const IValue& value = arguments[index];
    bool names_device = (value.isDevice() && value.toDevice().type() == c10::DeviceType::PrivateUse1) || (value.isNone() && schema.arguments()[index].name() == "device");
    mapped.push_back(names_device ? IValue(device) : map_tensors(value, visit));
  }
  return mapped;
}

inline std::vector<at::Tensor> tensors_of(const IValue& value) {
  if (value.isTensor()) return {value.toTensor()};
  return value.isTensorList() ? value.toTensorVector() : std::vector<at::Tensor>{};
}

}  // namespace softnpu::ops
