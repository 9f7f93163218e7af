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
  static std::shared_ptr<Segment> adopt(int fd);  // another process's: charged there

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
  bool find(const void* inside, void** start, Block* out);        // any address inside
 private:
  std::mutex mutex_;
  std::map<void*, Block> blocks_;
};

Blocks& blocks();
size_t whole_pages(size_t bytes);

// Work that is queued may still use memory that is given back: as on a device, that waits for it. False: some stream of the
// device did not finish in time.
bool drained(int visible);

}  // namespace softnpu
