// What the C functions share: handles, and the step from exceptions to return codes.
#pragma once

#include <memory>
#include <new>

#include "hccl/communicator.h"

namespace softnpu::hccl {

// Handles are numbers that are never used again, so that a stale one is recognised.
HcclComm add_handle(std::shared_ptr<Communicator> comm);
std::shared_ptr<Communicator> find(HcclComm handle);           // throws HCCL_E_PTR or HCCL_E_NOT_FOUND
std::shared_ptr<Communicator> remove_handle(HcclComm handle);  // likewise

inline void require(bool condition, HcclResult code, const std::string& text) {
  if (!condition) throw Failure(code, text);
}

// Runs the body of a C function.
template <class Body>
HcclResult guarded(const char* call, Body body) noexcept {
  auto failed = [&](HcclResult code, const char* text) {
    softnpu::fail(static_cast<aclError>(code), std::string(call) + ": " + text);
    return code;
  };
  try {
    body();
    return HCCL_SUCCESS;
  } catch (const Failure& failure) {
    return failed(failure.code, failure.what());
  } catch (const std::bad_alloc&) {
    return failed(HCCL_E_MEMORY, "out of host memory");
  } catch (const std::exception& error) {
    return failed(HCCL_E_INTERNAL, error.what());
  }
}

}  // namespace softnpu::hccl
