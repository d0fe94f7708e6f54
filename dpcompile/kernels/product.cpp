// What norms and sums on CPUs need besides torch's operations: its matrix product by oneDNN, sums over two Gram matrices,
// weighted sums of rows, and sums by an index and their norms.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

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

template <typename Sum>
static void add(Sum* to, float weight, const float* from, int64_t step, int64_t width) {
  if (step == 1) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) to[i] += weight * from[i];
  } else {
    for (int64_t i = 0; i < width; ++i) to[i] += weight * from[i * step];
  }
}

// Of every example: the sum, over the distinct numbers of its index, of |the sum of the values at their positions|^2.
// Values lie at value[b * strides[0] + t * strides[1] + i * strides[2]].
extern "C" void dp_norms_by_index(
    const int64_t* index, const float* values, const int64_t* strides, int64_t batch, int64_t positions, int64_t width,
    float* result, int threads) {
#pragma omp parallel num_threads(threads) if (batch > 1)
  {
    std::vector<std::pair<int64_t, int64_t>> order(positions);
    std::vector<double> sum(width);
    double* const to = sum.data();
#pragma omp for schedule(static)
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t t = 0; t < positions; ++t) order[t] = {index[b * positions + t], t};
      std::sort(order.begin(), order.end());
      double total = 0;
      for (int64_t first = 0, last; first < positions; first = last) {
        std::fill(sum.begin(), sum.end(), 0.0);
        for (last = first; last < positions && order[last].first == order[first].first; ++last) {
          add(to, 1.0f, values + b * strides[0] + order[last].second * strides[1], strides[2], width);
        }
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < width; ++i) total += to[i] * to[i];
      }
      result[b] = float(total);
    }
  }
}

// result[r] = sum, over the examples of weight other than 0 and their positions of index r, of weight x value. Values lie
// as above. Every part of the rows has a thread of its own: nothing is written by two, and sums have one order. Returns
// whether an index is not that of a row; its value is left out.
extern "C" int dp_sums_by_index(
    const int64_t* index, const float* values, const int64_t* strides, const float* weights, int64_t batch,
    int64_t positions, int64_t width, int64_t rows, float* result, int threads) {
  int64_t parts = 1;
  while (parts < threads) parts *= 2;
  int outside = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : outside)
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t r = part; r < rows; r += parts) std::fill(result + r * width, result + (r + 1) * width, 0.0f);
    for (int64_t b = 0; b < batch; ++b) {
      const float weight = weights[b];
      if (weight == 0) continue;
      for (int64_t t = 0; t < positions; ++t) {
        const int64_t r = index[b * positions + t];
        if (r < 0 || r >= rows) {
          outside = 1;
          continue;
        }
        if ((r & (parts - 1)) != part) continue;
        add(result + r * width, weight, values + b * strides[0] + t * strides[1], strides[2], width);
      }
    }
  }
  return outside;
}
