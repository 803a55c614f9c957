// The current device of this thread.
#pragma once

namespace mmfast {
namespace gpu {

// Makes a device current until it ends.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_;
  bool changed_;
};

}  // namespace gpu
}  // namespace mmfast
