// The shared memory of blocks that run together, byte by byte with who wrote and who read it last: two accesses, one of them a write, between which
// no barrier stands are a race, in whatever order they happened to run.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

// How far a thread has come: the barriers that it has left behind, and the arrivals at its cluster's.
struct Clock {
  uint32_t block, warp, thread;  // who
  uint32_t block_phase, warp_phase, cluster_arrivals, cluster_phase;
  uint32_t cluster_arrived_in;  // the phase of the cluster's barrier
  uint32_t stamp;               // its number in the list of stamps, 0 before the first access after a barrier
};

class SharedMemory {
 public:
  // `size` bytes for each of `blocks` blocks; what nobody has written is all ones, which is NaN.
  void start(uint32_t blocks, uint32_t size);
  char* base(uint32_t block) const { return memory_ + static_cast<size_t>(block) * stride_; }
  uint32_t blocks() const { return blocks_; }
  uint32_t size() const { return size_; }
  // The block whose memory holds the address, or -1.
  int block_of(uint64_t address) const;
  // One access to the memory of `block`: null, or what is wrong with it.
  const char* access(Clock& clock, uint32_t block, uint32_t offset, uint32_t size, bool stores);
  // Bytes that a copy is on its way to: to be touched by nobody until it has arrived, which is a write of its thread.
  void begin_copy(uint32_t block, uint32_t offset, uint32_t size) { mark(block, offset, size, kOnItsWay); }
  void end_copy(Clock& clock, uint32_t block, uint32_t offset, uint32_t size) { mark(block, offset, size, stamp_of(clock)); }

 private:
  // Which threads a stamp stands for: the one that made it, or several of its warp, of its block, of its cluster, that read at once.
  enum Scope : uint32_t { one_thread, one_warp, one_block, one_cluster };
  struct Cell {
    uint32_t writer, reader;  // 4 * number of the stamp + scope; 0: nobody
  };
  static constexpr uint32_t kOnItsWay = ~0u;

  void mark(uint32_t block, uint32_t offset, uint32_t size, uint32_t writer);
  uint32_t stamp_of(Clock& clock);
  bool before(uint32_t stamp, const Clock& clock) const;
  uint32_t joined(uint32_t readers, const Clock& clock, uint32_t stamp) const;

  std::vector<char> bytes_;
  char* memory_ = nullptr;
  uint32_t blocks_ = 0, size_ = 0, stride_ = 0;
  std::vector<Cell> cells_;
  std::vector<Clock> stamps_;
};
