// Which kernels resolve a problem, or one for each sample, from sizes and limits alone: pure functions, tested where there is no GPU.
#pragma once

#include "../gramian.h"

namespace mmfast {

// What a device has.
struct Limits {
  int64_t processors;        // streaming multiprocessors
  int64_t shared_block;      // bytes of shared memory that a block may ask for
  int64_t shared_processor;  // bytes that a processor has for all of its blocks
  bool cooperative;          // blocks may wait for each other
  int64_t cluster;           // blocks of the largest cluster, whose blocks see each other's shared memory; 0 where there are none
  bool overlap;              // a kernel may begin while the one before it ends
  bool persistent = true;    // one launch of blocks that wait for each other may serve a problem
  bool per_sample = true;    // blocks may take a sample each
  // about time alone, for all paths have the same bits
  int64_t cluster_bytes = 1 << 20;  // beyond it a few processors read longer than all of them wait for each other
  double share_kept = 0.25;         // of the bytes, at least: with less little is saved, and more blocks read faster
};

enum class Path { two_pass, persistent, per_sample, cluster };
constexpr const char* kPathNames[] = {"two_pass", "persistent", "per_sample", "cluster"};
constexpr int kPaths = 4;

struct Plan {
  Path path;
  int64_t blocks;        // of the kernel that stages what it reads; all run at once, but for those of samples
  int64_t staged_steps;  // of kPersistentThreads elements of every row that a block stages in shared memory
  int64_t shared;        // bytes that it asks for
  int64_t workspace;     // doubles of slots for all blocks, in memory
  int64_t read, written;
  int64_t launches;
};

constexpr int kPersistentThreads = 128, kPersistentRows = 8;
constexpr int kCombineUnroll = 4;                     // steps that are combined at once, so what is staged are multiples of it
constexpr int64_t kPersistentBlocksPerProcessor = 4;  // its registers allow no more
constexpr int64_t kReservedShared = 1024;             // bytes of each block that the system keeps for itself

// Bytes that each of so many blocks to a processor may ask for, in whole units of 128.
inline int64_t shared_per_block(int64_t per_processor, const Limits& limits) {
  const int64_t bytes = limits.shared_processor / per_processor - kReservedShared;
  return (bytes < limits.shared_block ? bytes : limits.shared_block) / 128 * 128;
}

// The general kernels, for k rows of n elements of `size` bytes in all.
inline Plan two_pass_plan(int64_t k, int64_t n, int64_t size) { return {Path::two_pass, 0, 0, 0, 0, 2 * k * n * size, n * size, k > kPersistentRows ? 5 : 4}; }

// Whether the pairs of k rows have room in registers.
inline bool pairs_fit_registers(int64_t k, int64_t size) { return k >= 1 && k <= (size == 8 ? kPersistentRows / 2 : kPersistentRows); }

inline bool keeps_too_little(int64_t staged_bytes, int64_t bytes, const Limits& limits) {
  return static_cast<double>(staged_bytes) < limits.share_kept * static_cast<double>(bytes);
}

inline int64_t slot_count(int64_t chunks) { return (chunks + group_size(chunks) - 1) / group_size(chunks); }

// Steps of `step` bytes that fit into `bytes`, of `steps`.
inline int64_t steps_that_fit(int64_t bytes, int64_t step, int64_t steps) {
  const int64_t fit = bytes / step / kCombineUnroll * kCombineUnroll;
  return fit < steps ? fit : steps;
}

// One cluster, whose blocks hold their slots too: a smaller launch and a shorter wait than those of all processors.
inline Plan plan_cluster(int64_t k, int64_t n, int64_t size, int64_t fixed, const Limits& limits) {
  const int64_t bytes = k * n * size, slots = slot_count((n + kChunk - 1) / kChunk), group = group_size((n + kChunk - 1) / kChunk);
  if (limits.cluster < 1 || bytes > limits.cluster_bytes) return two_pass_plan(k, n, size);
  int64_t blocks = 1;
  while (blocks < slots && 2 * blocks <= limits.cluster) blocks *= 2;
  const int64_t slots_each = (slots + blocks - 1) / blocks, staged = slots_each * group * (kChunk / kPersistentThreads);
  const int64_t shared = fixed + staged * k * kPersistentThreads * size + slots_each * pair_count(k) * 8;
  if (shared > shared_per_block(1, limits)) return two_pass_plan(k, n, size);
  return {Path::cluster, blocks, staged, shared, 0, bytes, n * size, 1};
}

// k rows of n elements of `size` bytes; a persistent block needs `fixed` bytes beside what it stages.
inline Plan plan_resolve(int64_t k, int64_t n, int64_t size, int64_t fixed, bool one_problem, const Limits& limits) {
  const int64_t bytes = k * n * size;
  const Plan two_pass = two_pass_plan(k, n, size);
  if (!one_problem || !pairs_fit_registers(k, size) || n < 1) return two_pass;
  if (const Plan cluster = plan_cluster(k, n, size, fixed, limits); cluster.path == Path::cluster) return cluster;
  if (!limits.cooperative || !limits.persistent) return two_pass;
  const int64_t chunks = (n + kChunk - 1) / kChunk, group = group_size(chunks), slots = slot_count(chunks);
  // as few blocks to a processor as give every slot a block: each of them has more of its shared memory
  int64_t per_processor = 1;
  while (per_processor < kPersistentBlocksPerProcessor && per_processor * limits.processors < slots) ++per_processor;
  const int64_t resident = per_processor * limits.processors, blocks = slots < resident ? slots : resident;
  const int64_t shared = shared_per_block(per_processor, limits);
  if (shared < fixed) return two_pass;
  const int64_t step = k * kPersistentThreads * size, chunk_steps = kChunk / kPersistentThreads;
  const int64_t slots_each = (slots + blocks - 1) / blocks, steps = slots_each * group * chunk_steps;
  const int64_t staged = steps_that_fit(shared - fixed, step, steps);
  // blocks with a slot less stage no more than they have
  const int64_t full_blocks = slots - (slots_each - 1) * blocks, fewer_steps = (slots_each - 1) * group * chunk_steps;
  const int64_t staged_all = full_blocks * staged + (blocks - full_blocks) * (staged < fewer_steps ? staged : fewer_steps);
  const int64_t staged_bytes = staged_all * step < bytes ? staged_all * step : bytes;
  if (keeps_too_little(staged_bytes, bytes, limits)) return two_pass;
  return {Path::persistent, blocks, staged, fixed + staged * step, slots * pair_count(k), 2 * bytes - staged_bytes, n * size, 1};
}

// A block for each of `batch` samples of `inner` elements; no block waits for another. Small samples would leave most of its threads idle.
inline Plan plan_samples(int64_t k, int64_t batch, int64_t inner, int64_t size, int64_t fixed, const Limits& limits) {
  const int64_t bytes = k * batch * inner * size;
  const Plan two_pass = two_pass_plan(k, batch * inner, size);
  if (!limits.per_sample || !pairs_fit_registers(k, size) || batch < 1 || 2 * inner < kChunk) return two_pass;
  const int64_t chunks = (inner + kChunk - 1) / kChunk;
  const int64_t step = k * kPersistentThreads * size, steps = chunks * (kChunk / kPersistentThreads);
  // as many blocks to a processor as stage a sample whole
  int64_t per_processor = kPersistentBlocksPerProcessor;
  while (per_processor > 1 && shared_per_block(per_processor, limits) < fixed + steps * step) --per_processor;
  const int64_t shared = shared_per_block(per_processor, limits), resident = per_processor * limits.processors;
  // few blocks solve few problems at once
  if (shared < fixed || (per_processor < kPersistentBlocksPerProcessor && batch > resident)) return two_pass;
  const int64_t staged = steps_that_fit(shared - fixed, step, steps);
  const int64_t sample_bytes = k * inner * size, staged_bytes = batch * (staged * step < sample_bytes ? staged * step : sample_bytes);
  if (keeps_too_little(staged_bytes, bytes, limits)) return two_pass;
  const int64_t blocks = batch < resident ? batch : resident;
  return {Path::per_sample, blocks, staged, fixed + staged * step, blocks * slot_count(chunks) * pair_count(k), 2 * bytes - staged_bytes, batch * inner * size, 1};
}

// Warps that solve `batch` problems at once, each in `scratch` doubles of its own; 64 MB for all is room for one to a processor up to K = 64.
inline int64_t solver_warps(int64_t batch, int64_t scratch) {
  constexpr int64_t kMaxWarps = 1024, kMaxScratchDoubles = (int64_t{64} << 20) / 8;
  const int64_t fitting = kMaxScratchDoubles / scratch, max_warps = fitting < 1 ? 1 : fitting < kMaxWarps ? fitting : kMaxWarps;
  return batch < max_warps ? batch : max_warps;
}

}  // namespace mmfast
