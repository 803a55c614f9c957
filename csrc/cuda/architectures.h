// Which code the library holds for a device, from the list of architectures that it was compiled for: pure functions, tested where there is no GPU.
#pragma once

#include <cstring>

namespace mmfast {

enum class Code { none, machine, ptx };  // PTX: the driver has to compile it first

// The code in `list`, as setup.py writes it (80;86;90+PTX), for a device of compute capability major.minor. Machine code runs on its own major version from
// its minor version on, with a letter (90a) on that device alone; PTX runs on all that came later.
inline Code code_for(const char* list, int major, int minor) {
  Code found = Code::none;
  const int capability = 10 * major + minor;
  for (const char* entry = list; *entry;) {
    int number = 0;
    for (; *entry >= '0' && *entry <= '9'; ++entry) number = 10 * number + (*entry - '0');
    const bool only_that = *entry == 'a', with_ptx = std::strncmp(entry + only_that, "+PTX", 4) == 0;
    if (only_that ? number == capability : number / 10 == major && number % 10 <= minor) return Code::machine;
    if (with_ptx && !only_that && number <= capability) found = Code::ptx;
    entry += std::strcspn(entry, ";");
    if (*entry) ++entry;
  }
  return found;
}

}  // namespace mmfast
