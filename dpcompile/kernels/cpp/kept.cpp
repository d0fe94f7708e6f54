// Weighted sums of per-example gradients that were kept.

#include <algorithm>
#include <cstdint>

// result[i] = sum over k of weights[k] rows[used[k]][i]. Some columns at a time, which stay in the cache, and four rows
// at a time.
extern "C" void dp_weighted_sum(
    const float* rows, int64_t columns, const int64_t* used, const float* weights, int64_t count, float* result,
    int threads) {
  constexpr int64_t PIECE = 1024;
#pragma omp parallel for num_threads(threads) schedule(static) if (columns > PIECE)
  for (int64_t first = 0; first < columns; first += PIECE) {
    const int64_t length = std::min(PIECE, columns - first);
    float* to = result + first;
    std::fill(to, to + length, 0.0f);
    int64_t k = 0;
    for (; k + 4 <= count; k += 4) {
      const float *a = rows + used[k] * columns + first, *b = rows + used[k + 1] * columns + first;
      const float *c = rows + used[k + 2] * columns + first, *d = rows + used[k + 3] * columns + first;
      const float u = weights[k], v = weights[k + 1], w = weights[k + 2], x = weights[k + 3];
#pragma omp simd
      for (int64_t i = 0; i < length; ++i) to[i] += (u * a[i] + v * b[i]) + (w * c[i] + x * d[i]);
    }
    for (; k < count; ++k) {
      const float *a = rows + used[k] * columns + first, u = weights[k];
#pragma omp simd
      for (int64_t i = 0; i < length; ++i) to[i] += u * a[i];
    }
  }
}
