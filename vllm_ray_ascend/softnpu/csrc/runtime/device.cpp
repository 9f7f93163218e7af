// Devices: initialisation, the visible list, the current device of a thread, what a device says of itself.
#include <dirent.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>

#include "runtime/core.h"

namespace softnpu {
namespace {

thread_local int t_visible = -1;

// One context a device; its address is the handle that CANN calls a context.
struct Context {
  int visible;
};

Context* context(int visible) {
  static auto* contexts = [] {
    auto* made = new std::vector<Context>;
    for (int index = 0; index < kMaxDevices; index++) made->push_back({index});
    return made;
  }();
  return &(*contexts)[visible];
}

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

}  // namespace

int visible_device() { return t_visible; }
int physical_device() { return t_visible < 0 ? -1 : visible_list()[t_visible]; }
void use_device(int visible) { t_visible = visible; }

}  // namespace softnpu

using namespace softnpu;

extern "C" {

aclError aclInit(const char*) {
  if (real_driver())
    return fail(ACL_ERROR_RT_DEV_SETUP_ERROR,
                "a real Ascend driver is present: the software NPU refuses to load. Start the process without `vllm-ray-ascend softnpu exec`.");
  static std::atomic<bool> done{false};
  return done.exchange(true) ? ACL_ERROR_REPEAT_INITIALIZE : ACL_SUCCESS;
}

aclError aclFinalize() { return ACL_SUCCESS; }

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

aclError aclrtSetDevice(int32_t visible) {
  if (auto code = check_visible(visible, "aclrtSetDevice")) return code;
  int physical = visible_list()[visible];
  if (fault("open_device", {{"device", std::to_string(physical)}}))
    return fail(ACL_ERROR_RT_DEV_SETUP_ERROR, "NPU " + std::to_string(physical) + " does not open: asked for by SOFTNPU_FAULTS");
  table::opened(physical);
  t_visible = visible;
  return ACL_SUCCESS;
}

aclError aclrtGetDevice(int32_t* visible) {
  if (t_visible < 0) return ACL_ERROR_RT_CONTEXT_NULL;  // an ordinary question of torch_npu, not worth a message
  *visible = t_visible;
  return ACL_SUCCESS;
}

aclError aclrtResetDevice(int32_t visible) {
  if (auto code = check_visible(visible, "aclrtResetDevice")) return code;
  table::closed(visible_list()[visible]);
  return ACL_SUCCESS;
}

aclError aclrtGetCurrentContext(aclrtContext* out) {
  if (t_visible < 0) return ACL_ERROR_RT_CONTEXT_NULL;
  *out = context(t_visible);
  return ACL_SUCCESS;
}

aclError aclrtSetCurrentContext(aclrtContext handle) {
  if (!handle) return fail(ACL_ERROR_RT_CONTEXT_NULL, "aclrtSetCurrentContext of no context");
  t_visible = static_cast<Context*>(handle)->visible;
  return ACL_SUCCESS;
}

aclError aclrtGetPrimaryCtxState(int32_t visible, uint32_t* flags, int32_t* active) {
  if (auto code = check_visible(visible, "aclrtGetPrimaryCtxState")) return code;
  if (flags) *flags = 0;
  *active = !open_streams_of(visible).empty() || table::used_memory(visible_list()[visible]) > 0;
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
  snprintf(uuid->bytes, sizeof uuid->bytes, "softnpu-%d", visible_list()[visible]);
  return ACL_SUCCESS;
}

aclError aclrtDeviceTaskAbort(int32_t, uint32_t) { return fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "the software NPU cannot abort tasks"); }

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

// The CANN release whose behaviour is followed.
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
