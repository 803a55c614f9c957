// Which kernels resolve one problem, from sizes and limits alone: a pure function, so that it is tested where there is no GPU.
#pragma once

#include "../gramian.h"

namespace mmfast {

// What a device has.
struct Limits {
  int64_t processors;        // streaming multiprocessors
  int64_t shared_block;      // bytes of shared memory that a block may ask for
  int64_t shared_processor;  // bytes that a processor has for all of its blocks
  bool cooperative;          // blocks may wait for each other
};

enum class Path { two_pass, persistent };

struct Plan {
  Path path;
  int64_t blocks;      // of the persistent kernel: all run at once
  int64_t kept_steps;  // of kPersistentThreads elements of every row that a block keeps in shared memory
  int64_t shared;      // bytes that it asks for
  int64_t read, written;
  int64_t launches;
};

constexpr int kPersistentThreads = 128, kPersistentRows = 8;
constexpr int kStepsAtOnce = 4;                 // that are combined, so what is kept are multiples of it
constexpr int64_t kPersistentPerProcessor = 4;  // blocks: its registers allow no more
constexpr int64_t kReserved = 1024;             // bytes of each block that the system keeps for itself

// k rows of n elements of `size` bytes; a persistent block needs `fixed` bytes beside what it keeps.
inline Plan plan_resolve(int64_t k, int64_t n, int64_t size, int64_t fixed, bool one_problem, const Limits& limits) {
  const int64_t bytes = k * n * size;
  const Plan two_pass{Path::two_pass, 0, 0, 0, 2 * bytes, n * size, k > kPersistentRows ? 5 : 4};
  const int64_t most_rows = size == 8 ? kPersistentRows / 2 : kPersistentRows;  // whose pairs have room in registers
  if (!one_problem || !limits.cooperative || k < 1 || k > most_rows || n < 1) return two_pass;
  const int64_t chunks = (n + kChunk - 1) / kChunk, group = group_size(chunks), slots = (chunks + group - 1) / group;
  // as few blocks to a processor as hold a slot each: the larger share of its shared memory has each of them
  int64_t per_processor = 1;
  while (per_processor < kPersistentPerProcessor && per_processor * limits.processors < slots) ++per_processor;
  const int64_t room = per_processor * limits.processors, blocks = slots < room ? slots : room;
  const int64_t share = limits.shared_processor / per_processor - kReserved;
  const int64_t most = share < limits.shared_block ? share : limits.shared_block;
  if (most < fixed) return two_pass;
  const int64_t step = k * kPersistentThreads * size, chunk_steps = kChunk / kPersistentThreads;
  const int64_t slots_each = (slots + blocks - 1) / blocks, steps = slots_each * group * chunk_steps;
  const int64_t fit = (most - fixed) / step / kStepsAtOnce * kStepsAtOnce, kept = fit < steps ? fit : steps;
  // blocks with a slot less keep no more than they have
  const int64_t longer = slots - (slots_each - 1) * blocks, shorter_steps = (slots_each - 1) * group * chunk_steps;
  const int64_t kept_all = longer * kept + (blocks - longer) * (kept < shorter_steps ? kept : shorter_steps);
  const int64_t kept_bytes = kept_all * step < bytes ? kept_all * step : bytes;
  if (4 * kept_bytes < bytes) return two_pass;  // little is saved, and more blocks read faster
  return {Path::persistent, blocks, kept, fixed + kept * step, 2 * bytes - kept_bytes, n * size, 1};
}

}  // namespace mmfast
