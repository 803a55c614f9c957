// Every rule of every family, found by its number.
#pragma once

#include <utility>

#include "alignment.h"
#include "bargaining.h"
#include "cone.h"
#include "hold.h"
#include "magnitude.h"
#include "minnorm.h"
#include "projection.h"
#include "robust.h"
#include "simple.h"

namespace mmfast {
namespace MMFAST_ISA {

namespace detail {
template <class F, int... ids>
MMFAST_HD inline bool with_rule(int id, F f, std::integer_sequence<int, ids...>) {
  return ((id == ids && Rule<ids>::exists ? (f(Rule<ids>{}), true) : false) || ...);
}
}  // namespace detail

// Calls f(Rule<id>{}); false when there is no such rule.
template <class F>
MMFAST_HD inline bool with_rule(int id, F f) {
  return detail::with_rule(id, f, std::make_integer_sequence<int, kMaxRules>{});
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
