// Sockets: which address of this node HCCL uses, connections with a time limit, frames.
#pragma once

#include <sys/socket.h>

#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "hccl/common.h"

namespace softnpu::hccl {

class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd) : fd_(fd) {}
  Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Fd& operator=(Fd&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Fd() { close(); }
  void close();
  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }

 private:
  int fd_ = -1;
};

struct Address {
  std::string ip;
  uint16_t port = 0;
  std::string text() const {
    return (ip.find(':') == std::string::npos ? ip : "[" + ip + "]") + ":" + std::to_string(port);
  }
};

struct SocketAddress {
  sockaddr_storage storage{};
  socklen_t size = 0;
  sockaddr* get() { return reinterpret_cast<sockaddr*>(&storage); }
};
SocketAddress parse(const Address& address);  // throws HCCL_E_PARA

// A random value that identifies the connections of one communicator.
using Token = uint64_t;
uint64_t random_number();

// Listens on the address that HCCL_IF_IP or HCCL_SOCKET_IFNAME chooses, else on the first IPv4 interface that
// is up, else on loopback; on a port of HCCL_HOST_SOCKET_PORT_RANGE, else one of 32 from HCCL_IF_BASE_PORT on, else any.
// Throws HCCL_E_PARA for an invalid setting, HCCL_E_UNAVAIL when no port of the range is free.
Fd listen_here(Address& bound);

// Holds the port on which HCCL listens on an NPU of this node: 16666, or one of HCCL_NPU_SOCKET_PORT_RANGE. All
// communicators of a process share it. Null where the operating system may choose. Throws HCCL_E_UNAVAIL when another
// process of the NPU has it, HCCL_E_PARA for an invalid setting.
std::shared_ptr<Fd> hold_npu_port(int device);

// A connected, non-blocking socket; throws HCCL_E_TCP_CONNECT, with `purpose` in the text.
Fd connect_to(const Address& address, const Deadline& deadline, const std::string& purpose);

// A frame is a length and as many bytes. Both throw: HCCL_E_TIMEOUT, or HCCL_E_REMOTE when the other end is gone.
void send_frame(int fd, const std::string& payload, const Deadline& deadline);
std::string receive_frame(int fd, const Deadline& deadline);

// Passes each connection whose first frame starts with `token` to `take`, with the rest of that frame, until `take`
// returns false (then returns true) or the deadline passes (then returns false). Connections without the token are
// rejected, and none of them delays the others.
bool gather(int listener, Token token, const Deadline& deadline, const std::function<bool(Fd, Reader)>& take);

}  // namespace softnpu::hccl
