// What norms and sums on CPUs need besides torch's operations: its matrix product by oneDNN, sums over two Gram matrices,
// and weighted sums of rows.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

using Matmul = void (*)(void* const&, void* const&, void* const&, float, float);

// Calls torch's product, and lets none of its exceptions out: 0, or 1 if it failed. A reference to an at::Tensor is one
// to the pointer that it holds.
extern "C" int dp_multiply(Matmul multiply, void* left, void* right, void* result) {
  try {
    multiply(left, right, result, 0.0f, 1.0f);
    return 0;
  } catch (...) {
    return 1;
  }
}

// Of every example: the sum of R C, and of eps |R C| + |R| cols_left cols_right + rows_left rows_right |C|.
extern "C" void dp_gram_norms(
    const float* rows, const float* cols, const float* rows_left, const float* rows_right, const float* cols_left,
    const float* cols_right, int64_t batch, int64_t blocks, int64_t positions, int64_t others, float* result,
    int threads) {
  constexpr double eps = std::numeric_limits<float>::epsilon();
#pragma omp parallel for num_threads(threads) schedule(static) if (batch > 1)
  for (int64_t b = 0; b < batch; ++b) {
    double total = 0, slack = 0;
    for (int64_t i = b * blocks * positions; i < (b + 1) * blocks * positions; ++i) {
      const int64_t block = i / positions;
      const float *r = rows + i * others, *c = cols + i * others;
      const float *to_r = rows_right + block * others, *to_c = cols_right + block * others;
      float sum = 0, size = 0, by_rows = 0, by_cols = 0;
#pragma omp simd reduction(+ : sum, size, by_rows, by_cols)
      for (int64_t j = 0; j < others; ++j) {
        const float both = r[j] * c[j];
        sum += both;
        size += std::fabs(both);
        by_rows += std::fabs(r[j]) * to_c[j];
        by_cols += std::fabs(c[j]) * to_r[j];
      }
      total += sum;
      slack += eps * size + double(cols_left[i]) * by_rows + double(rows_left[i]) * by_cols;
    }
    result[b] = float(total + slack);
  }
}

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
