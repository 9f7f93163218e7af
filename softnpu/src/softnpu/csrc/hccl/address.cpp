// Which address and port of this node HCCL uses, as CANN documents HCCL_IF_IP, HCCL_SOCKET_IFNAME, HCCL_IF_BASE_PORT,
// HCCL_HOST_SOCKET_PORT_RANGE and HCCL_NPU_SOCKET_PORT_RANGE.
#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netinet/in.h>
#include <sys/un.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdlib>
#include <map>
#include <mutex>
#include <sstream>
#include <vector>

#include "hccl/net.h"

namespace softnpu::hccl {
namespace {

constexpr int kPortsAfterBase = 32;
constexpr int kLastPort = 65535;
constexpr int kNpuPort = 16666;

struct Interface {
  std::string name, ip;
  bool loopback;
};

std::vector<Interface> interfaces() {
  std::vector<Interface> found;
  ifaddrs* list = nullptr;
  if (getifaddrs(&list) != 0) return found;
  for (ifaddrs* entry = list; entry; entry = entry->ifa_next) {
    if (!entry->ifa_addr || entry->ifa_addr->sa_family != AF_INET || !(entry->ifa_flags & IFF_UP)) continue;
    char ip[INET_ADDRSTRLEN];
    inet_ntop(AF_INET, &reinterpret_cast<sockaddr_in*>(entry->ifa_addr)->sin_addr, ip, sizeof ip);
    found.push_back({entry->ifa_name, ip, (entry->ifa_flags & IFF_LOOPBACK) != 0});
  }
  freeifaddrs(list);
  return found;
}

std::string listing() {
  std::string text;
  for (const auto& each : interfaces()) text += (text.empty() ? "" : ", ") + each.name + " " + each.ip;
  return text;
}

// "eth,enp" names prefixes, "=eth0,eth1" whole names; a leading "^" means every interface but these.
bool selects(std::string setting, const std::string& name) {
  bool inverted = setting[0] == '^';
  if (inverted) setting.erase(0, 1);
  bool whole = setting[0] == '=';
  if (whole) setting.erase(0, 1);
  bool named = false;
  std::stringstream entries(setting);
  for (std::string entry; getline(entries, entry, ',');)
    named = named || (!entry.empty() && (whole ? name == entry : name.rfind(entry, 0) == 0));
  return named != inverted;
}

std::string own_ip() {
  const char* ip = getenv("HCCL_IF_IP");
  if (ip && *ip) return ip;
  const char* setting = getenv("HCCL_SOCKET_IFNAME");
  bool chosen = setting && *setting;
  for (const auto& each : interfaces())
    if (chosen ? selects(setting, each.name) : !each.loopback) return each.ip;
  if (!chosen) return "127.0.0.1";
  throw Failure(HCCL_E_PARA, std::string("HCCL_SOCKET_IFNAME=") + setting +
                                 " matches no interface of this node that is up and has an IPv4 address (" + listing() +
                                 "): set it to one of these, or unset it");
}

struct Ports {
  int first, last;
};
constexpr Ports kAnyPort{0, 0};

// A decimal number, or -1: neither signs nor spaces, nor anything after it.
int number(const std::string& text) {
  bool digits = !text.empty() && text.size() <= 5 && text.find_first_not_of("0123456789") == std::string::npos;
  return digits ? atoi(text.c_str()) : -1;
}

// Ports and ranges of ports, such as "60000,60050-60100".
std::vector<Ports> parse_ports(const std::string& variable, const std::string& setting) {
  std::vector<Ports> found;
  bool good = setting.back() != ',';
  std::stringstream entries(setting);
  for (std::string entry; good && getline(entries, entry, ',');) {
    size_t dash = entry.find('-');
    Ports next{number(entry.substr(0, dash)), number(dash == std::string::npos ? entry : entry.substr(dash + 1))};
    auto overlaps = [&](const Ports& other) { return next.first <= other.last && other.first <= next.last; };
    good = next.first >= 1 && next.first <= next.last && next.last <= kLastPort &&
           std::none_of(found.begin(), found.end(), overlaps);
    found.push_back(next);
  }
  if (good) return found;
  throw Failure(HCCL_E_PARA, variable + "=" + setting +
                                 " is neither auto nor ports from 1 to 65535 that do not overlap: set it as in "
                                 "61000-61063 or 61000,61050-61100, or unset it");
}

constexpr const char* kHostRange = "HCCL_HOST_SOCKET_PORT_RANGE";
constexpr const char* kNpuRange = "HCCL_NPU_SOCKET_PORT_RANGE";

std::string port_range(const char* variable = kHostRange) {
  const char* setting = getenv(variable);
  return setting ? setting : "";
}

// The ports to try, in this order. The range goes before the base port, and nothing outside it is used.
std::vector<Ports> ports_to_try() {
  std::string range = port_range();
  if (range == "auto") return {kAnyPort};
  if (!range.empty()) return parse_ports(kHostRange, range);
  const char* setting = getenv("HCCL_IF_BASE_PORT");
  int base = setting ? atoi(setting) : 0;
  if (base <= 0) return {kAnyPort};
  return {{base, std::min(base + kPortsAfterBase - 1, kLastPort)}, kAnyPort};
}

// A listening socket, or none and errno.
Fd try_listen(const Address& address) {
  SocketAddress target = parse(address);
  Fd fd(socket(target.storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  int on = 1;
  if (fd) setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  if (!fd || bind(fd.get(), target.get(), target.size) != 0 || listen(fd.get(), SOMAXCONN) != 0) return Fd();
  return fd;
}

uint16_t bound_port(int fd) {
  SocketAddress own;
  own.size = sizeof own.storage;
  getsockname(fd, own.get(), &own.size);
  bool v6 = own.storage.ss_family == AF_INET6;
  return ntohs(v6 ? reinterpret_cast<sockaddr_in6*>(&own.storage)->sin6_port
                  : reinterpret_cast<sockaddr_in*>(&own.storage)->sin_port);
}

// Takes a port of an NPU's own interface, which no address of this node stands for: a name in the network namespace that
// the kernel releases with the process.
Fd try_npu_port(int device, int port) {
  const char* state = getenv("SOFTNPU_STATE_DIR");
  std::string identity = node_key() + " " + (state ? state : "") + " " + std::to_string(device);
  sockaddr_un name{};
  name.sun_family = AF_UNIX;
  int length = snprintf(name.sun_path + 1, sizeof name.sun_path - 1, "softnpu-hccl-%zx-%d",
                        std::hash<std::string>()(identity), port);
  Fd fd(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  socklen_t size = offsetof(sockaddr_un, sun_path) + 1 + static_cast<socklen_t>(length);
  if (!fd || bind(fd.get(), reinterpret_cast<sockaddr*>(&name), size) != 0) return Fd();
  return fd;
}

Fd take_npu_port(int device) {
  std::string range = port_range(kNpuRange);
  auto ports = range.empty() ? std::vector<Ports>{{kNpuPort, kNpuPort}} : parse_ports(kNpuRange, range);
  Fd fd;
  if (!fault("npu_port_in_use", {{"device", std::to_string(device)}}))
    for (const auto& [first, last] : ports)
      for (int port = first; !fd && port <= last; port++) fd = try_npu_port(device, port);
  if (fd) return fd;
  throw Failure(HCCL_E_UNAVAIL, "EI0019: port " + (range.empty() ? std::to_string(kNpuPort) : range) + " of NPU " +
                                    std::to_string(device) + " is in use: another process has a communicator on this "
                                    "NPU. Set HCCL_NPU_SOCKET_PORT_RANGE, to auto or to enough ports, in both");
}

}  // namespace

std::shared_ptr<Fd> hold_npu_port(int device) {
  static std::mutex mutex;
  static std::map<int, std::weak_ptr<Fd>> held;
  if (port_range(kNpuRange) == "auto") return nullptr;
  std::lock_guard<std::mutex> lock(mutex);
  auto port = held[device].lock();
  if (!port) held[device] = port = std::make_shared<Fd>(take_npu_port(device));
  return port;
}

Fd listen_here(Address& bound) {
  bound.ip = own_ip();
  Fd fd;
  for (const auto& [first, last] : ports_to_try())
    for (int port = first; !fd && port <= last; port++) fd = try_listen({bound.ip, static_cast<uint16_t>(port)});
  if (!fd && errno == EADDRNOTAVAIL)
    throw Failure(HCCL_E_PARA, "HCCL_IF_IP=" + bound.ip + " is no address of this node (" + listing() +
                                   "): every node needs its own value; set it to one of these, or unset it");
  if (!fd && !port_range().empty())
    throw Failure(HCCL_E_UNAVAIL, "HCCL_HOST_SOCKET_PORT_RANGE=" + port_range() + ": no port of it is free on " +
                                      bound.ip + " (" + strerror(errno) + "): widen the range, or end the processes "
                                      "that hold its ports (`ss -ltnp` lists them)");
  if (!fd) throw Failure(HCCL_E_UNAVAIL, "cannot listen on " + bound.ip + ": " + strerror(errno));
  bound.port = bound_port(fd.get());
  return fd;
}

}  // namespace softnpu::hccl
