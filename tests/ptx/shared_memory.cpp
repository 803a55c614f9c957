#include "shared_memory.h"

#include <algorithm>
#include <cstring>

void SharedMemory::start(uint32_t blocks, uint32_t size) {
  constexpr size_t kAlign = 1024;
  blocks_ = blocks, size_ = size, stride_ = (size + 127) / 128 * 128;
  const size_t all = static_cast<size_t>(blocks) * stride_;
  if (bytes_.size() < all + kAlign) bytes_.resize(all + kAlign);
  memory_ = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(bytes_.data()) + kAlign - 1) / kAlign * kAlign);
  std::memset(memory_, 0xff, all);
  cells_.assign(all, Cell{0, 0});
  stamps_.assign(1, Clock{});
}

int SharedMemory::block_of(uint64_t address) const {
  const uint64_t offset = address - reinterpret_cast<uint64_t>(memory_);
  return size_ && offset < static_cast<uint64_t>(blocks_) * stride_ ? static_cast<int>(offset / stride_) : -1;
}

uint32_t SharedMemory::stamp_of(Clock& clock) {
  if (!clock.stamp) {
    clock.stamp = 4 * static_cast<uint32_t>(stamps_.size());
    stamps_.push_back(clock);
  }
  return clock.stamp;
}

// Whether a barrier, or the order of one thread's own instructions, puts what the stamp stands for before what the thread does now.
bool SharedMemory::before(uint32_t stamp, const Clock& now) const {
  const Clock& then = stamps_[stamp / 4];
  const uint32_t scope = stamp % 4;
  if (now.cluster_phase > then.cluster_arrivals) return true;
  if (scope == one_cluster || then.block != now.block) return false;
  if (now.block_phase > then.block_phase) return true;
  if (scope == one_block || then.warp != now.warp) return false;
  if (now.warp_phase > then.warp_phase) return true;
  return scope == one_thread && then.thread == now.thread;
}

// One more reader beside those that no barrier puts before it: the smallest group that holds all of them.
uint32_t SharedMemory::joined(uint32_t readers, const Clock& now, uint32_t stamp) const {
  if (!readers || before(readers, now)) return stamp;
  const Clock& then = stamps_[readers / 4];
  const uint32_t scope = then.block != now.block ? one_cluster : then.warp != now.warp ? one_block : one_warp;
  return readers / 4 * 4 + std::max(readers % 4, scope);
}

const char* SharedMemory::access(Clock& clock, uint32_t block, uint32_t offset, uint32_t size, bool stores) {
  const uint32_t own = stamp_of(clock);
  const char* wrong = nullptr;
  Cell* cell = &cells_[static_cast<size_t>(block) * stride_ + offset];
  for (Cell* end = cell + size; cell < end; ++cell) {
    if (cell->writer == kOnItsWay) wrong = stores ? "write over a copy that is on its way" : "read of a copy that is on its way";
    else if (cell->writer && cell->writer != own && !before(cell->writer, clock)) wrong = stores ? "write after write" : "read after write";
    else if (!cell->writer && !stores) wrong = "read of what nobody wrote";
    if (stores) {
      if (cell->reader && cell->reader != own && !before(cell->reader, clock)) wrong = "write after read";
      *cell = {own, 0};
    } else if (cell->reader != own) {
      cell->reader = joined(cell->reader, clock, own);
    }
  }
  return wrong;
}

void SharedMemory::mark(uint32_t block, uint32_t offset, uint32_t size, uint32_t writer) {
  Cell* cell = &cells_[static_cast<size_t>(block) * stride_ + offset];
  std::fill(cell, cell + size, Cell{writer, 0});
}
