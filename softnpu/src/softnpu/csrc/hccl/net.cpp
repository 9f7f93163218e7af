#include "hccl/net.h"

#include <fcntl.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <list>
#include <random>
#include <vector>

namespace softnpu::hccl {
namespace {

constexpr uint32_t kMaxFrame = 1 << 20;

// Waits for one socket; returns its events, or 0 when the deadline passed.
int wait_for(int fd, short events, const Deadline& deadline) {
  pollfd entry{fd, events, 0};
  for (;;) {
    int64_t left = deadline.milliseconds_left();
    int ready = poll(&entry, 1, static_cast<int>(std::min<int64_t>(left, INT_MAX)));
    if (ready > 0) return entry.revents;
    if (ready == 0 || (errno != EINTR && errno != EAGAIN)) return 0;
  }
}

// Keepalive detects silent node loss (the other machine lost power): probes after 5 s without traffic, and 3 unanswered
// ones 2 s apart close the connection.
void configure(int fd) {
  auto set = [fd](int level, int option, int value) { setsockopt(fd, level, option, &value, sizeof value); };
  set(IPPROTO_TCP, TCP_NODELAY, 1);
  set(SOL_SOCKET, SO_KEEPALIVE, 1);
  set(IPPROTO_TCP, TCP_KEEPIDLE, 5);
  set(IPPROTO_TCP, TCP_KEEPINTVL, 2);
  set(IPPROTO_TCP, TCP_KEEPCNT, 3);
}

bool transfer_all(int fd, char* data, size_t size, bool sending, const Deadline& deadline) {
  while (size > 0) {
    ssize_t moved = sending ? send(fd, data, size, MSG_NOSIGNAL) : recv(fd, data, size, 0);
    if (moved > 0) {
      data += moved;
      size -= static_cast<size_t>(moved);
    } else if (moved < 0 && errno == EINTR) {
      continue;
    } else if (moved == 0 || errno != EAGAIN) {
      throw Failure(HCCL_E_REMOTE, std::string("the other end closed the connection") +
                                       (moved < 0 ? std::string(" (") + strerror(errno) + ")" : ""));
    } else if (!wait_for(fd, sending ? POLLOUT : POLLIN, deadline)) {
      return false;
    }
  }
  return true;
}

}  // namespace

void Fd::close() {
  if (fd_ >= 0) ::close(std::exchange(fd_, -1));
}

SocketAddress parse(const Address& address) {
  addrinfo hints{}, *found = nullptr;
  hints.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV;
  hints.ai_socktype = SOCK_STREAM;
  if (getaddrinfo(address.ip.c_str(), std::to_string(address.port).c_str(), &hints, &found) != 0)
    throw Failure(HCCL_E_PARA, "\"" + address.ip + "\" is no IP address");
  SocketAddress result;
  result.size = found->ai_addrlen;
  memcpy(&result.storage, found->ai_addr, found->ai_addrlen);
  freeaddrinfo(found);
  return result;
}

uint64_t random_number() {
  std::random_device device;
  return (static_cast<uint64_t>(device()) << 32) | device();
}

Fd connect_to(const Address& address, const Deadline& deadline, const std::string& purpose) {
  auto unreachable = [&](int error) {
    return Failure(HCCL_E_TCP_CONNECT,
                   "cannot connect to " + purpose + " at " + address.text() + ": " + strerror(error) +
                       ". Either that process has exited or timed out, or the address is not reachable from "
                       "here: then set HCCL_IF_IP or HCCL_SOCKET_IFNAME on its node");
  };
  SocketAddress target = parse(address);
  Fd fd(socket(target.storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd) throw unreachable(errno);
  if (connect(fd.get(), target.get(), target.size) != 0) {
    if (errno != EINPROGRESS) throw unreachable(errno);
    if (!wait_for(fd.get(), POLLOUT, deadline)) throw unreachable(ETIMEDOUT);
    int error = 0;
    socklen_t size = sizeof error;
    getsockopt(fd.get(), SOL_SOCKET, SO_ERROR, &error, &size);
    if (error != 0) throw unreachable(error);
  }
  configure(fd.get());
  return fd;
}

void send_frame(int fd, const std::string& payload, const Deadline& deadline) {
  std::string frame = Writer().put(payload).bytes();
  if (!transfer_all(fd, frame.data(), frame.size(), true, deadline))
    throw Failure(HCCL_E_TIMEOUT, "the other end does not accept data");
}

std::string receive_frame(int fd, const Deadline& deadline) {
  uint32_t size = 0;
  bool came = transfer_all(fd, reinterpret_cast<char*>(&size), sizeof size, false, deadline);
  if (size > kMaxFrame) throw Failure(HCCL_E_INTERNAL, "the other end uses another protocol");
  std::string payload(size, '\0');
  if (!came || !transfer_all(fd, payload.data(), size, false, deadline))
    throw Failure(HCCL_E_TIMEOUT, "the other end does not answer");
  return payload;
}

namespace {

struct Stranger {
  Fd fd;
  std::string bytes;

  // Reads what has arrived, but nothing past the frame. Returns false if the peer is gone, or sent no valid token.
  bool read() {
    char buffer[4096];
    while (size_t want = missing()) {
      ssize_t got = recv(fd.get(), buffer, std::min(want, sizeof buffer), 0);
      if (got == 0 || (got < 0 && errno != EAGAIN && errno != EINTR)) return false;
      if (got < 0) return true;
      bytes.append(buffer, static_cast<size_t>(got));
      if (bytes.size() >= sizeof(uint32_t) && frame_size() > kMaxFrame) return false;
    }
    return true;
  }
  size_t missing() const {
    size_t whole = sizeof(uint32_t) + (bytes.size() < sizeof(uint32_t) ? 0 : frame_size());
    return whole - bytes.size();
  }
  uint32_t frame_size() const {
    uint32_t size;
    memcpy(&size, bytes.data(), sizeof size);
    return size;
  }
  bool complete() const { return bytes.size() >= sizeof(uint32_t) && missing() == 0; }
};

}  // namespace

bool gather(int listener, Token token, const Deadline& deadline, const std::function<bool(Fd, Reader)>& take) {
  std::list<Stranger> strangers;
  while (!deadline.passed()) {
    std::vector<pollfd> entries{{listener, POLLIN, 0}};
    for (auto& stranger : strangers) entries.push_back({stranger.fd.get(), POLLIN, 0});
    if (poll(entries.data(), entries.size(),
             static_cast<int>(std::min<int64_t>(deadline.milliseconds_left(), INT_MAX))) <= 0)
      continue;
    size_t index = 1;
    for (auto it = strangers.begin(); it != strangers.end(); index++) {
      bool alive = entries[index].revents == 0 || it->read();
      if (alive && !it->complete()) {
        ++it;
        continue;
      }
      Stranger known = std::move(*it);
      it = strangers.erase(it);
      if (!alive || known.frame_size() < sizeof(Token)) continue;
      Reader reader(known.bytes.substr(sizeof(uint32_t)));
      if (reader.get<Token>() == token && !take(std::move(known.fd), std::move(reader))) return true;
    }
    if (entries[0].revents == 0) continue;
    Fd fd(accept4(listener, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!fd) continue;
    configure(fd.get());
    strangers.push_back({std::move(fd), ""});
  }
  return false;
}

}  // namespace softnpu::hccl
