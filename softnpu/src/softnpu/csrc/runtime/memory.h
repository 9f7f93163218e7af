// Device memory is anonymous shared host memory (memfd): another process can map it, as CANN's IPC does.
#pragma once

#include <map>
#include <memory>
#include <mutex>

#include "runtime/core.h"

namespace softnpu {

// A memfd of a device's memory, charged to that device as long as it exists.
struct Segment {
  Segment(int fd, size_t size, int physical) : fd(fd), size(size), physical(physical) {}
  ~Segment();
  static std::shared_ptr<Segment> make(size_t size, int visible, aclError* code);
  static std::shared_ptr<Segment> adopt(int fd);  // another process's, and charged to it

  const int fd;
  const size_t size;
  const int physical;  // -1: charged elsewhere
};

// A range of addresses that shows a segment.
struct Block {
  size_t size;
  int visible;
  std::shared_ptr<Segment> segment;
};

class Blocks {
 public:
  void add(void* address, Block block);
  bool take(void* address, Block* out);                           // exact start
  std::vector<std::pair<void*, Block>> take_all(int visible);
  bool find(const void* inside, void** start, Block* out);        // any address inside
 private:
  std::mutex mutex_;
  std::map<void*, Block> blocks_;
};

// Host memory that is locked to its place (aclrtMallocHost, aclrtHostRegister); all other host memory is pageable.
class HostRanges {
 public:
  void add(void* address, size_t size);
  void remove(void* address);
  bool contains(const void* inside);
 private:
  std::mutex mutex_;
  std::map<void*, size_t> ranges_;
};

Blocks& blocks();
HostRanges& host_ranges();
void free_physical(int visible);  // what aclrtMallocPhysical gave out
size_t whole_pages(size_t bytes);

// Queued work may still use memory that is being freed: as on a device, freeing waits for it. Returns false if a stream
// of the device did not finish in time.
bool drained(int visible);

}  // namespace softnpu
