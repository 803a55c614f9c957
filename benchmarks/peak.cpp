// What this machine can do at best: floating-point multiply-adds and reading memory. Compiled on the fly by roofline.py.
// The work runs on torch's own threads, like the operators beside which it is timed: fresh threads may share a processor for their
// first milliseconds, and a second set of threads would meet torch's, which spin for a while after each call.

#include <cstdint>

extern "C" int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);

#ifdef __AVX512F__
constexpr int kBytes = 64;
#else
constexpr int kBytes = 32;
#endif
constexpr int kChains = 12;  // enough for two units of latency 4 or 5, few enough for 16 registers
typedef float Vector __attribute__((vector_size(kBytes)));
typedef float Unaligned __attribute__((vector_size(kBytes), aligned(4)));
constexpr int kLanes = kBytes / 4;

static volatile float sink;

// work(t) for each t below `threads`, each on a thread of its own
template <class F>
static void on_threads(int threads, F work) {
  torch_parallel_for(
      0, threads, 1,
      [](int64_t begin, int64_t end, void* context) {
        for (int64_t t = begin; t < end; ++t) (*static_cast<F*>(context))(static_cast<int>(t));
      },
      &work);
}

// floating-point operations of one round of one thread; a multiply-add counts two
extern "C" int64_t operations() { return kChains * kLanes * 2; }

// `rounds` multiply-adds in each of kChains independent chains on every thread
extern "C" void multiply_add(int threads, int64_t rounds) {
  on_threads(threads, [=](int t) {
    Vector a, b, x[kChains];
    for (int l = 0; l < kLanes; ++l) a[l] = 0.999f, b[l] = 1e-3f * (t + 1);
    for (int c = 0; c < kChains; ++c) x[c] = b * float(c);
    for (int64_t r = 0; r < rounds; ++r)
#pragma GCC unroll 12
      for (int c = 0; c < kChains; ++c) x[c] = x[c] * a + b;
    Vector sum = x[0];
    for (int c = 1; c < kChains; ++c) sum += x[c];
    sink = sum[0];
  });
}

// reads n floats once: each thread a contiguous part, as several streams at once because one alone does not fill the memory system
extern "C" void read_all(const float* data, int64_t n, int threads, int streams) {
  on_threads(threads, [=](int t) {
    int64_t part = n / threads / streams / (4 * kLanes) * (4 * kLanes);
    const float* begin = data + t * (n / threads);
    Vector sum[4] = {};
    for (int64_t i = 0; i < part; i += 4 * kLanes)
      for (int s = 0; s < streams; ++s)
        for (int u = 0; u < 4; ++u) sum[u] += *reinterpret_cast<const Unaligned*>(begin + s * part + i + u * kLanes);
    Vector total = sum[0] + sum[1] + sum[2] + sum[3];
    float x = 0;
    for (int l = 0; l < kLanes; ++l) x += total[l];
    sink = x;
  });
}
