// Runs the native library for a caller on another kind of machine: calls come in on standard input, with the memory
// that their arguments point to, results go out. tests/arm_helpers.py starts it under an emulator.
//
//     arm_server LIBRARY
//
// Numbers are 64 bits, little-endian. A call: bytes of the name, the name; number of blocks of memory, of each its size
// and bytes; number of pointers inside of blocks, of each block, offset, and the block to point to; number of
// arguments, of each a number and whether it is a block. An answer: the result, a number; all blocks; bytes of the text
// that the result points to, if `text` was asked for, and the text.
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <memory>
#include <string>
#include <vector>

namespace {

void read_all(void *to, size_t n) {
  if (fread(to, 1, n, stdin) != n) exit(0); // the caller has gone
}

int64_t number() {
  int64_t n;
  read_all(&n, sizeof n);
  return n;
}

void write_all(const void *from, size_t n) {
  if (fwrite(from, 1, n, stdout) != n) exit(1);
}

struct Block {
  std::unique_ptr<char, void (*)(void *)> memory;
  size_t size;
  explicit Block(size_t n) : memory((char *)aligned_alloc(64, n / 64 * 64 + 64), free), size(n) {}
};

typedef int64_t (*Function)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
typedef double (*SumExp)(const float *, int64_t, float);

} // namespace

int main(int, char **arguments) {
  void *library = dlopen(arguments[1], RTLD_NOW);
  if (!library) return fprintf(stderr, "%s\n", dlerror()), 1;
  while (true) {
    std::string name(number(), 0);
    read_all(name.data(), name.size());
    std::vector<Block> blocks;
    for (int64_t n = number(); n > 0; n--) {
      blocks.emplace_back(number());
      read_all(blocks.back().memory.get(), blocks.back().size);
    }
    for (int64_t n = number(); n > 0; n--) {
      int64_t block = number(), offset = number();
      char *target = blocks[number()].memory.get();
      memcpy(blocks[block].memory.get() + offset, &target, sizeof target);
    }
    int64_t values[6] = {0};
    for (int64_t i = 0, n = number(); i < n; i++) {
      values[i] = number();
      if (number()) values[i] = (int64_t)blocks[values[i]].memory.get();
    }
    void *function = dlsym(library, name.c_str());
    if (!function) return fprintf(stderr, "no function %s\n", name.c_str()), 1;
    int64_t result;
    if (name == "og_sum_exp") { // the only one with floats
      float peak;
      memcpy(&peak, &values[2], sizeof peak);
      double sum = ((SumExp)function)((const float *)values[0], values[1], peak);
      memcpy(&result, &sum, sizeof result);
    } else result = ((Function)function)(values[0], values[1], values[2], values[3], values[4], values[5]);
    write_all(&result, sizeof result);
    for (const Block &block : blocks) write_all(block.memory.get(), block.size);
    bool text = name == "og_isa" || name == "og_isa_in_use";
    int64_t length = text && result ? (int64_t)strlen((const char *)result) : 0;
    write_all(&length, sizeof length);
    write_all((const char *)result, length);
    fflush(stdout);
  }
}
