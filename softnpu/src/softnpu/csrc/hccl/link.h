// The link between two ranks of a communicator. There is always a connection; when it closes, the peer is gone. Bytes of
// messages go through rings in shared memory where the two share a node, and else through rings of this process that
// the poller empties into the connection and fills from it: senders and receivers use rings only.
#pragma once

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>

#include "hccl/throttle.h"
#include "hccl/segment.h"

namespace softnpu::hccl {

// What travels on the connection: this, and `bytes` more.
struct Frame {
  enum Type : uint32_t {
    kData,     // of the ring
    kCredit,   // uint64: how many bytes of data the sender of this has consumed so far
    kGoodbye,  // the sender destroys its communicator
    kFailed,   // HcclResult and text: an operation of the sender failed
    kMessage,  // data for take_message()
    kExpect,   // uint64: how many messages the sender of this has asked for so far
  };
  uint32_t type;
  uint32_t bytes;
};

// Why a link is broken.
struct LinkFailure {
  HcclResult code;
  std::string text;
  bool reported;  // by the peer, which reports it to every other member too
};

class Link : public std::enable_shared_from_this<Link> {
 public:
  // `own` is this rank's segment; `theirs` the peer's if the two can share memory, else null.
  Link(Fd socket, std::string peer, uint32_t self_rank, uint32_t peer_rank, std::shared_ptr<Segment> own,
       std::shared_ptr<Segment> theirs);
  // Of a rank to itself.
  explicit Link(std::shared_ptr<Segment> own);

  // ---- for the thread that runs an operation
  size_t send(const char* data, size_t bytes);
  void announce();  // after one or more send()
  size_t receive(char* data, size_t bytes);
  void expect_message();         // the next one to receive
  bool message_expected() const;  // by the peer: the next one to send
  bool flushed() const { return shared() || out_->filled() == 0; }  // true if no sent data is still in this process
  uint64_t sent_messages = 0, received_messages = 0;

  // ---- for any thread
  const std::string& peer() const { return peer_; }
  bool shared() const { return theirs_ != nullptr; }
  bool broken() const { return broken_; }
  LinkFailure failure() const;
  void post(Frame::Type type, const std::string& payload);
  // The next message from the peer that starts with `topic`, without it. Throws when the link breaks or at the deadline.
  std::string take_message(const std::string& topic, const Deadline& deadline);
  // Waits for a message as take_message does, but also where the peer is gone; false at the deadline or after abandon().
  bool await_message(const std::string& topic, const Deadline& deadline);
  void abandon();

  // ---- for the poller
  int socket() const { return socket_.get(); }
  void read_input();
  void write_output();
  bool blocked() const { return blocked_; }  // the socket accepts no more for now
  std::optional<Clock::time_point> due() const { return throttle_.due(); }
  void close();
  std::atomic<bool> scheduled{false};

 private:
  bool read_frame();
  std::optional<std::string> find_message(const std::string& topic);
  void handle(Frame::Type type, std::string payload);
  void break_with(LinkFailure failure);
  void lose(const char* reason);
  bool start_frame();
  size_t releasable();
  size_t write_some(const char* data, size_t bytes, bool more);

  Fd socket_;
  const std::string peer_;
  std::shared_ptr<Segment> own_, theirs_;
  std::unique_ptr<Ring> inbox_, outbox_;  // only where memory is not shared
  Ring *in_, *out_;

  std::atomic<bool> broken_{false};
  mutable std::mutex mutex_;  // guards the four below
  std::condition_variable changed_;
  std::optional<LinkFailure> failure_;
  std::deque<std::string> messages_, posts_;
  bool abandoned_ = false;

  // The poller's own: what is being read, and written.
  Frame frame_{};
  size_t frame_read_ = 0, payload_read_ = 0;
  std::string payload_;
  std::string writing_;  // a frame, or the head of a data frame
  size_t written_ = 0, data_left_ = 0;
  bool blocked_ = false;
  uint64_t acknowledged_ = 0;
  std::atomic<uint64_t> credited_{0};
  LinkThrottle throttle_;
};

}  // namespace softnpu::hccl
