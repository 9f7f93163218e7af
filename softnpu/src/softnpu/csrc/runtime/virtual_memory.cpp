// Virtual memory (expandable segments, sleep mode) and memory shared between processes of a node.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>

#include "runtime/memory.h"

namespace softnpu {
namespace {

constexpr size_t kAlign = size_t{2} << 20;

struct Reservation {
  void* base;
  size_t size;
};

struct Reservations {
  std::mutex mutex;
  std::map<void*, Reservation> list;  // by the aligned address that was returned
};

Reservations& reservations() {
  static auto* list = new Reservations;
  return *list;
}

Registry<Segment>& segments() {
  static auto* registry = new Registry<Segment>;
  return *registry;
}

// Opens a segment that process `pid` holds as `fd`. Works within one pid namespace and user.
int open_remote(int pid, int fd) {
  std::string path = "/proc/" + std::to_string(pid) + "/fd/" + std::to_string(fd);
  return open(path.c_str(), O_RDWR | O_CLOEXEC);
}

}  // namespace

void free_physical(int visible) {
  int physical = visible_list()[visible];
  segments().remove_if([=](const Segment& segment) { return segment.physical == physical; });
}

}  // namespace softnpu

using namespace softnpu;

extern "C" {

aclError aclrtReserveMemAddress(void** out, size_t size, size_t, void* wanted, uint64_t) {
  void* base = mmap(wanted, size + kAlign, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) return fail(ACL_ERROR_RT_MEMORY_ALLOCATION, std::string("no addresses left: ") + strerror(errno));
  *out = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(base) + kAlign - 1) & ~(kAlign - 1));
  std::lock_guard<std::mutex> lock(reservations().mutex);
  reservations().list[*out] = {base, size + kAlign};
  return ACL_SUCCESS;
}

aclError aclrtReleaseMemAddress(void* address) {
  std::lock_guard<std::mutex> lock(reservations().mutex);
  auto found = reservations().list.find(address);
  if (found == reservations().list.end()) return fail(ACL_ERROR_RT_PARAM_INVALID, "aclrtReleaseMemAddress of an address that was not reserved");
  munmap(found->second.base, found->second.size);
  reservations().list.erase(found);
  return ACL_SUCCESS;
}

aclError aclrtMallocPhysical(aclrtDrvMemHandle* handle, size_t size, const aclrtPhysicalMemProp* properties, uint64_t) {
  int visible = properties ? static_cast<int>(properties->location.id) : visible_device();
  if (visible < 0 || visible >= static_cast<int>(visible_list().size()))
    return fail(ACL_ERROR_RT_INVALID_DEVICEID, "aclrtMallocPhysical on device " + std::to_string(visible) + ", which is not visible");
  aclError code = ACL_SUCCESS;
  auto segment = Segment::make(size, visible, &code);
  if (segment) *handle = segments().add(segment);
  return code;
}

aclError aclrtFreePhysical(aclrtDrvMemHandle handle) {
  return segments().remove(handle) ? ACL_SUCCESS : fail(ACL_ERROR_RT_INVALID_HANDLE, "aclrtFreePhysical of an unknown handle");
}

aclError aclrtMapMem(void* address, size_t size, size_t offset, aclrtDrvMemHandle handle, uint64_t) {
  auto segment = segments().find(handle);
  if (!segment) return fail(ACL_ERROR_RT_INVALID_HANDLE, "aclrtMapMem of an unknown handle");
  if (mmap(address, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, segment->fd, static_cast<off_t>(offset)) == MAP_FAILED)
    return fail(ACL_ERROR_RT_MEMORY_ALLOCATION, std::string("aclrtMapMem: ") + strerror(errno));
  blocks().add(address, {size, std::max(visible_device(), 0), segment});
  return ACL_SUCCESS;
}

aclError aclrtUnmapMem(void* address) {
  Block block;
  if (!blocks().take(address, &block)) return fail(ACL_ERROR_RT_PARAM_INVALID, "aclrtUnmapMem of an address that is not mapped");
  drained(block.visible);
  mmap(address, block.size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
  return ACL_SUCCESS;
}

aclError aclrtMemExportToShareableHandle(aclrtDrvMemHandle handle, aclrtMemHandleType, uint64_t, uint64_t* out) {
  auto segment = segments().find(handle);
  if (!segment) return fail(ACL_ERROR_RT_INVALID_HANDLE, "export of an unknown handle");
  *out = static_cast<uint64_t>(getpid()) << 32 | static_cast<uint32_t>(segment->fd);
  return ACL_SUCCESS;
}

aclError aclrtMemSetPidToShareableHandle(uint64_t, int32_t*, size_t) { return ACL_SUCCESS; }

aclError aclrtMemImportFromShareableHandle(uint64_t shared, int32_t, aclrtDrvMemHandle* handle) {
  int fd = open_remote(static_cast<int>(shared >> 32), static_cast<int>(shared & 0xffffffff));
  if (fd < 0) return fail(ACL_ERROR_RT_INVALID_HANDLE, std::string("import of a memory handle: ") + strerror(errno));
  *handle = segments().add(Segment::adopt(fd));
  return ACL_SUCCESS;
}

aclError aclrtIpcMemGetExportKey(void* address, size_t size, char* key, size_t capacity, uint64_t) {
  void* start;
  Block block;
  if (!blocks().find(address, &start, &block)) return fail(ACL_ERROR_RT_PARAM_INVALID, "only device memory can be shared between processes");
  int written = snprintf(key, capacity, "%d:%d:%zu:%zu:%zx", getpid(), block.segment->fd, static_cast<size_t>(static_cast<char*>(address) - static_cast<char*>(start)), size,
                         std::hash<std::string>{}(node_key()));
  return written < static_cast<int>(capacity) ? ACL_SUCCESS : fail(ACL_ERROR_RT_PARAM_INVALID, "the buffer for the key is too small");
}

aclError aclrtIpcMemSetImportPid(const char*, int32_t*, size_t) { return ACL_SUCCESS; }

namespace {

auto& g_imports_mutex = *new std::mutex;
auto& g_imports = *new std::map<std::string, void*>;  // key, address

}  // namespace

aclError aclrtIpcMemImportByKey(void** out, const char* key, uint64_t) {
  int pid, fd_there;
  size_t offset, size, node;
  if (sscanf(key, "%d:%d:%zu:%zu:%zx", &pid, &fd_there, &offset, &size, &node) != 5) return fail(ACL_ERROR_RT_PARAM_INVALID, "not a key of aclrtIpcMemGetExportKey");
  if (node != std::hash<std::string>{}(node_key())) return fail(ACL_ERROR_RT_PARAM_INVALID, "the memory belongs to another node");
  int fd = open_remote(pid, fd_there);
  if (fd < 0) return fail(ACL_ERROR_RT_PARAM_INVALID, "process " + std::to_string(pid) + " no longer shares that memory");
  auto segment = Segment::adopt(fd);
  void* base = mmap(nullptr, segment->size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (base == MAP_FAILED) return fail(ACL_ERROR_RT_MEMORY_ALLOCATION, std::string("import of shared memory: ") + strerror(errno));
  blocks().add(base, {segment->size, std::max(visible_device(), 0), segment});
  std::lock_guard<std::mutex> lock(g_imports_mutex);
  g_imports[key] = base;
  *out = static_cast<char*>(base) + offset;
  return ACL_SUCCESS;
}

aclError aclrtIpcMemClose(const char* key) {
  std::lock_guard<std::mutex> lock(g_imports_mutex);
  auto found = g_imports.find(key);
  if (found == g_imports.end()) return ACL_SUCCESS;  // the exporting side closes its key as well
  Block block;
  if (blocks().take(found->second, &block)) munmap(found->second, block.size);
  g_imports.erase(found);
  return ACL_SUCCESS;
}

}  // extern "C"
