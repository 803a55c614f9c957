// The features of a table, read from its rows (kind, outputs), int64 [K, 2]: the outputs lie side by side in this order.
#pragma once

#include <vector>

#include "args.h"

namespace mmfast {

// False where a row names no kind or not the outputs that it has, or all of them are not the outputs that there are.
template <class W>
inline bool read_features(const int64_t* table, const W* w, int64_t K, int64_t outputs, std::vector<Feature>& features) {
  features.resize(K);
  int64_t first = 0;
  for (int64_t k = 0; k < K; ++k, table += 2) {
    const int64_t kind = table[0], count = table[1];
    if (kind < 0 || kind >= kKinds || count < 1 || count > outputs - first) return false;
    const Kind named = static_cast<Kind>(kind);
    const bool two = named == Kind::normal || named == Kind::log_normal || named == Kind::gamma, any = named == Kind::categorical || named == Kind::ordinal;
    if (any ? count < (named == Kind::ordinal ? 2 : 1) : count != (two ? 2 : 1)) return false;
    features[k] = {named, first, count, w ? static_cast<double>(w[k]) : 1.0};
    first += count;
  }
  return first == outputs;
}

}  // namespace mmfast
