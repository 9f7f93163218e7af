#include "hccl/segment.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <cerrno>
#include <new>

namespace softnpu::hccl {
namespace {

constexpr size_t kHeadBytes = 4096;

size_t size_for(uint32_t ranks) { return kHeadBytes + ranks * sizeof(Ring); }

}  // namespace

Segment::Segment(Fd fd, void* memory, size_t bytes)
    : fd_(std::move(fd)),
      bytes_(bytes),
      head_(static_cast<Head*>(memory)),
      rings_(reinterpret_cast<Ring*>(static_cast<char*>(memory) + kHeadBytes)) {}

Segment::~Segment() { munmap(head_, bytes_); }

// Pages of the file are zero until touched, which is a valid empty ring and doorbell: unused rings cost nothing.
std::shared_ptr<Segment> Segment::create(uint32_t ranks) {
  static_assert(sizeof(Head) <= kHeadBytes);
  size_t bytes = size_for(ranks);
  Fd fd(memfd_create("softnpu-hccl", MFD_CLOEXEC));
  void* memory = MAP_FAILED;
  if (fd && ftruncate(fd.get(), static_cast<off_t>(bytes)) == 0)
    memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
  if (memory == MAP_FAILED)
    throw Failure(HCCL_E_MEMORY,
                  "no " + std::to_string(bytes) + " bytes of shared memory for a communicator: " + strerror(errno));
  std::shared_ptr<Segment> segment(new Segment(std::move(fd), memory, bytes));
  segment->head_->nonce = random_number();
  return segment;
}

std::shared_ptr<Segment> Segment::open(int pid, int fd_there, uint64_t nonce, uint32_t ranks) {
  size_t bytes = size_for(ranks);
  std::string path = "/proc/" + std::to_string(pid) + "/fd/" + std::to_string(fd_there);
  Fd fd(::open(path.c_str(), O_RDWR | O_CLOEXEC | O_NONBLOCK));
  struct stat status{};
  if (!fd || fstat(fd.get(), &status) != 0 || static_cast<size_t>(status.st_size) != bytes) return nullptr;
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
  if (memory == MAP_FAILED) return nullptr;
  std::shared_ptr<Segment> segment(new Segment(Fd(), memory, bytes));
  return segment->nonce() == nonce ? segment : nullptr;
}

}  // namespace softnpu::hccl
