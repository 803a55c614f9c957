// What a CUDA thread does to memory and to other threads.
#include <algorithm>
#include <cstring>

#include "machine.h"

long race_count = 0;
std::vector<std::string> race_reports;

std::string Thread::name() const {
  const std::string last = site ? std::string(site->kind) + " at " + site->file + ":" + std::to_string(site->line) : "its start";
  return "thread " + std::to_string(index) + " of block " + std::to_string(block->x) + "," + std::to_string(block->y) + " (last at " + last + ")";
}

uint64_t Thread::generic_address(uint64_t offset) const { return reinterpret_cast<uint64_t>(block->memory->base(block->rank)) + offset; }
uint64_t Thread::shared_offset(uint64_t address) const { return address - reinterpret_cast<uint64_t>(block->memory->base(block->rank)); }

uint64_t Thread::peer_address(uint64_t address, uint32_t rank) {
  const SharedMemory& memory = *block->memory;
  const uint64_t offset = shared_offset(address);
  if (offset >= memory.size()) fail("mapa of an address outside of shared memory");
  if (rank >= memory.blocks()) fail("mapa of a block that the cluster does not have");
  return reinterpret_cast<uint64_t>(memory.base(rank)) + offset;
}

void Thread::check_alignment(uint64_t address, uint32_t size) {
  if (address % size) fail("an access of " + std::to_string(size) + " bytes is not aligned");
}

// Shared memory of block number `owner`.
char* Thread::access(uint32_t owner, uint64_t offset, uint32_t size, bool stores) {
  constexpr size_t kReports = 20;
  SharedMemory& memory = *block->memory;
  check_alignment(offset, size);
  if (offset + size > memory.size()) fail("an access is beyond the shared memory of its block");
  const Block& other = block[static_cast<int>(owner) - static_cast<int>(block->rank)];
  if (!other.live) fail("an access to the shared memory of a block that has ended");
  if (const char* why = memory.access(clock, owner, static_cast<uint32_t>(offset), size, stores)) {
    ++race_count;
    if (race_reports.size() < kReports) race_reports.push_back(std::string(why) + " at byte " + std::to_string(offset) + " of shared memory in " + block->kernel + ", " + name());
  }
  return memory.base(owner) + offset;
}

char* Thread::generic(uint64_t address, uint32_t size, bool stores) {
  const int owner = block->memory->block_of(address);
  if (owner < 0) return stores ? store_global(address, size) : load_global(address, size);
  return access(static_cast<uint32_t>(owner), address - reinterpret_cast<uint64_t>(block->memory->base(static_cast<uint32_t>(owner))), size, stores);
}

char* Thread::load_shared(uint32_t offset, uint32_t size) { return access(block->rank, offset, size, false); }
char* Thread::store_shared(uint32_t offset, uint32_t size) { return access(block->rank, offset, size, true); }
char* Thread::load_generic(uint64_t address, uint32_t size) { return generic(address, size, false); }
char* Thread::store_generic(uint64_t address, uint32_t size) { return generic(address, size, true); }

char* Thread::load_global(uint64_t address, uint32_t size) {
  check_alignment(address, size);
  return reinterpret_cast<char*>(address);
}

char* Thread::store_global(uint64_t address, uint32_t size) {
  static char lost[16];
  check_alignment(address, size);
  const bool own = address - reinterpret_cast<uint64_t>(stack) < kStackBytes || address - reinterpret_cast<uint64_t>(parameters) < parameter_bytes;
  return loses_writes && !own ? lost : reinterpret_cast<char*>(address);
}

void Thread::copy_async(uint32_t to, uint64_t from, uint32_t size) {
  check_alignment(from, size);
  store_shared(to, size);
  block->memory->begin_copy(block->rank, to, size);
  open_group.push_back({to, size, from});
}

void Thread::commit_group() {
  groups.push_back(std::move(open_group));
  open_group.clear();
}

void Thread::wait_group(uint32_t pending, Site& at) {
  site = &at;
  const size_t left = pending + (at.without ? 1 : 0);
  if (groups.size() <= left) return;
  const auto last = groups.end() - static_cast<std::ptrdiff_t>(left);
  for (auto group = groups.begin(); group != last; ++group)
    for (const Copy& copy : *group) {
      std::memcpy(block->memory->base(block->rank) + copy.to, reinterpret_cast<const char*>(copy.from), copy.size);
      block->memory->end_copy(clock, block->rank, copy.to, copy.size);
    }
  groups.erase(groups.begin(), last);
}

void Thread::wait(const uint32_t& phase, uint32_t arrived_in) {
  gate = &phase, gate_phase = arrived_in;
  while (!ready()) suspend();
  gate = nullptr;
}

void Barrier::arrive() {
  if (++arrived < size) return;
  arrived = 0, ++phase;
}

void Thread::meet(Barrier& barrier) {
  const uint32_t phase = barrier.phase;
  barrier.arrive();
  note_progress();
  wait(barrier.phase, phase);
}

// At an instruction that all threads of a warp must execute together.
void Thread::converge(const Site& at) {
  if (!warp->convergence.arrived) warp->site = &at;
  if (warp->site != &at) fail(std::string("one warp stands at two places at once, and must not: ") + at.file + ":" + std::to_string(at.line) + " and " + warp->site->file + ":" + std::to_string(warp->site->line));
  meet(warp->convergence);
}

void Thread::block_sync(Site& at, bool aligned) {
  site = &at;
  if (at.without) return;
  if (aligned) converge(at);
  meet(block->barrier);
  ++clock.block_phase, clock.stamp = 0;
}

void Thread::warp_sync(uint32_t mask, Site& at) {
  site = &at;
  if (at.without) return;
  if (mask != ~0u) fail("bar.warp.sync with a mask of a part of the warp");
  meet(warp->barrier);
  ++clock.warp_phase, clock.stamp = 0;
}

uint32_t Thread::shuffle(Shuffle mode, uint32_t value, uint32_t lanes, uint32_t clamp, uint32_t mask, Site& at, bool& found) {
  site = &at;
  if (at.without) mask &= 0xffff;
  if (mask != ~0u) fail("shfl.sync with a mask of a part of the warp");
  uint32_t* const exchanged = warp->exchanged[warp->convergence.phase % 2];
  exchanged[lane()] = value;
  converge(at);
  const uint32_t own = lane(), segment = clamp >> 8 & 31, first = own & segment, last = first | (clamp & 31 & ~segment);
  uint32_t source = 0;
  switch (mode) {
    case Shuffle::up: source = own - lanes, found = static_cast<int>(source) >= static_cast<int>(last); break;  // there the clamp is the lowest lane
    case Shuffle::down: source = own + lanes, found = source <= last; break;
    case Shuffle::bfly: source = own ^ lanes, found = source <= last; break;
    case Shuffle::idx: source = first | (lanes & ~segment & 31), found = source <= last; break;
  }
  return exchanged[found ? source : own];
}

void Thread::cluster_arrive(Site& at, bool aligned) {
  site = &at;
  if (at.without) return;
  if (aligned) converge(at);
  if (between_halves) fail("a second arrival at the cluster's barrier without a wait");
  between_halves = true;
  clock.cluster_arrived_in = block->cluster->phase;
  block->cluster->arrive();
  note_progress();
  ++clock.cluster_arrivals, clock.stamp = 0;
}

void Thread::cluster_wait(Site& at, bool aligned) {
  site = &at;
  if (at.without) return;
  if (aligned) converge(at);
  if (!between_halves) fail("a wait at the cluster's barrier without an arrival");
  wait(block->cluster->phase, clock.cluster_arrived_in);
  between_halves = false;
  ++clock.cluster_phase, clock.stamp = 0;
}

void Thread::spin() { suspend(); }
