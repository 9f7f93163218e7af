// Device and host memory, and the copies between them.
#include "runtime/memory.h"

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

namespace softnpu {

Segment::~Segment() {
  close(fd);
  if (physical >= 0) table::release_memory(physical, size);
}

std::shared_ptr<Segment> Segment::make(size_t size, int visible, aclError* code) {
  int physical = visible_list()[visible];
  if (fault("no_memory", {{"device", std::to_string(physical)}, {"capturing", capture_in_progress() ? "1" : "0"}})) {
    *code = fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "out of memory: injected by SOFTNPU_FAULTS");
    return nullptr;
  }
  if (!table::charge_memory(physical, size)) {
    *code = fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "NPU " + std::to_string(physical) + " is out of memory: " + std::to_string(size) + " bytes requested, " +
                                                     std::to_string(table::used_memory(physical)) + " of " + std::to_string(device_memory()) + " in use (SOFTNPU_MEMORY)");
    return nullptr;
  }
  int fd = memfd_create("softnpu", MFD_CLOEXEC);
  if (fd < 0 || ftruncate(fd, static_cast<off_t>(size))) {
    if (fd >= 0) close(fd);
    table::release_memory(physical, size);
    *code = fail(ACL_ERROR_RT_MEMORY_ALLOCATION, std::string("the host has no memory for NPU ") + std::to_string(physical) + ": " + strerror(errno));
    return nullptr;
  }
  return std::make_shared<Segment>(fd, size, physical);
}

std::shared_ptr<Segment> Segment::adopt(int fd) {
  struct stat info {};
  fstat(fd, &info);
  return std::make_shared<Segment>(fd, static_cast<size_t>(info.st_size), -1);
}

void Blocks::add(void* address, Block block) {
  std::lock_guard<std::mutex> lock(mutex_);
  blocks_[address] = std::move(block);
}

bool Blocks::take(void* address, Block* out) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto found = blocks_.find(address);
  if (found == blocks_.end()) return false;
  *out = std::move(found->second);
  blocks_.erase(found);
  return true;
}

std::vector<std::pair<void*, Block>> Blocks::take_all(int visible) {
  std::vector<std::pair<void*, Block>> taken;
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto next = blocks_.begin(); next != blocks_.end();) {
    auto current = next++;
    if (current->second.visible != visible) continue;
    taken.emplace_back(current->first, std::move(current->second));
    blocks_.erase(current);
  }
  return taken;
}

bool Blocks::find(const void* inside, void** start, Block* out) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto next = blocks_.upper_bound(const_cast<void*>(inside));
  if (next == blocks_.begin()) return false;
  auto& [address, block] = *--next;
  if (static_cast<const char*>(inside) >= static_cast<char*>(address) + block.size) return false;
  *start = address;
  *out = block;
  return true;
}

Blocks& blocks() {
  static auto* blocks = new Blocks;
  return *blocks;
}

size_t whole_pages(size_t bytes) { return (bytes + 4095) / 4096 * 4096; }

HostRanges& host_ranges() {
  static auto* ranges = new HostRanges;
  return *ranges;
}

void HostRanges::add(void* address, size_t size) {
  std::lock_guard<std::mutex> lock(mutex_);
  ranges_[address] = size;
}

void HostRanges::remove(void* address) {
  std::lock_guard<std::mutex> lock(mutex_);
  ranges_.erase(address);
}

bool HostRanges::contains(const void* inside) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto next = ranges_.upper_bound(const_cast<void*>(inside));
  if (next == ranges_.begin()) return false;
  auto& [address, size] = *--next;
  return static_cast<const char*>(inside) < static_cast<char*>(address) + size;
}

void free_memory(int visible) {
  for (auto& [address, block] : blocks().take_all(visible)) munmap(address, block.size);
  free_physical(visible);
}

bool drained(int visible) {
  bool all = true;
  for (auto& stream : streams_of(visible)) {
    if (stream->runs_here()) continue;
    all = stream->wait_idle(std::chrono::seconds(10)) && all;
  }
  return all;
}

namespace {

// Allowed during a capture: torch_npu's allocator grows its graph pool with it.
aclError allocate(void** out, size_t size) {
  if (!out || !size) return fail(ACL_ERROR_RT_PARAM_INVALID, "aclrtMalloc of no bytes, or to no address");
  if (visible_device() < 0) return fail(ACL_ERROR_RT_CONTEXT_NULL, "aclrtMalloc needs a device: call aclrtSetDevice first");
  aclError code = ACL_SUCCESS;
  size = whole_pages(size);
  auto segment = Segment::make(size, visible_device(), &code);
  if (!segment) return code;
  void* address = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, segment->fd, 0);
  if (address == MAP_FAILED) return fail(ACL_ERROR_RT_MEMORY_ALLOCATION, std::string("mmap: ") + strerror(errno));
  blocks().add(address, {size, visible_device(), segment});
  *out = address;
  return ACL_SUCCESS;
}

aclError release(void* address) {
  Block block;
  if (!blocks().take(address, &block)) return fail(ACL_ERROR_RT_PARAM_INVALID, "aclrtFree of an address that aclrtMalloc did not return");
  // A stream that hangs keeps its addresses (a leak of address space) rather than crash.
  if (drained(block.visible)) munmap(address, block.size);
  return ACL_SUCCESS;
}

aclError allocate_host(void** out, size_t size) {
  *out = aligned_alloc(4096, whole_pages(size ? size : 1));
  if (!*out) return fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "the host is out of memory");
  host_ranges().add(*out, size);
  return ACL_SUCCESS;
}

aclError register_host(void* address, uint64_t size, const char* call) {
  if ((!address || !size) && strict("host-register-zero"))
    return fail(ACL_ERROR_RT_PARAM_INVALID, std::string(call) + " of " + std::to_string(size) + " bytes at " + (address ? "an address" : "no address"));
  host_ranges().add(address, size);
  return ACL_SUCCESS;
}

bool pageable(const void* address) {
  void* start;
  Block block;
  return !blocks().find(address, &start, &block) && !host_ranges().contains(address);
}

}  // namespace

aclError check_pageable(const void* to, const void* from, aclrtStream stream) {
  if (!strict("capture-pageable") || !capture_in_progress() || !(pageable(to) || pageable(from))) return ACL_SUCCESS;
  if (auto code = forbid_in_capture("aclrtMemcpyAsync of pageable host memory")) return code;
  if (!capturing(stream)) return ACL_SUCCESS;
  return fail(ACL_ERROR_RT_STREAM_CAPTURED, "aclrtMemcpyAsync of pageable host memory on a stream under capture");
}

namespace {

aclError check_some(size_t size, const char* call) {
  if (size || !strict("zero-bytes")) return ACL_SUCCESS;
  return fail(ACL_ERROR_RT_PARAM_INVALID, std::string(call) + " of no bytes");
}

aclError check_copy(size_t capacity, size_t size, const char* call) {
  if (size <= capacity) return ACL_SUCCESS;
  return fail(ACL_ERROR_RT_PARAM_INVALID, std::string(call) + ": " + std::to_string(size) + " bytes into a buffer of " + std::to_string(capacity));
}

aclError copy_async(void* to, size_t capacity, const void* from, size_t size, aclrtStream stream) {
  if (auto code = check_copy(capacity, size, "aclrtMemcpyAsync")) return code;
  if (auto code = check_some(size, "aclrtMemcpyAsync")) return code;
  if (auto code = check_pageable(to, from, stream)) return code;
  return enqueue(stream, "copy", [=] { memmove(to, from, size); return ACL_SUCCESS; });
}

}  // namespace
}  // namespace softnpu

using namespace softnpu;

extern "C" {

aclError aclrtMalloc(void** out, size_t size, aclrtMemMallocPolicy) { return allocate(out, size); }
aclError aclrtMallocAlign32(void** out, size_t size, aclrtMemMallocPolicy) { return allocate(out, size); }
aclError aclrtFree(void* address) { return release(address); }

aclError aclrtMallocHost(void** out, size_t size) { return allocate_host(out, size); }
aclError aclrtMallocHostWithCfg(void** out, uint64_t size, aclrtMallocConfig*) { return allocate_host(out, size); }
aclError aclrtFreeHost(void* address) {
  host_ranges().remove(address);
  free(address);
  return ACL_SUCCESS;
}
aclError aclrtHostRegister(void* address, uint64_t size, aclrtHostRegisterType, void** device_address) {
  *device_address = address;
  return register_host(address, size, "aclrtHostRegister");
}
aclError aclrtHostRegisterV2(void* address, uint64_t size, uint32_t) { return register_host(address, size, "aclrtHostRegisterV2"); }
aclError aclrtHostUnregister(void* address) {
  host_ranges().remove(address);
  return ACL_SUCCESS;
}

aclError aclrtGetMemInfo(aclrtMemAttr, size_t* free_bytes, size_t* total) {
  int physical = physical_device();
  if (physical < 0) return fail(ACL_ERROR_RT_CONTEXT_NULL, "aclrtGetMemInfo needs a device: call aclrtSetDevice first");
  size_t used = table::used_memory(physical);
  *total = device_memory();
  *free_bytes = *total > used ? *total - used : 0;
  return ACL_SUCCESS;
}

aclError aclrtGetMemUsageInfo(int32_t, aclrtMemUsageInfo*, size_t, size_t* count) {
  *count = 0;
  return ACL_SUCCESS;
}

aclError aclrtPointerGetAttributes(const void* address, aclrtPtrAttributes* out) {
  memset(out, 0, sizeof *out);
  out->location.type = ACL_MEM_LOCATION_TYPE_UNREGISTERED;
  out->pageSize = 4096;
  void* start;
  Block block;
  if (blocks().find(address, &start, &block)) {
    out->location.type = ACL_MEM_LOCATION_TYPE_DEVICE;
    out->location.id = static_cast<uint32_t>(block.visible);
  }
  return ACL_SUCCESS;
}

aclError aclrtMemcpy(void* to, size_t capacity, const void* from, size_t size, aclrtMemcpyKind) {
  if (auto code = check_copy(capacity, size, "aclrtMemcpy")) return code;
  if (auto code = forbid_in_capture("aclrtMemcpy")) return code;
  memmove(to, from, size);
  return ACL_SUCCESS;
}

aclError aclrtMemcpyAsync(void* to, size_t capacity, const void* from, size_t size, aclrtMemcpyKind, aclrtStream stream) {
  return copy_async(to, capacity, from, size, stream);
}

aclError aclrtMemcpyAsyncWithCondition(void* to, size_t capacity, const void* from, size_t size, aclrtMemcpyKind, aclrtStream stream) {
  return copy_async(to, capacity, from, size, stream);
}

aclError aclrtMemcpyBatch(void** to, size_t* rooms, void** from, size_t* sizes, size_t count, aclrtMemcpyBatchAttr*, size_t*, size_t, size_t* failed) {
  if (auto code = forbid_in_capture("aclrtMemcpyBatch")) return code;
  for (size_t index = 0; index < count; index++) {
    if (auto code = check_copy(rooms[index], sizes[index], "aclrtMemcpyBatch")) {
      if (failed) *failed = index;
      return code;
    }
    memmove(to[index], from[index], sizes[index]);
  }
  return ACL_SUCCESS;
}

aclError aclrtMemcpyBatchAsync(void** to, size_t* rooms, void** from, size_t* sizes, size_t count, aclrtMemcpyBatchAttr*, size_t*, size_t, size_t* failed,
                               aclrtStream stream) {
  for (size_t index = 0; index < count; index++)
    if (auto code = copy_async(to[index], rooms[index], from[index], sizes[index], stream)) {
      if (failed) *failed = index;
      return code;
    }
  return ACL_SUCCESS;
}

aclError aclrtMemset(void* to, size_t capacity, int32_t value, size_t size) {
  if (auto code = check_copy(capacity, size, "aclrtMemset")) return code;
  if (auto code = forbid_in_capture("aclrtMemset")) return code;
  memset(to, value, size);
  return ACL_SUCCESS;
}

aclError aclrtMemsetAsync(void* to, size_t capacity, int32_t value, size_t size, aclrtStream stream) {
  if (auto code = check_copy(capacity, size, "aclrtMemsetAsync")) return code;
  if (auto code = check_some(size, "aclrtMemsetAsync")) return code;
  return enqueue(stream, "memset", [=] { memset(to, value, size); return ACL_SUCCESS; });
}

aclError aclrtCmoAsync(void*, size_t, aclrtCmoType, aclrtStream) { return ACL_SUCCESS; }  // a hint to caches

aclError aclrtValueWrite(void* address, uint64_t value, uint32_t, aclrtStream stream) {
  return enqueue(stream, "value write", [=] { __atomic_store_n(static_cast<uint64_t*>(address), value, __ATOMIC_SEQ_CST); return ACL_SUCCESS; });
}

aclError aclrtValueWait(void* address, uint64_t value, uint32_t how, aclrtStream stream) {
  return enqueue(stream, "value wait", [=]() -> aclError {
    auto start = Clock::now();
    for (Limit limit = wait_limit(); !limit || Clock::now() - start < *limit;) {
      if (device_stopped()) return ACL_SUCCESS;  // the context has the error
      uint64_t seen = __atomic_load_n(static_cast<uint64_t*>(address), __ATOMIC_SEQ_CST);
      bool met = how == ACL_STREAM_WAIT_VALUE_GEQ   ? static_cast<int64_t>(seen - value) >= 0
                 : how == ACL_STREAM_WAIT_VALUE_EQ  ? seen == value
                 : how == ACL_STREAM_WAIT_VALUE_AND ? (seen & value) != 0
                                                    : ~(seen | value) != 0;
      if (met) return ACL_SUCCESS;
      std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
    return fail(ACL_ERROR_RT_WAIT_TIMEOUT, "a value that a stream waits for was not written in time (SOFTNPU_WAIT_LIMIT)");
  });
}

}  // extern "C"
