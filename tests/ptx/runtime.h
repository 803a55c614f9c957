// The state of the stand-in for the CUDA runtime that tests set and read (device.py), and what torch's calls ask of it.
#pragma once

#include <cstdint>

namespace device {

// The device that calls are made on: which numbers cudaDeviceGetAttribute and the occupancy calculator answer with.
int current();
// `size` bytes that end at a page nobody may touch, all ones, which is NaN; kept until release().
void* allocate(uint64_t size);

}  // namespace device
