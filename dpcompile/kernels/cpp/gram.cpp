// Sums over two Gram matrices of every example.

#include <cmath>
#include <cstdint>

// Of every example: the sum of R C, and the sum over all blocks of (sum over the diagonal of sqrt(R C))^2. Of both
// matrices only a lower part is there: rows [start, end) of panel n of `panels` up to column `end`; what lies left of
// `start` counts twice.
extern "C" void dp_gram_norms(
    const double* rows, const double* cols, int64_t batch, int64_t blocks, int64_t positions, int64_t panels,
    double* result, double* sizes, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (batch > 1)
  for (int64_t b = 0; b < batch; ++b) {
    double total = 0, size = 0;
    for (int64_t k = b * blocks; k < (b + 1) * blocks; ++k) {
      double length = 0;
      for (int64_t n = 0; n < panels; ++n) {
        const int64_t start = positions * n / panels, end = positions * (n + 1) / panels;
        for (int64_t t = start; t < end; ++t) {
          const double *r = rows + (k * positions + t) * positions, *c = cols + (k * positions + t) * positions;
          double left = 0, own = 0;
#pragma omp simd reduction(+ : left)
          for (int64_t j = 0; j < start; ++j) left += r[j] * c[j];
#pragma omp simd reduction(+ : own)
          for (int64_t j = start; j < end; ++j) own += r[j] * c[j];
          total += 2 * left + own;
          length += std::sqrt(r[t]) * std::sqrt(c[t]);
        }
      }
      size += length * length;
    }
    result[b] = total, sizes[b] = size;
  }
}
