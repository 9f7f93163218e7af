// Random numbers follow the device's generator: the same seed gives the same numbers, each call advances its offset.
#include <ATen/CPUGeneratorImpl.h>

#include "torch_npu/csrc/aten/NPUGeneratorImpl.h"

#include "ops/fallback.h"
#include "ops/tensors.h"

namespace softnpu::ops {
namespace {

constexpr uint64_t kOffsetStep = 4;  // torch's philox offsets are multiples of four

uint64_t mix(uint64_t seed, uint64_t offset) {
  uint64_t value = seed + 0x9e3779b97f4a7c15ull * (offset / kOffsetStep + 1);
  value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9ull;
  value = (value ^ (value >> 27)) * 0x94d049bb133111ebull;
  return value ^ (value >> 31);
}

uint64_t draw_seed(at::Generator generator) {
  std::lock_guard<std::mutex> lock(generator.mutex());
  uint64_t offset = generator.get_offset();
  generator.set_offset(offset + kOffsetStep);
  return mix(generator.current_seed(), offset);
}

}  // namespace

void run_random(const c10::OperatorHandle& op, std::vector<c10::IValue>& arguments, c10::Device device, const std::function<void()>& call) {
  // Not globalContext().defaultGenerator: torch_npu 2.10 does not override the hook that it asks.
  at::Generator generator = at_npu::detail::getDefaultNPUGenerator(device.index());
  int position = -1;
  for (size_t index = 0; index < arguments.size(); index++) {
    if (arguments[index].isGenerator()) generator = arguments[index].toGenerator();
    if (op.schema().arguments()[index].name() == "generator") position = static_cast<int>(index);
  }
  if (generator.device().type() == at::kCPU) return call();  // the caller's own CPU generator
  uint64_t seed = draw_seed(generator);
  if (position >= 0) {
    arguments[position] = at::make_generator<at::CPUGeneratorImpl>(seed);
    return call();
  }
  // The operator takes no generator: it uses the CPU's default one, whose state is restored afterwards.
  at::Generator cpu = at::globalContext().defaultGenerator(at::kCPU);
  at::Tensor state = cpu.get_state();
  cpu.set_current_seed(seed);
  try {
    call();
  } catch (...) {
    cpu.set_state(state);
    throw;
  }
  cpu.set_state(state);
}

}  // namespace softnpu::ops
