// The environment variables of the software NPU, CANN's own that matter to it, faults, logging, error text.
#include <net/if.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>

#include "runtime/core.h"

namespace softnpu {
namespace {

thread_local std::string t_error;
std::atomic<uint32_t> g_op_wait_timeout{0};

const char* text_setting(const char* name) {
  const char* value = getenv(name);
  return value && *value ? value : nullptr;
}

long integer_setting(const char* name, long fallback, long low, long high) {
  const char* text = text_setting(name);
  if (!text) return fallback;
  char* end = nullptr;
  long value = strtol(text, &end, 10);
  if (*end == 0 && value >= low && value <= high) return value;
  fprintf(stderr, "softnpu: %s=%s is not a whole number from %ld to %ld\n", name, text, low, high);
  abort();
}

std::string trimmed(const std::string& text) {
  size_t begin = text.find_first_not_of(" \t\n"), end = text.find_last_not_of(" \t\n");
  return begin == std::string::npos ? "" : text.substr(begin, end - begin + 1);
}

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::stringstream stream(text);
  for (std::string part; getline(stream, part, separator);) parts.push_back(trimmed(part));
  return parts;
}

}  // namespace

int device_count() {
  static const int count = integer_setting("SOFTNPU_DEVICES", 8, 0, kMaxDevices);
  return count;
}

// CANN keeps the order, and stops at the first entry that is no id of this node or a repeated one.
const std::vector<int>& visible_list() {
  static const std::vector<int> list = [] {
    std::vector<int> ids;
    const char* text = getenv("ASCEND_RT_VISIBLE_DEVICES");
    if (!text) {
      for (int id = 0; id < device_count(); id++) ids.push_back(id);
      return ids;
    }
    for (const auto& entry : split(text, ',')) {
      char* end = nullptr;
      long id = strtol(entry.c_str(), &end, 10);
      bool valid = !entry.empty() && *end == 0 && id >= 0 && id < device_count();
      for (int earlier : ids) valid = valid && earlier != id;
      if (!valid) break;
      ids.push_back(static_cast<int>(id));
    }
    return ids;
  }();
  return list;
}

size_t device_memory() {
  static const size_t bytes = [] {
    const char* text = text_setting("SOFTNPU_MEMORY");
    if (!text) return size_t{1} << 30;
    char* end = nullptr;
    double value = strtod(text, &end);
    const char* units = "KMGT";
    const char* unit = *end ? strchr(units, toupper(*end)) : nullptr;
    if (!(value > 0) || (*end && (!unit || end[1]))) {
      fprintf(stderr, "softnpu: SOFTNPU_MEMORY=%s is not a size such as 512M or 2G\n", text);
      abort();
    }
    return static_cast<size_t>(unit ? value * static_cast<double>(1ull << (10 * (unit - units + 1))) : value);
  }();
  return bytes;
}

int stream_budget() {
  static const int budget = integer_setting("SOFTNPU_STREAMS", 2048, 1, 1 << 20);
  return budget;
}

void set_op_wait_timeout(uint32_t seconds) { g_op_wait_timeout = seconds; }

Limit wait_limit() {
  double fallback = strict("unlimited-waits") ? 0 : seconds_setting("HCCL_EXEC_TIMEOUT", 1836);
  double seconds = seconds_setting("SOFTNPU_WAIT_LIMIT", fallback);
  if (seconds <= 0) return std::nullopt;
  return std::chrono::milliseconds(static_cast<int64_t>(seconds * 1000));
}

Limit op_wait_limit() {
  Limit all = wait_limit(), set;
  if (g_op_wait_timeout) set = std::chrono::seconds(g_op_wait_timeout);
  return all && set ? std::min(all, set) : all ? all : set;
}

double seconds_setting(const char* name, double fallback) {
  const char* text = text_setting(name);
  double value = text ? atof(text) : 0;
  return value > 0 ? value : fallback;
}

// ---- strictness
namespace {

// Each is described in docs/software-npu.md, "Rules of CANN".
constexpr const char* kRules[] = {"context-stop",      "link-setup",   "async-error",   "connect-timeout",           "unlimited-waits",
                                  "default-device",    "capture-pageable", "capture-null-stream", "destroy-again", "batch-one-item-per-peer",
                                  "host-register-zero", "reset-device", "npu-ports", "receiver-first", "stream-context", "peer-death", "zero-bytes"};

bool known(const std::string& rule) {
  return std::find(std::begin(kRules), std::end(kRules), rule) != std::end(kRules);
}

// SOFTNPU_STRICT, read once: unset or "1" relaxes nothing, "0" everything, "-RULE,-RULE" those rules.
struct Strictness {
  std::set<std::string> relaxed;
  std::string problem;
};

Strictness parse_strict(const std::string& text) {
  Strictness result;
  if (text == "0") result.relaxed.insert(std::begin(kRules), std::end(kRules));
  if (text == "0" || text == "1") return result;
  for (const auto& part : split(text, ',')) {
    if (part.empty()) continue;
    if (part[0] == '-' && known(part.substr(1))) {
      result.relaxed.insert(part.substr(1));
      continue;
    }
    result.problem = "SOFTNPU_STRICT=" + text + ": \"" + part + "\" is not 0, 1 or -RULE with one of the rules";
    for (const char* rule : kRules) result.problem += std::string(" ") + rule;
    break;
  }
  return result;
}

struct FaultRule {
  std::string kind;
  Fault settings;
  long matched = 0;
};

// Each is described in docs/software-npu.md, "Faults on demand", with the keys that select its calls.
const std::map<std::string, std::set<std::string>> kFaults = {
    {"open_device", {"device"}},          {"device_error", {"device", "task"}}, {"no_memory", {"device", "capturing"}},
    {"capture", {"device"}},              {"hccl_silent", {"rank", "comm"}},    {"unseen_death", {"rank"}},
    {"link_setup", {"rank", "comm", "op", "code"}}, {"rdma_error", {"rank", "comm"}}, {"destroy_again", {"comm"}},
    {"npu_port_in_use", {"device"}},      {"slow_link", {"ms", "mbps"}}};

// The setting's text: its own, or that of the file which "@FILE" names (read again at each query, so that
// a test can request a fault while a process runs).
std::string fault_text() {
  const char* value = text_setting("SOFTNPU_FAULTS");
  if (!value || value[0] != '@') return value ? value : "";
  std::ifstream file(value + 1);
  return std::string(std::istreambuf_iterator<char>(file), {});
}

// Why a fault as it is written is none; empty where it is one.
std::string problem_of(const FaultRule& rule) {
  auto found = kFaults.find(rule.kind);
  std::string names;
  if (found == kFaults.end()) {
    for (const auto& [kind, keys] : kFaults) names += " " + kind;
    return "\"" + rule.kind + "\" is no fault; there are" + names;
  }
  for (const auto& [key, value] : rule.settings) {
    bool exists = key == "nth" || key == "after" || found->second.count(key);
    if (exists && value.empty()) return rule.kind + ": \"" + key + "\" has no value";
    if (exists) continue;
    for (const auto& known : found->second) names += " " + known;
    return rule.kind + " has no \"" + key + "\"; it has" + names + " nth after";
  }
  return "";
}

std::vector<FaultRule> parse_faults(const std::string& text, std::string* problem) {
  std::vector<FaultRule> rules;
  for (const auto& part : split(text, ';')) {
    if (trimmed(part).empty()) continue;
    size_t colon = part.find(':');
    FaultRule rule;
    rule.kind = trimmed(part.substr(0, colon));
    if (colon != std::string::npos)
      for (const auto& pair : split(part.substr(colon + 1), ',')) {
        size_t equal = pair.find('=');
        std::string key = trimmed(pair.substr(0, equal));
        rule.settings[key] = equal == std::string::npos ? "" : trimmed(pair.substr(equal + 1));
      }
    if (std::string why = problem_of(rule); !why.empty() && problem->empty()) *problem = "SOFTNPU_FAULTS: " + why;
    rules.push_back(rule);
  }
  return rules;
}

std::string fault_problem() {
  std::string problem;
  parse_faults(fault_text(), &problem);
  return problem;
}

const Strictness& strictness() {
  static const Strictness parsed = parse_strict(getenv("SOFTNPU_STRICT") ? getenv("SOFTNPU_STRICT") : "");
  return parsed;
}

}  // namespace

bool strict(const char* rule) {
  if (known(rule)) return !strictness().relaxed.count(rule);
  fprintf(stderr, "softnpu: strict(\"%s\") is no rule: a defect of the software NPU\n", rule);
  abort();
}

aclError check_settings() {
  static const std::string problem = !strictness().problem.empty() ? strictness().problem : fault_problem();
  if (problem.empty()) return ACL_SUCCESS;
  static const int printed = fprintf(stderr, "softnpu: %s\n", problem.c_str());  // whatever SOFTNPU_LOG says
  (void)printed;
  return fail(ACL_ERROR_RT_PARAM_INVALID, problem);
}

const std::string& node_key() {
  static const std::string key = [] {
    if (const char* name = text_setting("SOFTNPU_NODE")) return std::string(name);
    struct stat space {};
    stat("/proc/self/ns/net", &space);
    std::string boot;  // the namespace's number alone may be the same on two machines
    std::ifstream("/proc/sys/kernel/random/boot_id") >> boot;
    return boot + "-" + std::to_string(space.st_ino);
  }();
  return key;
}

aclError fail(aclError code, const std::string& message) {
  t_error = message;
  log(1, "%s (%d)", message.c_str(), static_cast<int>(code));
  return code;
}

std::string last_error() { return t_error; }

void log(int level, const char* format, ...) {
  static const int threshold = integer_setting("SOFTNPU_LOG", 1, 0, 3);
  if (level > threshold) return;
  char line[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);
  fprintf(stderr, "[softnpu %d] %s\n", static_cast<int>(getpid()), line);
}

// ---- faults
namespace {

struct Rules {
  std::mutex mutex;
  std::string text;
  std::vector<FaultRule> rules;
};


bool matches(const FaultRule& rule, const std::map<std::string, std::string>& facts) {
  for (const auto& [name, value] : facts) {
    auto wanted = rule.settings.find(name);
    if (wanted != rule.settings.end() && wanted->second != value) return false;
  }
  return true;
}

}  // namespace

std::optional<Fault> fault(const std::string& kind, const std::map<std::string, std::string>& facts) {
  static const bool asked = text_setting("SOFTNPU_FAULTS") != nullptr;
  if (!asked) return std::nullopt;
  static Rules rules;
  std::lock_guard<std::mutex> lock(rules.mutex);
  if (auto text = fault_text(); text != rules.text) {
    std::string problem;
    rules.rules = parse_faults(text, &problem);
    rules.text = text;
    if (!problem.empty()) {  // of a file that was changed: a test would wait for a fault that never comes
      fprintf(stderr, "softnpu: %s\n", problem.c_str());
      abort();
    }
  }
  for (auto& rule : rules.rules) {
    if (rule.kind != kind || !matches(rule, facts)) continue;
    long count = ++rule.matched;
    auto nth = rule.settings.find("nth"), after = rule.settings.find("after");
    if (nth != rule.settings.end() && atol(nth->second.c_str()) != count) continue;
    if (after != rule.settings.end() && count <= atol(after->second.c_str())) continue;
    log(2, "fault injected: %s", kind.c_str());
    return rule.settings;
  }
  return std::nullopt;
}

}  // namespace softnpu
