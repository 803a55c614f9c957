// A machine that runs translated kernels: a fiber for each CUDA thread, warps, blocks with shared memory, clusters.
// Thread is what translated code calls, run() what the stand-in for the CUDA runtime calls.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "shared_memory.h"

// An instruction by which threads wait for each other or exchange something. `without` takes it out, or weakens it, so that a test can see whether
// anything notices: no wait at a barrier, one group of copies less to wait for, half of the lanes in a shuffle's mask.
struct Site {
  const char* kind;
  const char* function;
  const char* file;
  int line;
  bool without;
};

constexpr uint64_t kStackBytes = 512 << 10;

enum class Shuffle { up, down, bfly, idx };

// Threads that meet: none goes on before all have arrived.
struct Barrier {
  uint32_t size = 0, arrived = 0, phase = 0;
  void arrive();
};

struct Thread;

struct Warp {
  Thread* threads;
  uint32_t size, live;
  Barrier barrier, convergence;
  const Site* site;           // that the first of those stands at that are to converge
  uint32_t exchanged[2][32];  // by one shuffle and the next: a slow lane may still read the last one's
};

struct Block {
  const char* kernel;
  uint32_t x, y, rank;  // rank among the blocks that run together
  uint32_t live, static_shared;
  bool cooperative;
  Barrier barrier, *cluster;
  SharedMemory* memory;
};

struct Thread {
  // Special registers
  uint32_t tid(int axis) const { return axis ? 0 : index; }
  uint32_t ntid(int axis) const { return axis ? 1 : block_size; }
  uint32_t ctaid(int axis) const { return axis == 0 ? block->x : axis == 1 ? block->y : 0; }
  uint32_t nctaid(int axis) const { return axis < 2 ? grid[axis] : 1; }
  uint32_t lane() const { return index % 32; }
  uint32_t environment(int number) const;  // halves of the address of cooperative_groups' grid barrier

  // Shared memory's addresses
  uint32_t dynamic_shared() const { return (block->static_shared + 15) / 16 * 16; }
  uint64_t generic_address(uint64_t offset) const;
  uint64_t shared_offset(uint64_t address) const;
  uint64_t peer_address(uint64_t address, uint32_t rank);

  // Where so many bytes are, after a look at alignment, bounds and races
  char* load_shared(uint32_t offset, uint32_t size);
  char* store_shared(uint32_t offset, uint32_t size);
  char* load_generic(uint64_t address, uint32_t size);
  char* store_generic(uint64_t address, uint32_t size);
  char* load_global(uint64_t address, uint32_t size);
  char* store_global(uint64_t address, uint32_t size);
  template <class T>
  T atomic_add(uint64_t address, T x) {
    T* at = reinterpret_cast<T*>(load_global(address, sizeof(T)));
    const T old = *at;
    *at = old + x;
    note_progress();
    return old;
  }

  // cp.async: lands when it is waited for, as late as it may
  void copy_async(uint32_t to, uint64_t from, uint32_t size);
  void commit_group();
  void wait_group(uint32_t pending, Site& site);

  // Other threads
  void block_sync(Site& site, bool aligned);
  void warp_sync(uint32_t mask, Site& site);
  uint32_t shuffle(Shuffle mode, uint32_t value, uint32_t lanes, uint32_t clamp, uint32_t mask, Site& site, bool& found);
  void cluster_arrive(Site& site, bool aligned);
  void cluster_wait(Site& site, bool aligned);
  void spin();  // before it looks at what another thread may have to write first

  // Ends the launch: a thread does what it must not.
  [[noreturn]] void fail(const std::string& what);

  struct Copy {
    uint32_t to, size;
    uint64_t from;
  };

  char* parameters;
  uint32_t parameter_bytes;
  Block* block;
  Warp* warp;
  uint32_t index, block_size;
  const uint32_t* grid;
  Clock clock;
  std::vector<Copy> open_group;
  std::vector<std::vector<Copy>> groups;
  void* stack_pointer;
  char* stack;
  const uint32_t* gate;  // a barrier's phase that must end before it goes on, or null
  uint32_t gate_phase;
  bool done, loses_writes;
  bool between_halves;  // of its cluster's barrier
  const Site* site;     // the last one that it came to

  bool ready() const { return !done && (!gate || *gate != gate_phase); }
  std::string name() const;

 private:
  static void note_progress();
  void suspend();
  void wait(const uint32_t& phase, uint32_t arrived_in);
  void meet(Barrier& barrier);
  void converge(const Site& at);
  void check_alignment(uint64_t address, uint32_t size);
  char* access(uint32_t owner, uint64_t offset, uint32_t size, bool stores);
  char* generic(uint64_t address, uint32_t size, bool stores);
};

struct Parameter {
  int offset, size;
};
struct Kernel {
  const char* name;
  void (*code)(Thread&);
  uint32_t static_shared;
  std::vector<Parameter> parameters;
};
void add_kernel(const Kernel& kernel);
const Kernel* find_kernel(const std::string& name);
bool add_sites(Site* sites, int count);
std::vector<Site*>& all_sites();

struct Launch {
  const Kernel* kernel;
  uint32_t grid[2], threads;
  void** arguments;
  uint32_t dynamic_shared;
  bool together;     // all blocks are there at once
  uint32_t cluster;  // so many are there at once and see each other's shared memory, or 0
  bool lose_writes;  // a fault: what the first thread of the first block writes to memory is lost
};
// Runs a launch to its end, in an order that `seed` decides. Empty, or why it stopped.
std::string run(const Launch& launch, uint64_t seed);

// Races so far, and a sentence about each of the first.
extern long race_count;
extern std::vector<std::string> race_reports;
