// The C functions of HCCL that make, name, watch and destroy communicators.
#include <atomic>
#include <cstddef>
#include <limits>
#include <set>

#include "hccl/handles.h"

namespace softnpu::hccl {
namespace {

constexpr uint32_t kMaxRanks = 4096;

struct Handles {
  std::mutex mutex;
  std::map<HcclComm, std::shared_ptr<Communicator>> open;
  uintptr_t last = 0;
};

// Never destroyed: threads of the process may still look up handles while it exits.
Handles& handles() {
  static auto* all = new Handles;
  return *all;
}

std::map<HcclComm, std::shared_ptr<Communicator>>::iterator locate(Handles& all, HcclComm handle) {
  require(handle != nullptr, HCCL_E_PTR, "the communicator is null");
  auto found = all.open.find(handle);
  require(found != all.open.end(), HCCL_E_NOT_FOUND, "there is no such communicator; it may have been destroyed");
  return found;
}

// In seconds, a fraction on Atlas A3, infinite for 0.
double exec_limit_setting() {
  const char* text = getenv("HCCL_EXEC_TIMEOUT");
  if (!text || !*text) return 1836;
  char* end = nullptr;
  double seconds = strtod(text, &end);
  if (*end || !(seconds >= 0 && seconds <= 2147483647))
    throw Failure(HCCL_E_PARA, std::string("EI0001: HCCL_EXEC_TIMEOUT=") + text + " is no number from 0 to 2147483647");
  return seconds > 0 ? seconds : std::numeric_limits<double>::infinity();
}

// The settings of a communicator that have an effect here.
struct Settings {
  std::string name;
  double exec_limit = exec_limit_setting();
};

// Callers may have been built with an older, shorter structure: its own first field holds its size.
Settings read_config(const HcclCommConfig* config) {
  Settings settings;
  if (!config) return settings;
  size_t size;
  uint32_t magic;
  memcpy(&size, config->reserved, sizeof size);
  memcpy(&magic, config->reserved + sizeof size, sizeof magic);
  require(magic == HCCL_COMM_CONFIG_MAGIC_WORD, HCCL_E_PARA,
          "the configuration was not initialised by HcclCommConfigInit");
  if (size >= offsetof(HcclCommConfig, hcclUdi))
    settings.name.assign(config->hcclCommName, strnlen(config->hcclCommName, COMM_NAME_MAX_LENGTH - 1));
  if (size >= offsetof(HcclCommConfig, hcclAlgo) && config->hcclExecTimeOut > 0)
    settings.exec_limit = config->hcclExecTimeOut;
  return settings;
}

void create(const RootInfo& root, uint32_t ranks, uint32_t rank, const Settings& settings, HcclComm* out) {
  *out = add_handle(std::make_shared<Communicator>(root, ranks, rank, settings.name, settings.exec_limit));
}

void check_place(uint32_t ranks, uint32_t rank) {
  require(ranks >= 1 && ranks <= kMaxRanks && rank < ranks, HCCL_E_PARA,
          "rank " + std::to_string(rank) + " of " + std::to_string(ranks) + " ranks is not possible");
  require(visible_device() >= 0, HCCL_E_RUNTIME, "no device is set on this thread: call aclrtSetDevice first");
}

HcclResult init(const char* call, uint32_t ranks, const HcclRootInfo* info, uint32_t rank, const HcclCommConfig* config,
                HcclComm* out) {
  return guarded(call, [&] {
    require(info && out, HCCL_E_PTR, "the root info or the pointer for the communicator is null");
    check_place(ranks, rank);
    create(RootInfo::parse(info->internal, sizeof info->internal), ranks, rank, read_config(config), out);
  });
}

HcclResult unsupported(const char* call, const char* instead) {
  return guarded(call, [&] {
    throw Failure(HCCL_E_NOT_SUPPORT, std::string("the software NPU does not support it: ") + instead);
  });
}

std::atomic<int32_t> g_deterministic{1};

}  // namespace

HcclComm add_handle(std::shared_ptr<Communicator> comm) {
  Handles& all = handles();
  std::lock_guard<std::mutex> lock(all.mutex);
  auto handle = reinterpret_cast<HcclComm>(++all.last << 4);
  all.open[handle] = std::move(comm);
  return handle;
}

std::shared_ptr<Communicator> find(HcclComm handle) {
  std::lock_guard<std::mutex> lock(handles().mutex);
  return locate(handles(), handle)->second;
}

std::shared_ptr<Communicator> remove_handle(HcclComm handle) {
  std::lock_guard<std::mutex> lock(handles().mutex);
  auto found = locate(handles(), handle);
  auto comm = std::move(found->second);
  handles().open.erase(found);
  return comm;
}

}  // namespace softnpu::hccl

using namespace softnpu::hccl;

extern "C" {

HcclResult HcclGetRootInfo(HcclRootInfo* info) {
  return guarded(__func__, [&] {
    require(info, HCCL_E_PTR, "the root info is null");
    std::string bytes = open_root().bytes();
    memset(info, 0, sizeof *info);
    memcpy(info->internal, bytes.data(), bytes.size());
  });
}

HcclResult HcclCommInitRootInfo(uint32_t ranks, const HcclRootInfo* info, uint32_t rank, HcclComm* comm) {
  return init(__func__, ranks, info, rank, nullptr, comm);
}

HcclResult HcclCommInitRootInfoConfig(uint32_t ranks, const HcclRootInfo* info, uint32_t rank,
                                      const HcclCommConfig* config, HcclComm* comm) {
  return init(__func__, ranks, info, rank, config, comm);
}

// A rank that is no member calls it with no ranks, and gets no communicator.
HcclResult HcclCreateSubCommConfig(HcclComm* parent, uint32_t count, uint32_t* ranks, uint64_t id, uint32_t rank,
                                   HcclCommConfig* config, HcclComm* comm) {
  return guarded(__func__, [&] {
    require(parent && comm, HCCL_E_PTR, "the communicator, or the pointer for the new one, is null");
    *comm = nullptr;
    if (!ranks) return;
    auto whole = find(*parent);
    check_place(count, rank);
    std::vector<uint32_t> members(ranks, ranks + count);
    require(std::set<uint32_t>(members.begin(), members.end()).size() == count, HCCL_E_PARA, "a rank is listed twice");
    require(*std::max_element(members.begin(), members.end()) < whole->size(), HCCL_E_PARA,
            "a listed rank is beyond the " + std::to_string(whole->size()) + " of communicator " + whole->name());
    require(members[rank] == whole->rank(), HCCL_E_PARA,
            "entry " + std::to_string(rank) + " of the list is not this rank, " + std::to_string(whole->rank()));
    Settings settings = read_config(config);
    if (settings.name.empty()) settings.name = whole->name() + "_sub_" + std::to_string(id);
    create(whole->share_root(members, id), count, rank, settings, comm);
  });
}

HcclResult HcclCommInitClusterInfo(const char*, uint32_t, HcclComm*) {
  return unsupported(__func__, "use HcclGetRootInfo and HcclCommInitRootInfo, and unset RANK_TABLE_FILE");
}

HcclResult HcclCommInitClusterInfoConfig(const char*, uint32_t, HcclCommConfig*, HcclComm*) {
  return unsupported(__func__, "use HcclGetRootInfo and HcclCommInitRootInfoConfig, and unset RANK_TABLE_FILE");
}

HcclResult HcclCommInitAll(uint32_t, int32_t*, HcclComm*) {
  return unsupported(__func__, "use one process for each device, and HcclCommInitRootInfo");
}

HcclResult HcclCommDestroy(HcclComm comm) {
  return guarded(__func__, [&] {
    auto found = find(comm);
    require(!found->in_use(), HCCL_E_AGAIN, "comm is in use, please try again later");
    remove_handle(comm)->destroy();
  });
}

HcclResult HcclGetCommName(HcclComm comm, char* name) {
  return guarded(__func__, [&] {
    require(name, HCCL_E_PTR, "the pointer for the name is null");
    std::string text = find(comm)->name().substr(0, COMM_NAME_MAX_LENGTH - 1);
    memcpy(name, text.c_str(), text.size() + 1);
  });
}

HcclResult HcclGetRankSize(HcclComm comm, uint32_t* size) {
  return guarded(__func__, [&] {
    require(size, HCCL_E_PTR, "the pointer for the size is null");
    *size = find(comm)->size();
  });
}

HcclResult HcclGetRankId(HcclComm comm, uint32_t* rank) {
  return guarded(__func__, [&] {
    require(rank, HCCL_E_PTR, "the pointer for the rank is null");
    *rank = find(comm)->rank();
  });
}

HcclResult HcclGetCommAsyncError(HcclComm comm, HcclResult* error) {
  return guarded(__func__, [&] {
    require(error, HCCL_E_PTR, "the pointer for the error is null");
    *error = find(comm)->async_error();
  });
}

const char* HcclGetErrorString(HcclResult code) {
  static const char* const texts[] = {"no error",
                                      "parameter error",
                                      "empty pointer",
                                      "memory error",
                                      "internal error",
                                      "not support feature",
                                      "not found specific resource",
                                      "resource unavailable",
                                      "call system interface error",
                                      "timeout",
                                      "open file fail",
                                      "tcp connect fail",
                                      "roce connect fail",
                                      "tcp transfer fail",
                                      "roce transfer fail",
                                      "call runtime api fail",
                                      "call driver api fail",
                                      "call profiling api fail",
                                      "call cce api fail",
                                      "call network api fail",
                                      "try again",
                                      "error cqe",
                                      "error communicator suspending",
                                      "retry constraint",
                                      "out of memory"};
  auto index = static_cast<size_t>(code);
  return index < std::size(texts) ? texts[index] : "unknown error";
}

uint32_t HcclGetCommConfigCapability() { return HCCL_COMM_CONFIG_EXEC_TIMEOUT + 1; }

// Kept, and without effect: results here are always deterministic.
HcclResult HcclSetConfig(HcclConfig config, HcclConfigValue value) {
  return guarded(__func__, [&] {
    require(config == HCCL_DETERMINISTIC, HCCL_E_PARA,
            "there is no setting " + std::to_string(static_cast<int>(config)));
    g_deterministic = value.value;
  });
}

HcclResult HcclGetConfig(HcclConfig config, HcclConfigValue* value) {
  return guarded(__func__, [&] {
    require(value, HCCL_E_PTR, "the pointer for the value is null");
    require(config == HCCL_DETERMINISTIC, HCCL_E_PARA,
            "there is no setting " + std::to_string(static_cast<int>(config)));
    value->value = g_deterministic;
  });
}

// Between the two, new operations fail with HCCL_E_SUSPENDING.
HcclResult HcclCommSuspend(HcclComm comm) {
  return guarded(__func__, [&] { find(comm)->suspend(true); });
}

HcclResult HcclCommResume(HcclComm comm) {
  return guarded(__func__, [&] { find(comm)->suspend(false); });
}

}  // extern "C"
