#include "hccl/link.h"

#include <sys/socket.h>

#include <cerrno>
#include <tuple>

#include "hccl/poller.h"

namespace softnpu::hccl {
namespace {

constexpr size_t kDataFrame = 64 << 10;
constexpr size_t kMaxControl = 1 << 20;
// A sender may have Ring::kBytes in flight; it gets credit each time that this much was consumed.
constexpr size_t kCreditStep = Ring::kBytes / 4;

// As in HCCL, a sender writes only after the receiver's stream has come to the operation.
bool waits_for_receiver() {
  static const bool enforced = strict("receiver-first");
  return enforced;
}

}  // namespace

Link::Link(Fd socket, std::string peer, uint32_t self_rank, uint32_t peer_rank, std::shared_ptr<Segment> own,
           std::shared_ptr<Segment> theirs)
    : socket_(std::move(socket)), peer_(std::move(peer)), own_(std::move(own)), theirs_(std::move(theirs)) {
  if (!shared()) {
    inbox_.reset(new Ring);
    outbox_.reset(new Ring);
  }
  in_ = shared() ? &own_->from(peer_rank) : inbox_.get();
  out_ = shared() ? &theirs_->from(self_rank) : outbox_.get();
}

Link::Link(std::shared_ptr<Segment> own) : peer_("itself"), own_(own), theirs_(own), inbox_(new Ring) {
  in_ = out_ = inbox_.get();
}

// ---- operations

size_t Link::send(const char* data, size_t bytes) { return out_->put(data, bytes); }

void Link::announce() {
  if (shared())
    theirs_->doorbell().ring();
  else
    Poller::instance().schedule(shared_from_this());
}

// A writer waits for space only if it saw the ring full, so only then is there one to wake.
size_t Link::receive(char* data, size_t bytes) {
  uint64_t before = in_->consumed();
  size_t moved = in_->get(data, bytes);
  if (moved == 0) return 0;
  if (shared() ? in_->produced() - before >= Ring::kBytes : in_->consumed() - credited_ >= kCreditStep) announce();
  return moved;
}

void Link::expect_message() {
  if (in_->expected() > received_messages) return;  // said also without the rule: the peer may have it
  uint64_t messages = received_messages + 1;
  in_->expect(messages);
  if (shared())
    theirs_->doorbell().ring();
  else
    post(Frame::kExpect, Writer().put(messages).bytes());
}

bool Link::message_expected() const { return !waits_for_receiver() || out_->expected() > sent_messages; }

// ---- state

LinkFailure Link::failure() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return *failure_;
}

void Link::break_with(LinkFailure failure) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (failure_) return;
    failure_ = std::move(failure);
    broken_ = true;
  }
  changed_.notify_all();
  own_->doorbell().ring();
}

void Link::lose(const char* reason) {
  socket_.close();
  break_with({HCCL_E_REMOTE,
              peer_ + " is gone: its process has ended, or the connection to it is lost (" + reason + ")", false});
}

void Link::post(Frame::Type type, const std::string& payload) {
  if (broken_) return;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    posts_.push_back(Writer().put(Frame{type, static_cast<uint32_t>(payload.size())}).bytes() + payload);
  }
  Poller::instance().schedule(shared_from_this());
}

std::string Link::take_message(const std::string& topic, const Deadline& deadline) {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    if (auto rest = find_message(topic)) return *rest;
    if (failure_) throw Failure(failure_->code, failure_->text);
    auto left = std::chrono::milliseconds(deadline.milliseconds_left());
    if (left.count() == 0)
      throw Failure(HCCL_E_TIMEOUT, "" + peer_ + " did not answer within the time of HCCL_CONNECT_TIMEOUT");
    changed_.wait_for(lock, left);
  }
}

bool Link::await_message(const std::string& topic, const Deadline& deadline) {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!find_message(topic)) {
    auto left = std::chrono::milliseconds(deadline.milliseconds_left());
    if (abandoned_ || left.count() == 0) return false;
    changed_.wait_for(lock, left);
  }
  return true;
}

void Link::abandon() {
  std::lock_guard<std::mutex> lock(mutex_);
  abandoned_ = true;
  changed_.notify_all();
}

// What follows the topic in the first message that begins with it. With the mutex held.
std::optional<std::string> Link::find_message(const std::string& topic) {
  for (auto it = messages_.begin(); it != messages_.end(); ++it) {
    if (it->rfind(topic, 0) != 0) continue;
    std::string rest = it->substr(topic.size());
    messages_.erase(it);
    return rest;
  }
  return std::nullopt;
}

// ---- input

void Link::read_input() {
  try {
    while (socket_ && read_frame()) {
    }
  } catch (const Failure& failure) {
    lose(failure.what());
  }
}

// One step: a head, or a part of what follows it. False when there is nothing to read for now.
bool Link::read_frame() {
  char* to = reinterpret_cast<char*>(&frame_) + frame_read_;
  size_t size = sizeof frame_ - frame_read_;
  bool head = size > 0, data = !head && frame_.type == Frame::kData;
  if (data) {
    std::tie(to, size) = in_->writable(frame_.bytes - payload_read_);
    if (size == 0) throw Failure(HCCL_E_INTERNAL, "it sent more than it had credit for");
  }
  if (!head && !data) {
    to = payload_.data() + payload_read_;
    size = payload_.size() - payload_read_;
  }
  if (size > 0) {
    ssize_t got = recv(socket_.get(), to, size, 0);
    if (got < 0 && errno == EINTR) return true;
    if (got < 0 && errno == EAGAIN) return false;
    if (got <= 0) return lose(got == 0 ? "closed" : strerror(errno)), false;
    size = static_cast<size_t>(got);
  }
  if (head) {
    frame_read_ += size;
    if (frame_read_ < sizeof frame_) return true;
    payload_read_ = 0;
    if (frame_.bytes > kMaxControl) throw Failure(HCCL_E_INTERNAL, "it sent an invalid frame");
    payload_.resize(frame_.type == Frame::kData ? 0 : frame_.bytes);
    if (frame_.bytes > 0) return true;
  } else {
    payload_read_ += size;
    if (data) {
      in_->commit_write(size);
      own_->doorbell().ring();
    }
    if (payload_read_ < frame_.bytes) return true;
  }
  frame_read_ = 0;
  if (!data) handle(static_cast<Frame::Type>(frame_.type), std::move(payload_));
  return true;
}

void Link::handle(Frame::Type type, std::string payload) {
  if (type == Frame::kCredit) {
    acknowledged_ = Reader(payload).get<uint64_t>();
    write_output();
  } else if (type == Frame::kGoodbye) {
    break_with({HCCL_E_REMOTE, peer_ + " has destroyed its communicator", false});
  } else if (type == Frame::kFailed) {
    Reader reader(std::move(payload));
    auto code = static_cast<HcclResult>(reader.get<uint32_t>());
    break_with({code, peer_ + " reports: " + reader.text(), true});
  } else if (type == Frame::kExpect) {
    out_->expect(Reader(payload).get<uint64_t>());
    own_->doorbell().ring();
  } else if (type == Frame::kMessage) {
    std::lock_guard<std::mutex> lock(mutex_);
    messages_.push_back(std::move(payload));
    changed_.notify_all();
  }
}

// ---- output

void Link::write_output() {
  blocked_ = false;
  uint64_t before = out_->consumed();
  while (socket_ && !blocked_) {
    if (written_ < writing_.size()) {
      written_ += write_some(writing_.data() + written_, writing_.size() - written_, data_left_ > 0);
    } else if (data_left_ > 0) {
      auto [from, size] = out_->readable(data_left_);
      size_t sent = write_some(from, size, false);
      out_->commit_read(sent);
      data_left_ -= sent;
    } else if (!start_frame()) {
      break;
    }
  }
  if (!shared() && out_->consumed() != before) own_->doorbell().ring();
}

size_t Link::write_some(const char* data, size_t bytes, bool more) {
  ssize_t sent = ::send(socket_.get(), data, bytes, MSG_NOSIGNAL | (more ? MSG_MORE : 0));
  if (sent >= 0) return static_cast<size_t>(sent);
  if (errno == EAGAIN)
    blocked_ = true;
  else if (errno != EINTR)
    lose(strerror(errno));
  return 0;
}

// Control frames take precedence over data frames.
bool Link::start_frame() {
  written_ = 0;
  writing_.clear();
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!posts_.empty()) {
      writing_ = std::move(posts_.front());
      posts_.pop_front();
      return true;
    }
  }
  if (shared()) return false;
  if (uint64_t consumed = in_->consumed(); consumed - credited_ >= kCreditStep) {
    credited_ = consumed;
    writing_ = Writer().put(Frame{Frame::kCredit, sizeof consumed}).put(consumed).bytes();
    return true;
  }
  data_left_ = releasable();
  if (data_left_ > 0) writing_ = Writer().put(Frame{Frame::kData, static_cast<uint32_t>(data_left_)}).bytes();
  return data_left_ > 0;
}

size_t Link::releasable() {
  uint64_t consumed = out_->consumed();
  uint64_t ready = throttle_.released(out_->produced()) - consumed;
  uint64_t window = Ring::kBytes - (consumed - acknowledged_);
  return std::min<uint64_t>({ready, window, kDataFrame});
}

void Link::close() {
  write_output();
  socket_.close();
}

}  // namespace softnpu::hccl
