#include "hccl/rendezvous.h"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <thread>

namespace softnpu::hccl {
namespace {

constexpr uint32_t kMagic = 0x31504e53;  // "SNP1"
constexpr double kGrace = 2;             // seconds that the root's answer may take beyond its own limit

void put(Writer& writer, const Member& member) {
  writer.put(member.rank).put(member.pid).put(member.device).put(member.segment_fd).put(member.segment_nonce);
  writer.put(member.node).put(member.address.ip).put(member.address.port);
}

Member get_member(Reader& reader) {
  Member member;
  member.rank = reader.get<uint32_t>();
  member.pid = reader.get<int32_t>();
  member.device = reader.get<int32_t>();
  member.segment_fd = reader.get<int32_t>();
  member.segment_nonce = reader.get<uint64_t>();
  member.node = reader.text();
  member.address.ip = reader.text();
  member.address.port = reader.get<uint16_t>();
  return member;
}

std::string listed(const std::vector<uint32_t>& ranks) {
  std::string text;
  for (uint32_t rank : ranks) text += (text.empty() ? "" : ", ") + std::to_string(rank);
  return text;
}

// The root's side. Runs on a detached thread: it accesses only what it owns.
class Root {
 public:
  Root(Fd listener, Token token) : listener_(std::move(listener)), token_(token), deadline_(connect_limit()) {}

  void serve() {
    bool finished = gather(listener_.get(), token_, deadline_, [this](Fd fd, Reader reader) {
      try {
        return admit(std::move(fd), reader);
      } catch (const Failure& failure) {
        log(1, "%s", failure.what());
        return true;
      }
    });
    listener_.close();
    if (!finished && !joined_.empty()) answer(HCCL_E_TIMEOUT, missing());
    if (!finished) log(1, "HCCL: %s", joined_.empty() ? "no rank joined the communicator in time" : missing().c_str());
  }

 private:
  struct Joined {
    Fd fd;
    Member member;
  };

  // Returns false when there is nothing left to wait for.
  bool admit(Fd fd, Reader& reader) {
    uint32_t ranks = reader.get<uint32_t>();
    Member member = get_member(reader);
    if (joined_.empty()) {
      ranks_ = ranks;
      deadline_ = Deadline(connect_limit());
    }
    std::string objection = object(ranks, member);
    if (!objection.empty()) {
      refused_ = std::move(fd);
      answer(HCCL_E_PARA, objection);
      return false;
    }
    joined_[member.rank] = {std::move(fd), member};
    if (joined_.size() < ranks_) return true;
    answer(HCCL_SUCCESS, "");
    return false;
  }

  std::string object(uint32_t ranks, const Member& member) const {
    std::string prefix = "the communicator cannot be formed: " + member.text();
    if (joined_.empty()) return "";
    if (ranks != ranks_)
      return prefix + " says that there are " + std::to_string(ranks) + " ranks, " +
             joined_.begin()->second.member.text() + " says " + std::to_string(ranks_);
    if (auto same = joined_.find(member.rank); same != joined_.end())
      return prefix + " joined, but there is already " + same->second.member.text();
    for (const auto& [rank, other] : joined_)
      if (other.member.node == member.node && other.member.device == member.device)
        return prefix + " uses the same NPU as " + other.member.text() + " of the same node: each rank needs its own";
    return "";
  }

  std::string missing() const {
    std::vector<uint32_t> absent;
    std::string present;
    for (uint32_t rank = 0; rank < ranks_; rank++)
      if (auto found = joined_.find(rank); found == joined_.end())
        absent.push_back(rank);
      else
        present += (present.empty() ? "" : ", ") + found->second.member.text();
    return "of the " + std::to_string(ranks_) + " ranks of the communicator, rank " + listed(absent) +
           " did not join within " + std::to_string(static_cast<int>(connect_limit())) +
           " s (HCCL_CONNECT_TIMEOUT); joined: " + present;
  }

  void answer(HcclResult code, const std::string& text) {
    Writer writer;
    writer.put(static_cast<uint32_t>(code)).put(text);
    if (code == HCCL_SUCCESS)
      for (const auto& [rank, joined] : joined_) put(writer, joined.member);
    Deadline deadline(kGrace);
    auto send_answer = [&](const Fd& fd) {
      try {
        send_frame(fd.get(), writer.bytes(), deadline);
      } catch (const Failure&) {
        // That rank has exited; the others detect it when they connect to it.
      }
    };
    for (const auto& [rank, joined] : joined_) send_answer(joined.fd);
    if (refused_) send_answer(refused_);
  }

  Fd listener_;
  Token token_;
  Deadline deadline_;
  uint32_t ranks_ = 0;
  std::map<uint32_t, Joined> joined_;
  Fd refused_;
};

}  // namespace

std::string RootInfo::bytes() const {
  return Writer().put(kMagic).put(token).put(address.ip).put(address.port).bytes();
}

RootInfo RootInfo::parse(const char* data, size_t size) {
  Reader reader(std::string(data, size));
  RootInfo info;
  if (reader.get<uint32_t>() != kMagic)
    throw Failure(HCCL_E_PARA, "the root info was not made by HcclGetRootInfo of the software NPU");
  info.token = reader.get<Token>();
  info.address.ip = reader.text();
  info.address.port = reader.get<uint16_t>();
  return info;
}

namespace {

double debug_limit() { return seconds_setting("SOFTNPU_CONNECT_TIMEOUT", 0); }

}  // namespace

double connect_limit() {
  if (double limit = debug_limit(); limit > 0) return limit;
  const char* text = getenv("HCCL_CONNECT_TIMEOUT");
  if (!strict("connect-timeout")) return seconds_setting("HCCL_CONNECT_TIMEOUT", 120);
  if (!text || !*text) return 120;
  char* end = nullptr;
  long seconds = strtol(text, &end, 10);
  if (*end == 0 && seconds >= 120 && seconds <= 7200) return static_cast<double>(seconds);
  throw Failure(HCCL_E_PARA, std::string("EI0001: HCCL_CONNECT_TIMEOUT=") + text +
                                 " is no whole number from 120 to 7200, which are CANN's limits");
}

double link_limit() { return debug_limit() > 0 ? debug_limit() : connect_limit() + 20; }

RootInfo open_root() {
  RootInfo info;
  info.token = random_number();
  Fd listener = listen_here(info.address);
  auto root = std::make_shared<Root>(std::move(listener), info.token);
  std::thread([root] { root->serve(); }).detach();
  return info;
}

static Reader ask(const Fd& fd, const std::string& question, const Address& root, const Deadline& deadline) {
  try {
    send_frame(fd.get(), question, deadline);
    return Reader(receive_frame(fd.get(), deadline));
  } catch (const Failure& failure) {
    throw Failure(failure.code, std::string(failure.what()) + ": the root of the communicator at " + root.text());
  }
}

std::vector<Member> join(const RootInfo& root, uint32_t ranks, const Member& self) {
  Deadline deadline(connect_limit() + kGrace);
  Fd fd = connect_to(root.address, deadline, "the root of the communicator");
  Writer writer;
  writer.put(root.token).put(ranks);
  put(writer, self);
  Reader answer = ask(fd, writer.bytes(), root.address, deadline);
  auto code = static_cast<HcclResult>(answer.get<uint32_t>());
  std::string text = answer.text();
  if (code != HCCL_SUCCESS) throw Failure(code, text);
  std::vector<Member> members;
  while (members.size() < ranks) members.push_back(get_member(answer));
  return members;
}

std::vector<Fd> connect_members(const std::vector<Member>& members, uint32_t self, const Fd& listener, Token token,
                                const Deadline& deadline) {
  std::vector<Fd> connections(members.size());
  for (uint32_t rank = 0; rank < self; rank++) {
    connections[rank] = connect_to(members[rank].address, deadline, members[rank].text());
    send_frame(connections[rank].get(), Writer().put(token).put(self).bytes(), deadline);
  }
  size_t expected = members.size() - 1 - self;
  if (expected == 0) return connections;
  bool all = gather(listener.get(), token, deadline, [&](Fd fd, Reader reader) {
    uint32_t rank = reader.get<uint32_t>();
    if (rank <= self || rank >= members.size() || connections[rank]) return true;
    connections[rank] = std::move(fd);
    return --expected > 0;
  });
  if (all) return connections;
  std::string absent;
  for (uint32_t rank = self + 1; rank < members.size(); rank++)
    if (!connections[rank]) absent += (absent.empty() ? "" : ", ") + members[rank].text();
  throw Failure(HCCL_E_TIMEOUT, "no connection from " + absent + " within the time of HCCL_CONNECT_TIMEOUT");
}

}  // namespace softnpu::hccl
