// What norms and sums on CPUs need besides torch's operations: its matrix product by oneDNN, sums over two Gram
// matrices, sums of squares, weighted sums of rows, and sums by an index and their norms.

#include <algorithm>
#include <cmath>
#include <cstdint>
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

// result[i, j, k] = sum over l of values[i, j, k, l]^2, in double: no square of a float is too small or large for it.
extern "C" void dp_squares(
    const float* values, const int64_t* sizes, const int64_t* strides, double* result, int threads) {
  const int64_t outer = sizes[0] * sizes[1], rows = sizes[2], length = sizes[3];
#pragma omp parallel for num_threads(threads) schedule(static) if (outer > 1)
  for (int64_t i = 0; i < outer; ++i) {
    const float* from = values + i / sizes[1] * strides[0] + i % sizes[1] * strides[1];
    double* to = result + i * rows;
    if (strides[3] == 1 || rows == 1) {
      for (int64_t k = 0; k < rows; ++k) {
        const float* row = from + k * strides[2];
        double sum = 0;
        if (strides[3] == 1) {
#pragma omp simd reduction(+ : sum)
          for (int64_t l = 0; l < length; ++l) sum += double(row[l]) * row[l];
        } else {
          for (int64_t l = 0; l < length; ++l) sum += double(row[l * strides[3]]) * row[l * strides[3]];
        }
        to[k] = sum;
      }
      continue;
    }
    std::fill(to, to + rows, 0.0);
    for (int64_t l = 0; l < length; ++l) {
      const float* column = from + l * strides[3];
      for (int64_t k = 0; k < rows; ++k) to[k] += double(column[k * strides[2]]) * column[k * strides[2]];
    }
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

static double length_of(const float* from, int64_t step, int64_t width) {
  double sum = 0;
  if (step == 1) {
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; ++i) sum += double(from[i]) * from[i];
  } else {
    for (int64_t i = 0; i < width; ++i) sum += double(from[i * step]) * from[i * step];
  }
  return std::sqrt(sum);
}

// Of every example: the sum, over the distinct numbers of its index, of |the sum of the values at their positions|^2,
// and of (the sum of their lengths)^2. Values lie at value[b * strides[0] + t * strides[1] + i * strides[2]].
extern "C" void dp_norms_by_index(
    const int64_t* index, const float* values, const int64_t* strides, int64_t batch, int64_t positions, int64_t width,
    double* result, double* sizes, int threads) {
#pragma omp parallel num_threads(threads) if (batch > 1)
  {
    std::vector<std::pair<int64_t, int64_t>> order(positions);
    std::vector<double> sum(width);
    double* const to = sum.data();
#pragma omp for schedule(static)
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t t = 0; t < positions; ++t) order[t] = {index[b * positions + t], t};
      std::sort(order.begin(), order.end());
      double total = 0, size = 0;
      for (int64_t first = 0, last; first < positions; first = last) {
        std::fill(sum.begin(), sum.end(), 0.0);
        double lengths = 0;
        for (last = first; last < positions && order[last].first == order[first].first; ++last) {
          const float* value = values + b * strides[0] + order[last].second * strides[1];
          add(to, 1.0f, value, strides[2], width);
          lengths += length_of(value, strides[2], width);
        }
        size += lengths * lengths;
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < width; ++i) total += to[i] * to[i];
      }
      result[b] = total, sizes[b] = size;
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
