// What this machine can do at best: floating-point multiply-adds and reading memory. Compiled on the fly by roofline.py.
// Every function uses `threads` threads and returns seconds from the first thread's start to the last one's end.

#include <chrono>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#ifdef __AVX512F__
constexpr int kBytes = 64;
#else
constexpr int kBytes = 32;
#endif
constexpr int kChains = 12;  // enough for two units of latency 4 or 5, few enough for 16 registers
typedef float Vector __attribute__((vector_size(kBytes)));
typedef float Unaligned __attribute__((vector_size(kBytes), aligned(4)));
constexpr int kLanes = kBytes / 4;

using Clock = std::chrono::steady_clock;
static volatile float sink;

template <class F>
static double timed(int threads, F work) {
    std::vector<Clock::time_point> start(threads), end(threads);
    auto run = [&](int t) {
        start[t] = Clock::now();
        work(t);
        end[t] = Clock::now();
    };
    std::vector<std::thread> others;
    for (int t = 1; t < threads; ++t) others.emplace_back(run, t);
    run(0);
    for (auto& other : others) other.join();
    auto first = start[0], last = end[0];
    for (int t = 1; t < threads; ++t) {
        if (start[t] < first) first = start[t];
        if (end[t] > last) last = end[t];
    }
    return std::chrono::duration<double>(last - first).count();
}

extern "C" double fma_flops(int threads, int64_t rounds) { return double(threads) * rounds * kChains * kLanes * 2; }

// `rounds` multiply-adds in each of kChains independent chains on every thread; fma_flops says how many operations that is
extern "C" double fma_seconds(int threads, int64_t rounds) {
    return timed(threads, [=](int t) {
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
extern "C" double read_seconds(const float* data, int64_t n, int threads, int streams) {
    return timed(threads, [=](int t) {
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
