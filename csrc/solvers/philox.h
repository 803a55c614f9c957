// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011):
// a number is a function of (seed, counter, index), so every device and thread count draws the same.
#pragma once

#include "team.h"

namespace mmfast {
namespace MMFAST_ISA {

struct Philox4 {
  uint32_t v[4];
};

MMFAST_HD inline Philox4 philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = 0xD2511F53ull * c0, p1 = 0xCD9E8D57ull * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0, n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The random stream of one problem at one step of a chain. Word 0 of the draw at `index` is its integer;
// words 0 and 1 make its uniform. counter is the number of calls so far, taken modulo 2^32.
struct Draw {
  uint64_t seed;
  uint32_t counter;
  uint32_t problem;
  uint32_t step;

  MMFAST_HD Philox4 bits(uint32_t index) const { return philox(seed, index, problem, step, counter); }
  MMFAST_HD uint32_t integer(uint32_t index) const { return bits(index).v[0]; }
  // In the open interval (0, 1): 52 bits, so that adding one half stays exact.
  MMFAST_HD double uniform(uint32_t index) const {
    const Philox4 b = bits(index);
    const uint64_t u = (static_cast<uint64_t>(b.v[0]) << 20) ^ (b.v[1] >> 12);
    return (static_cast<double>(u) + 0.5) * 2.220446049250313e-16;
  }
};

}  // namespace MMFAST_ISA
}  // namespace mmfast
