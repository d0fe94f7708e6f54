// One number for the content of each of several tensors, in one pass over memory: see kernels/content.py.
//
// Source: the hash NH of Black, Halevi, Krawczyk, Krovetz, Rogaway, "UMAC" (CRYPTO 1999).

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t CHUNK = 1 << 20;  // words; even
constexpr uint32_t STRIDE = 0x9E3779B1u, START = 0x85EBCA6Bu;

inline uint64_t of_chunk(const char* bytes, int64_t size) {
  const int64_t pairs = size / 8;
  uint64_t sum = 0;
  for (int64_t i = 0; i < pairs; ++i) {
    uint64_t both;
    std::memcpy(&both, bytes + 8 * i, 8);
    const uint32_t first = uint32_t(both) + (START + 2 * STRIDE * uint32_t(i));
    const uint32_t second = uint32_t(both >> 32) + (START + STRIDE + 2 * STRIDE * uint32_t(i));
    sum += uint64_t(first) * uint64_t(second);
  }
  if (size % 8) {
    uint64_t both = 0;
    std::memcpy(&both, bytes + 8 * pairs, size % 8);
    const uint32_t key = START + 2 * STRIDE * uint32_t(pairs);
    sum += uint64_t(uint32_t(uint32_t(both) + key)) * uint64_t(uint32_t(uint32_t(both >> 32) + key + STRIDE));
  }
  return sum;
}

}  // namespace

extern "C" {

// found[i] for `sizes[i]` bytes at memory[i].
void dp_content(int64_t count, const char* const* memory, const int64_t* sizes, uint64_t* found, int threads) {
  struct Task {
    int64_t tensor, chunk;
  };
  std::vector<Task> tasks;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t c = 0; 4 * c * CHUNK < sizes[i]; ++c) tasks.push_back({i, c});
  const int64_t n = tasks.size();
  std::vector<uint64_t> sums(n);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (n > 1)
  for (int64_t t = 0; t < n; ++t) {
    const int64_t begin = 4 * tasks[t].chunk * CHUNK;
    const int64_t size = std::min(4 * CHUNK, sizes[tasks[t].tensor] - begin);
    sums[t] = of_chunk(memory[tasks[t].tensor] + begin, size) * uint64_t(2 * tasks[t].chunk + 1);
  }
  std::fill(found, found + count, 0);
  for (int64_t t = 0; t < n; ++t) found[tasks[t].tensor] += sums[t];
}
}
