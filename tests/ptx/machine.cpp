// Runs launches: fibers on stacks of their own, and an order among them that is drawn anew for every launch and lets some warps and blocks starve,
// so that the others run as far ahead as barriers let them.
#include "machine.h"

#include <signal.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <new>
#include <random>

// Saves what a call must keep and the stack pointer, and takes up the other side's.
extern "C" void switch_fiber(void** from, void* to);
asm(R"(
.text
.hidden switch_fiber
.globl switch_fiber
.type switch_fiber, @function
switch_fiber:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
  ret
)");

namespace {

constexpr int kPatience = 10000;  // rounds in which threads only look whether somebody else has written

std::map<std::string, Kernel>& kernels() {
  static std::map<std::string, Kernel> known;
  return known;
}

void* scheduler_stack = nullptr;
Thread* current = nullptr;
const Kernel* running = nullptr;
uint64_t progress = 0;
std::string failure;
alignas(64) char grid_barrier[64];  // that of cooperative_groups

void fiber_main() {
  running->code(*current);
  Thread& t = *current;
  if (t.between_halves) t.fail("a thread ends between the two halves of the cluster's barrier");
  t.done = true;
  --t.block->live, --t.warp->live;
  ++progress;
  switch_fiber(&t.stack_pointer, scheduler_stack);
}

// Stacks are made once. They are filled from the top, so what a thread never needs takes no memory.
char* stack(size_t number) {
  static std::vector<char*> stacks;
  while (stacks.size() <= number) {
    void* fresh = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (fresh == MAP_FAILED) throw std::bad_alloc();
    stacks.push_back(static_cast<char*>(fresh));
  }
  return stacks[number];
}

void start_fiber(Thread& t, size_t number) {
  t.stack = stack(number);
  void** top = reinterpret_cast<void**>(t.stack + kStackBytes - 64);
  *--top = nullptr;  // nobody returns to it
  *--top = reinterpret_cast<void*>(fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  t.stack_pointer = top;
}

void on_fault(int number, siginfo_t* info, void*) {
  if (!current) {
    signal(number, SIG_DFL);  // no thread's: it happens again, and ends the process
    return;
  }
  char text[80];
  std::snprintf(text, sizeof text, "an access to %p, which is no memory of this call", info->si_addr);
  current->fail(text);
}

// While it lives, a thread's access to no memory ends the launch and not the process.
class FaultGuard {
 public:
  FaultGuard() {
    struct sigaction mine {};
    mine.sa_sigaction = on_fault;
    mine.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGSEGV, &mine, &before_);
  }
  ~FaultGuard() { sigaction(SIGSEGV, &before_, nullptr); }

 private:
  struct sigaction before_ {};
};

// Blocks that are there at once, until all their threads have ended or one has failed.
class Group {
 public:
  Group(const Launch& launch, std::vector<char>& parameters, size_t first, size_t count, uint64_t seed) : random_(seed), blocks_(count), threads_(count * launch.threads) {
    static SharedMemory memory;
    const uint32_t warps = (launch.threads + 31) / 32;
    warps_.resize(count * warps);
    memory.start(static_cast<uint32_t>(count), (launch.kernel->static_shared + 15) / 16 * 16 + launch.dynamic_shared);
    cluster_.size = static_cast<uint32_t>(threads_.size());
    for (size_t b = 0; b < count; ++b) {
      Block& block = blocks_[b];
      block = {};
      block.kernel = launch.kernel->name;
      block.x = static_cast<uint32_t>((first + b) % launch.grid[0]), block.y = static_cast<uint32_t>((first + b) / launch.grid[0]), block.rank = static_cast<uint32_t>(b);
      block.live = block.barrier.size = launch.threads, block.static_shared = launch.kernel->static_shared;
      block.cooperative = launch.together, block.cluster = &cluster_, block.memory = &memory;
    }
    for (size_t i = 0; i < threads_.size(); ++i) {
      Thread& t = threads_[i];
      const size_t b = i / launch.threads;
      t.index = static_cast<uint32_t>(i % launch.threads), t.block_size = launch.threads, t.grid = launch.grid;
      t.parameters = parameters.data(), t.parameter_bytes = static_cast<uint32_t>(parameters.size()), t.block = &blocks_[b], t.warp = &warps_[b * warps + t.index / 32];
      if (t.lane() == 0) {
        *t.warp = {};
        t.warp->threads = &t;
        t.warp->size = t.warp->live = t.warp->barrier.size = t.warp->convergence.size = std::min(32u, launch.threads - t.index);
      }
      t.clock.block = static_cast<uint32_t>(b), t.clock.warp = t.index / 32, t.clock.thread = t.index;
      t.loses_writes = launch.lose_writes && first + b == 0 && t.index == 0;
      start_fiber(t, i);
    }
  }

  void run() {
    std::vector<Warp*> live;
    for (Warp& warp : warps_) live.push_back(&warp);
    uint64_t starving = random_();
    bool all = false;  // nobody is let starve
    for (int round = 1, idle = 0; !live.empty() && failure.empty(); ++round) {
      if (round % 64 == 0) starving = random_();
      const uint64_t before = progress;
      bool ran = false;
      std::shuffle(live.begin(), live.end(), random_);
      for (Warp* warp : live)
        if (all || !starves(*warp, starving)) ran |= run_warp(*warp, round);
      live.erase(std::remove_if(live.begin(), live.end(), [](const Warp* warp) { return !warp->live; }), live.end());
      idle = progress == before ? idle + 1 : 0;
      if (all && (!ran || idle > kPatience)) report_deadlock();
      all = progress == before;
    }
  }

 private:
  // A quarter of the blocks, and of the warps.
  static bool starves(const Warp& warp, uint64_t starving) {
    auto drawn = [&](uint64_t number) { return ((number + 1) * 0x9E3779B97F4A7C15ull ^ starving) * 0xD6E8FEB86659FD93ull >> 62 == 0; };
    return drawn(warp.threads->block->rank) || drawn(1000003 + 32 * warp.threads->block->rank + warp.threads->index / 32);
  }

  // Each thread that can, as far as it comes; in an order that turns.
  bool run_warp(Warp& warp, int round) {
    bool ran = false;
    for (uint32_t i = 0; i < warp.size && failure.empty(); ++i) {
      Thread& t = warp.threads[round % 2 ? i : warp.size - 1 - i];
      if (!t.ready()) continue;
      ran = true;
      current = &t;
      switch_fiber(&scheduler_stack, t.stack_pointer);
      current = nullptr;
    }
    return ran;
  }

  void report_deadlock() const {
    const auto waiting = std::find_if(threads_.begin(), threads_.end(), [](const Thread& t) { return !t.done; });
    failure = "deadlock: " + waiting->name() + " waits, and nobody comes";
  }

  std::mt19937_64 random_;
  Barrier cluster_;
  std::vector<Block> blocks_;
  std::vector<Warp> warps_;
  std::vector<Thread> threads_;
};

}  // namespace

void Thread::note_progress() { ++progress; }
void Thread::suspend() { switch_fiber(&stack_pointer, scheduler_stack); }
void Thread::fail(const std::string& what) {
  failure = what + ": " + name() + " in " + running->name;
  suspend();
  __builtin_unreachable();  // nobody goes on once there is a failure
}
uint32_t Thread::environment(int number) const {
  const uint64_t address = block->cooperative ? reinterpret_cast<uint64_t>(grid_barrier) : 0;
  return static_cast<uint32_t>(number == 1 ? address >> 32 : address);
}

void add_kernel(const Kernel& kernel) { kernels()[kernel.name] = kernel; }
const Kernel* find_kernel(const std::string& name) {
  const auto found = kernels().find(name);
  return found == kernels().end() ? nullptr : &found->second;
}
std::vector<Site*>& all_sites() {
  static std::vector<Site*> sites;
  return sites;
}
bool add_sites(Site* sites, int count) {
  for (int i = 0; i < count; ++i) all_sites().push_back(sites + i);
  return true;
}

std::string run(const Launch& launch, uint64_t seed) {
  const Kernel& kernel = *launch.kernel;
  std::vector<char> parameters(kernel.parameters.empty() ? 0 : kernel.parameters.back().offset + kernel.parameters.back().size);
  for (size_t i = 0; i < kernel.parameters.size(); ++i) std::memcpy(parameters.data() + kernel.parameters[i].offset, launch.arguments[i], kernel.parameters[i].size);
  running = &kernel;
  failure.clear();
  std::memset(grid_barrier, 0, sizeof grid_barrier);
  const FaultGuard guard;
  const size_t all = static_cast<size_t>(launch.grid[0]) * launch.grid[1], size = launch.together ? all : launch.cluster ? launch.cluster : 1;
  std::mt19937_64 random(seed);
  std::vector<size_t> first;
  for (size_t b = 0; b < all; b += size) first.push_back(b);
  std::shuffle(first.begin(), first.end(), random);
  for (size_t b : first) {
    Group(launch, parameters, b, size, random()).run();
    if (!failure.empty()) break;
  }
  return failure;
}
