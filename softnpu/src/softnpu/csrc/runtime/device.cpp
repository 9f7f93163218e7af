// Devices: initialisation, the visible list, the current device of a thread, device properties.
#include <dirent.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <regex>

#include "runtime/core.h"

namespace softnpu {
namespace {

constexpr int kCubeCores = 24, kVectorCores = 48;
constexpr int64_t kCacheBytes = 192 << 20;

int64_t cores(aclrtDevResLimitType type) { return type == ACL_RT_DEV_RES_CUBE_CORE ? kCubeCores : kVectorCores; }

aclError check_visible(int visible, const char* call) {
  int count = static_cast<int>(visible_list().size());
  if (visible >= 0 && visible < count) return ACL_SUCCESS;
  const char* list = getenv("ASCEND_RT_VISIBLE_DEVICES");
  return fail(ACL_ERROR_RT_INVALID_DEVICEID, std::string(call) + ": device " + std::to_string(visible) + " is not among the " + std::to_string(count) +
                                                 " visible devices (ASCEND_RT_VISIBLE_DEVICES=" + (list ? list : "unset") + ", the node has " +
                                                 std::to_string(device_count()) + ")");
}

bool real_driver() {
  struct stat info {};
  return stat("/dev/davinci_manager", &info) == 0 || stat("/usr/local/Ascend/driver", &info) == 0;
}

// Reads "defaultDevice": {"default_device": "N"} of aclInit's JSON file; torch_npu passes its acl_default.json.
aclError read_default_device(const char* path) {
  if (!path || !*path || !strict("default-device")) return ACL_SUCCESS;
  std::ifstream file(path);
  if (!file) return fail(ACL_ERROR_INVALID_FILE, std::string("aclInit: ") + path + " cannot be read");
  std::string text(std::istreambuf_iterator<char>(file), {});
  std::smatch found;
  static const std::regex entry("\"defaultDevice\"\\s*:\\s*\\{[^}]*\"default_device\"\\s*:\\s*\"([^\"]*)\"");
  if (!std::regex_search(text, found, entry)) return ACL_SUCCESS;
  std::string value = found[1];
  char* end = nullptr;
  long visible = strtol(value.c_str(), &end, 10);
  if (value.empty() || *end) return fail(ACL_ERROR_INVALID_PARAM, std::string(path) + ": default_device is \"" + value + "\", not a number");
  if (auto code = check_visible(static_cast<int>(visible), "aclInit with a default device")) return code;
  set_default_device(static_cast<int>(visible));
  return ACL_SUCCESS;
}

std::atomic<bool> g_initialized{false};

// The calling thread has no device after that, if it was the last user.
aclError reset(int visible, bool force, const char* call) {
  if (auto code = check_visible(visible, call)) return code;
  if (!strict("reset-device")) {
    table::closed(visible_list()[visible]);
    return ACL_SUCCESS;
  }
  aclError code = context(visible).release(force);
  if (!code && !context(visible).open() && thread_device() == visible) use_device(-1);
  return code;
}

}  // namespace

aclError set_device(int visible) {
  if (auto code = check_visible(visible, "aclrtSetDevice")) return code;
  if (auto code = check_settings()) return code;
  int physical = visible_list()[visible];
  if (fault("open_device", {{"device", std::to_string(physical)}}))
    return fail(ACL_ERROR_RT_DEV_SETUP_ERROR, "NPU " + std::to_string(physical) + " does not open: injected by SOFTNPU_FAULTS");
  context(visible).retain();
  use_device(visible);
  return ACL_SUCCESS;
}

}  // namespace softnpu

using namespace softnpu;

extern "C" {

aclError aclInit(const char* path) {
  if (real_driver())
    return fail(ACL_ERROR_RT_DEV_SETUP_ERROR,
                "a real Ascend driver is present: the software NPU refuses to load. Start the process without `softnpu exec`.");
  if (auto code = check_settings()) return code;
  if (g_initialized.exchange(true)) return ACL_ERROR_REPEAT_INITIALIZE;
  aclError code = read_default_device(path);
  if (code) g_initialized = false;
  return code;
}

aclError aclFinalize() {
  set_default_device(-1);
  g_initialized = false;
  return ACL_SUCCESS;
}

const char* aclGetRecentErrMsg() {
  static thread_local std::string text;
  text = last_error();
  return text.c_str();
}

const char* aclrtGetSocName() {
  const char* name = getenv("SOFTNPU_SOC");
  return name && *name ? name : "Ascend910B1";
}

aclError aclrtGetDeviceCount(uint32_t* count) {
  *count = static_cast<uint32_t>(visible_list().size());
  return ACL_SUCCESS;
}

aclError aclrtSetDevice(int32_t visible) { return set_device(visible); }

// Names the default device without opening it.
aclError aclrtGetDevice(int32_t* visible) {
  bool set = thread_device() >= 0 && context(thread_device()).open();
  *visible = set ? thread_device() : default_device();
  return *visible < 0 ? ACL_ERROR_RT_CONTEXT_NULL : ACL_SUCCESS;  // a routine query of torch_npu: not logged
}

aclError aclrtResetDevice(int32_t visible) { return reset(visible, false, "aclrtResetDevice"); }
aclError aclrtResetDeviceForce(int32_t visible) { return reset(visible, true, "aclrtResetDeviceForce"); }

aclError aclrtGetCurrentContext(aclrtContext* out) {
  if (thread_device() < 0) return ACL_ERROR_RT_CONTEXT_NULL;
  *out = &context(thread_device());
  return ACL_SUCCESS;
}

aclError aclrtSetCurrentContext(aclrtContext handle) {
  if (!handle) return fail(ACL_ERROR_RT_CONTEXT_NULL, "aclrtSetCurrentContext of no context");
  use_device(static_cast<Context*>(handle)->visible);
  return ACL_SUCCESS;
}

aclError aclrtGetPrimaryCtxState(int32_t visible, uint32_t* flags, int32_t* active) {
  if (auto code = check_visible(visible, "aclrtGetPrimaryCtxState")) return code;
  if (flags) *flags = 0;
  *active = context(visible).open();
  return ACL_SUCCESS;
}

aclError aclrtGetLogicDevIdByUserDevId(const int32_t visible, int32_t* const physical) {
  if (auto code = check_visible(visible, "aclrtGetLogicDevIdByUserDevId")) return code;
  *physical = visible_list()[visible];
  return ACL_SUCCESS;
}

aclError aclrtDeviceCanAccessPeer(int32_t* can, int32_t, int32_t) {
  *can = 1;
  return ACL_SUCCESS;
}

aclError aclrtDeviceEnablePeerAccess(int32_t, uint32_t) { return ACL_SUCCESS; }

aclError aclrtDeviceGetBareTgid(int32_t* pid) {
  *pid = getpid();
  return ACL_SUCCESS;
}

aclError aclrtDeviceGetUuid(int32_t visible, aclrtUuid* uuid) {
  if (auto code = check_visible(visible, "aclrtDeviceGetUuid")) return code;
  memset(uuid, 0, sizeof *uuid);
  const auto node = static_cast<uint32_t>(std::hash<std::string>()(node_key()));  // one NPU, one UUID in the cluster
  snprintf(uuid->bytes, sizeof uuid->bytes, "%08x-%d", node, visible_list()[visible]);
  return ACL_SUCCESS;
}

aclError aclrtDeviceTaskAbort(int32_t visible, uint32_t timeout_ms) {
  if (auto code = check_visible(visible, "aclrtDeviceTaskAbort")) return code;
  if (!context(visible).open()) return fail(ACL_ERROR_RT_CONTEXT_NULL, "aclrtDeviceTaskAbort of a device that is not set");
  return context(visible).abort_tasks(timeout_ms ? Limit(std::chrono::milliseconds(timeout_ms)) : std::nullopt);
}

aclError aclrtGetDeviceUtilizationRate(int32_t, aclrtUtilizationInfo* info) {
  info->cubeUtilization = info->vectorUtilization = info->aicpuUtilization = info->memoryUtilization = 0;
  return ACL_SUCCESS;
}

aclError aclrtGetDeviceInfo(uint32_t, aclrtDevAttr attribute, int64_t* value) {
  switch (attribute) {
    case ACL_DEV_ATTR_AICPU_CORE_NUM: *value = 6; break;
    case ACL_DEV_ATTR_AICORE_CORE_NUM:
    case ACL_DEV_ATTR_CUBE_CORE_NUM: *value = kCubeCores; break;
    case ACL_DEV_ATTR_VECTOR_CORE_NUM: *value = kVectorCores; break;
    case ACL_DEV_ATTR_TOTAL_GLOBAL_MEM_SIZE: *value = static_cast<int64_t>(device_memory()); break;
    case ACL_DEV_ATTR_L2_CACHE_SIZE: *value = kCacheBytes; break;
    default: return fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "aclrtGetDeviceInfo: attribute " + std::to_string(attribute) + " is unknown here");
  }
  return ACL_SUCCESS;
}

aclError aclGetDeviceCapability(uint32_t, aclDeviceInfo info, int64_t* value) {
  *value = info == ACL_DEVICE_INFO_AI_CORE_NUM ? kCubeCores : info == ACL_DEVICE_INFO_VECTOR_CORE_NUM ? kVectorCores : kCacheBytes;
  return ACL_SUCCESS;
}

aclError aclrtGetDeviceResLimit(int32_t, aclrtDevResLimitType type, uint32_t* value) {
  *value = static_cast<uint32_t>(cores(type));
  return ACL_SUCCESS;
}
aclError aclrtSetDeviceResLimit(int32_t, aclrtDevResLimitType, uint32_t) { return ACL_SUCCESS; }
aclError aclrtResetDeviceResLimit(int32_t) { return ACL_SUCCESS; }
aclError aclrtGetStreamResLimit(aclrtStream, aclrtDevResLimitType type, uint32_t* value) { return aclrtGetDeviceResLimit(0, type, value); }
aclError aclrtSetStreamResLimit(aclrtStream, aclrtDevResLimitType, uint32_t) { return ACL_SUCCESS; }
aclError aclrtResetStreamResLimit(aclrtStream) { return ACL_SUCCESS; }
aclError aclrtUseStreamResInCurrentThread(aclrtStream) { return ACL_SUCCESS; }
aclError aclrtUnuseStreamResInCurrentThread(aclrtStream) { return ACL_SUCCESS; }
aclError aclrtGetResInCurrentThread(aclrtDevResLimitType type, uint32_t* value) { return aclrtGetDeviceResLimit(0, type, value); }

aclError aclrtSetDeviceSatMode(aclrtFloatOverflowMode) { return ACL_SUCCESS; }
aclError aclrtSetOpExecuteTimeOut(uint32_t) { return ACL_SUCCESS; }
aclError aclrtSetOpExecuteTimeOutV2(uint64_t timeout, uint64_t* actual) {
  if (actual) *actual = timeout;
  return ACL_SUCCESS;
}
aclError aclrtSetOpWaitTimeout(uint32_t seconds) {
  set_op_wait_timeout(seconds);
  return ACL_SUCCESS;
}
aclError aclrtSetSysParamOpt(aclSysParamOpt, int64_t) { return ACL_SUCCESS; }
aclError aclrtCtxSetSysParamOpt(aclSysParamOpt, int64_t) { return ACL_SUCCESS; }
aclError aclrtGetSysParamOpt(aclSysParamOpt, int64_t* value) {
  *value = 0;
  return ACL_SUCCESS;
}

aclError aclGetCannAttributeList(const aclCannAttr** list, size_t* count) {
  static const aclCannAttr attributes[] = {ACL_CANN_ATTR_INF_NAN, ACL_CANN_ATTR_BF16, ACL_CANN_ATTR_JIT_COMPILE};
  *list = attributes;
  *count = sizeof attributes / sizeof *attributes;
  return ACL_SUCCESS;
}
aclError aclGetCannAttribute(aclCannAttr, int32_t* value) {
  *value = 1;
  return ACL_SUCCESS;
}

// The CANN release whose behaviour is emulated.
aclError aclsysGetCANNVersion(aclCANNPackageName, aclCANNPackageVersion* version) {
  memset(version, 0, sizeof *version);
  strcpy(version->version, "8.5.0");
  strcpy(version->majorVersion, "8");
  strcpy(version->minorVersion, "5");
  strcpy(version->releaseVersion, "0");
  return ACL_SUCCESS;
}
aclError aclsysGetVersionStr(char*, char* version) {
  strcpy(version, "8.5.0");
  return ACL_SUCCESS;
}

aclError aclrtPeekAtLastError(aclrtLastErrLevel) { return ACL_SUCCESS; }
aclError aclrtGetLastError(aclrtLastErrLevel) { return ACL_SUCCESS; }

}  // extern "C"
