// Log-likelihoods of heterogeneous features and their derivatives, in one pass over the outputs of the heads. A vector holds one output of several rows;
// everything is computed in double precision, as mmfast/models/likelihoods.py writes it down.
#pragma once

#include "arena.h"
#include "functions.h"
#include "pool.h"

namespace mmfast {
namespace MMFAST_ISA {

constexpr int kRows = VecD::width;  // of one vector
constexpr double kTiny = 1e-15, kSmallest = 1e-20, kHalfLog2Pi = 0.91893853320467274178;

// A feature's outputs of kRows rows, [outputs][kRows]; its likelihood leaves the derivatives in their place.
struct Column {
  double* at;
  MMFAST_INLINE Doubles operator[](int64_t i) const { return VecD::load(at + i * kRows); }
  MMFAST_INLINE void set(int64_t i, Doubles v) const { VecD::store(at + i * kRows, v); }
};

// torch's softplus: above 20 it is the number itself.
MMFAST_INLINE Softplus positive(Doubles raw) {
  const Softplus s = softplus(raw);
  const Longs large = less(all(20.0), raw);
  return {all(kTiny) + select(large, raw, s.value), select(large, all(1.0), s.slope)};
}

MMFAST_INLINE Doubles normal(Column c, Doubles x) {
  const Softplus half = positive(c[1]);
  const Doubles precision = all(2.0) * half.value, variance = all(1.0) / precision, mean = c[0] * variance, away = x - mean;
  c.set(0, away);
  c.set(1, (variance - away * (x + mean)) * half.slope);
  return all(0.5) * (log(precision) - precision * (away * away)) - all(kHalfLog2Pi);
}

template <class T>
MMFAST_INLINE Doubles log_gamma(Doubles x) {
  if (std::is_same_v<T, float> && all_bits(less(all(0.0), x) & less(x, all(1e300)))) return lgamma(x);
  double lanes[kRows];  // near 1 and 2, where it is 0, the C library has more digits; and it knows numbers below 0 and infinity
  VecD::store(lanes, x);
  for (double& lane : lanes) {
    int sign;
    lane = ::lgamma_r(lane, &sign);
  }
  return VecD::load(lanes);
}

template <class T>
MMFAST_INLINE Doubles gamma(Column c, Doubles x) {
  const Softplus shape = positive(c[0]), rate = positive(c[1]);
  x = at_least(x, kSmallest);
  const Doubles log_rate = log(rate.value), log_x = log(x), k = shape.value;
  c.set(0, (log_rate + log_x - digamma(k)) * shape.slope);
  c.set(1, (k / rate.value - x) * rate.slope);
  return k * log_rate + (k - all(1.0)) * log_x - rate.value * x - log_gamma<T>(k);
}

MMFAST_INLINE Doubles exponential(Column c, Doubles x) {
  const Softplus rate = positive(c[0]);
  c.set(0, (all(1.0) / rate.value - x) * rate.slope);
  return log(rate.value) - rate.value * x;
}

MMFAST_INLINE Doubles bernoulli(Column c, Doubles x) {
  const Doubles logit = c[0];
  const Softplus s = positive(logit);
  c.set(0, x - s.slope);
  return x * logit - (s.value - all(kTiny));
}

// Whether x, cut to an integer, is class j.
MMFAST_INLINE Longs is_class(Doubles x, int64_t j) {
  return less(x, all(static_cast<double>(j + 1))) & (j ? no_more(all(static_cast<double>(j)), x) : less(all(-1.0), x));
}

MMFAST_INLINE Doubles categorical(Column c, int64_t classes, Doubles x) {
  Doubles largest = c[0], chosen = c[0], sum = all(0.0);
  for (int64_t j = 1; j < classes; ++j) {
    const Doubles logit = c[j];
    largest = select(less(largest, logit), logit, largest);
    chosen = select(is_class(x, j), logit, chosen);
  }
  for (int64_t j = 0; j < classes; ++j) {
    const Doubles e = exp(c[j] - largest);
    c.set(j, e);
    sum = sum + e;
  }
  const Doubles inverse = all(-1.0) / sum;
  for (int64_t j = 0; j < classes; ++j) c.set(j, VecD::fma(c[j], inverse, select(is_class(x, j), all(1.0), all(0.0))));
  return (chosen - largest) - log(sum);
}

// P(x <= j) = sigmoid(cut_j); the outputs are the location, the first threshold, and what is made positive to step from each to the next.
MMFAST_INLINE Doubles ordinal(Column c, int64_t classes, Doubles x) {
  const Doubles zero = all(0.0);
  Doubles cut = c[1] - c[0], above = zero, below = zero, step = all(1.0);  // the cuts on both sides of x, and what is between them
  for (int64_t j = 0; j < classes - 1; ++j) {
    if (j) {
      const Softplus s = positive(c[j + 1]);
      cut = cut + s.value;
      c.set(j + 1, s.slope);
      step = select(is_class(x, j), s.value, step);
    }
    above = select(is_class(x, j), cut, above);
    below = select(is_class(x, j + 1), cut, below);
  }
  const Longs first = is_class(x, 0), last = is_class(x, classes - 1), inside = ~(first | last);
  const Softplus over = softplus(-above), under = softplus(below);  // sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - exp(a - b))
  const Doubles between = -expm1(-step), d_above = select(last, zero, over.slope), d_below = select(first, zero, -under.slope);
  const Doubles d_step = select(inside, exp(-step) / between, zero);
  for (int64_t j = 1; j < classes - 1; ++j) {
    Doubles slope = select(is_class(x, j), d_above + d_step, zero);
    slope = select(no_more(all(static_cast<double>(j + 1)), x), d_above + d_below, slope);
    c.set(j + 1, slope * c[j + 1]);
  }
  c.set(0, -(d_above + d_below));
  c.set(1, d_above + d_below);
  return select(last, zero, -over.value) + (select(first, zero, -under.value) + select(inside, log(between), zero));
}

template <class T>
MMFAST_INLINE Doubles poisson(Column c, Doubles x) {
  constexpr double kLow = -13.815510557964274, kHigh = 46.051701859880914;  // log 1e-6, log 1e20
  const Doubles raw = c[0], log_rate = at_most(at_least(raw, kLow), kHigh), rate = exp(log_rate);
  const Longs free = no_more(all(kLow), raw) & no_more(raw, all(kHigh));
  c.set(0, select(free, x - rate, all(0.0) * log_rate));
  return x * log_rate - rate - log_gamma<T>(x + all(1.0));
}

template <class T>
MMFAST_INLINE Doubles log_prob_of(const Feature& f, Column c, Doubles x) {
  const Doubles scaled = all(f.w) * x;
  switch (f.kind) {
    case Kind::normal: return normal(c, scaled);
    case Kind::log_normal: {
      const Doubles log_x = all(f.w) * log(at_least(x, kSmallest));
      return normal(c, log_x) - log_x;
    }
    case Kind::gamma: return gamma<T>(c, scaled);
    case Kind::exponential: return exponential(c, scaled);
    case Kind::bernoulli: return bernoulli(c, x);
    case Kind::categorical: return categorical(c, f.outputs, x);
    case Kind::ordinal: return ordinal(c, f.outputs, x);
    case Kind::poisson: return poisson<T>(c, x);
  }
  return x;
}

// Where x is no value that the feature can have. NaN is left to the formulas, but for classes.
MMFAST_INLINE Longs outside(const Feature& f, Doubles x) {
  const Doubles zero = all(0.0);
  switch (f.kind) {
    case Kind::normal: return Longs{};
    case Kind::log_normal:
    case Kind::gamma:
    case Kind::exponential: return less(x, zero);
    case Kind::bernoulli: return less(x, zero) | less(all(1.0), x);
    case Kind::categorical:
    case Kind::ordinal: return ~(less(all(-1.0), x) & less(x, all(static_cast<double>(f.outputs))));
    case Kind::poisson: {
      const Doubles nearest = select(less(x, all(0x1p51)), (x + all(kRound)) - all(kRound), x);  // from there on numbers are whole
      return less(x, zero) | less(x, nearest) | less(nearest, x);
    }
  }
  return Longs{};
}

template <class T>
inline int64_t log_prob_typed(const Pool& pool, const LogProb& a, T* out, T* slopes) {
  const T *raw = static_cast<const T*>(a.raw), *x = static_cast<const T*>(a.x);
  int64_t wrong = -1;
  parallel_for(pool, (a.rows + kRows - 1) / kRows, a.rows * a.outputs * 16, [&](int64_t begin, int64_t end) {
    Arena arena;
    double *columns = arena.take<double>(a.outputs * kRows), *values = arena.take<double>(a.count * kRows), *results = arena.take<double>(a.count * kRows);
    int64_t *hidden = a.seen ? arena.take<int64_t>(a.count * kRows) : nullptr, *refused = arena.take<int64_t>(a.count * kRows);
    std::fill_n(refused, a.count * kRows, 0);
    for (int64_t r = begin * kRows; r < end * kRows; r += kRows) {
      const int rows = static_cast<int>(a.rows - r < kRows ? a.rows - r : kRows);
      for (int l = 0; l < kRows; ++l) {  // rows that are not there repeat the last one
        const int64_t there = r + (l < rows ? l : rows - 1), cell = there % a.x_rows * a.count;
        const T *__restrict row = raw + there * a.outputs, *__restrict row_of_x = x + cell;
        for (int64_t o = 0; o < a.outputs; ++o) columns[o * kRows + l] = static_cast<double>(row[o]);
        for (int64_t k = 0; k < a.count; ++k) values[k * kRows + l] = static_cast<double>(row_of_x[k]);
        if (hidden && a.seen_is_bool)
          for (int64_t k = 0; k < a.count; ++k) hidden[k * kRows + l] = static_cast<int64_t>(static_cast<const bool*>(a.seen)[cell + k]) - 1;
        else if (hidden)
          for (int64_t k = 0; k < a.count; ++k) hidden[k * kRows + l] = static_cast<int64_t>(static_cast<const T*>(a.seen)[cell + k] != T(0)) - 1;
      }
      for (int64_t k = 0; k < a.count; ++k) {
        const Feature& f = a.features[k];
        const Column c{columns + f.first * kRows};
        Doubles v = VecD::load(values + k * kRows);
        Longs there{};
        if (hidden) {
          std::memcpy(&there, hidden + k * kRows, sizeof there);
          v = select(there, all(0.0), v);
        }
        Longs so_far;
        std::memcpy(&so_far, refused + k * kRows, sizeof so_far);
        so_far |= outside(f, v);
        std::memcpy(refused + k * kRows, &so_far, sizeof so_far);
        Doubles y = log_prob_of<T>(f, c, v);
        if (hidden) {
          y = select(there, all(0.0), y);
          for (int64_t o = 0; o < f.outputs; ++o) c.set(o, select(there, all(0.0), c[o]));
        }
        VecD::store(results + k * kRows, y);
      }
      for (int l = 0; l < rows; ++l) {
        T* __restrict row = out + (r + l) * a.count;
        for (int64_t k = 0; k < a.count; ++k) row[k] = static_cast<T>(results[k * kRows + l]);
        if (!slopes) continue;
        T* __restrict row_of_slopes = slopes + (r + l) * a.outputs;
        for (int64_t o = 0; o < a.outputs; ++o) row_of_slopes[o] = static_cast<T>(columns[o * kRows + l]);
      }
    }
    for (int64_t e = 0; e < a.count * kRows; ++e)
      if (refused[e]) __atomic_store_n(&wrong, e / kRows, __ATOMIC_RELAXED);
  });
  return wrong;
}

inline int64_t log_prob(const Pool& pool, const LogProb& a, void* out, void* slopes) {
  return a.dtype == Dtype::f64 ? log_prob_typed(pool, a, static_cast<double*>(out), static_cast<double*>(slopes))
                               : log_prob_typed(pool, a, static_cast<float*>(out), static_cast<float*>(slopes));
}

template <class T>
inline void log_prob_backward_typed(const Pool& pool, const LogProb& a, const T* slopes, const GradOfLogProb& grad, T* out) {
  const T* from = static_cast<const T*>(grad.data);
  Arena arena;
  int64_t* place = arena.take<int64_t>(a.outputs);  // of what comes back to an output, in its row
  for (int64_t k = 0; k < a.count; ++k)
    for (int64_t i = 0; i < a.features[k].outputs; ++i) place[a.features[k].first + i] = k * grad.feature_stride;
  parallel_for(pool, a.rows, a.rows * a.outputs, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T *__restrict slope = slopes + r * a.outputs, *__restrict back = from + r * grad.row_stride;
      T* __restrict to = out + r * a.outputs;
      for (int64_t o = 0; o < a.outputs; ++o) to[o] = slope[o] * back[place[o]];
    }
  });
}

inline void log_prob_backward(const Pool& pool, const LogProb& a, const void* slopes, const GradOfLogProb& grad, void* out) {
  if (a.dtype == Dtype::f64)
    log_prob_backward_typed(pool, a, static_cast<const double*>(slopes), grad, static_cast<double*>(out));
  else
    log_prob_backward_typed(pool, a, static_cast<const float*>(slopes), grad, static_cast<float*>(out));
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
