// Scratch memory of one thread, kept between calls so that a hot call allocates nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "../isa.h"

namespace mmfast {
namespace MMFAST_ISA {

// One growing block; take() hands out pieces until the Arena object that took them ends.
class Arena {
 public:
  Arena() : start_(block().used), spares_(block().spares) {}
  ~Arena() {
    Block& b = block();
    b.used = start_;
    while (b.spares > spares_) std::free(b.spare[--b.spares]);
    if (start_ == 0 && b.wanted > b.size) b.grow();
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // Contents undefined, 64-byte aligned.
  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(block().take((static_cast<size_t>(count) * sizeof(T) + 63) & ~size_t{63}));
  }

 private:
  struct Block {
    static constexpr int kSpare = 32;
    char* data = nullptr;
    size_t size = 0, used = 0, wanted = 0;
    void* spare[kSpare];  // pieces that did not fit; the block grows once all is given back
    int spares = 0;

    void* take(size_t bytes) {
      used += bytes;
      if (used <= size) return data + used - bytes;
      if (used > wanted) wanted = used;
      if (spares == kSpare) throw std::bad_alloc();
      void* piece = std::aligned_alloc(64, bytes ? bytes : 64);
      if (!piece) throw std::bad_alloc();
      return spare[spares++] = piece;
    }
    void grow() {
      std::free(data);
      size = (wanted + 4095) & ~size_t{4095};
      data = static_cast<char*>(std::aligned_alloc(64, size));
      if (!data) size = 0;
    }
    ~Block() { std::free(data); }
  };
  static Block& block() {
    static thread_local Block b;
    return b;
  }
  size_t start_;
  int spares_;
};

}  // namespace MMFAST_ISA
}  // namespace mmfast
