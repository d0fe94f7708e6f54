// Sums of values by an index, their norms, and their weighted sum over examples.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

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
// and of (the sum of their lengths)^2. Values lie at value[b * strides[0] + t * strides[1] + i * strides[2]]. Those of the
// index left_out are not read.
extern "C" void dp_norms_by_index(
    const int64_t* index, const float* values, const int64_t* strides, int64_t batch, int64_t positions, int64_t width,
    int64_t left_out, double* result, double* sizes, int threads) {
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
          if (order[last].first == left_out) continue;
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
// whether an index is neither that of a row nor left_out; its value is not read.
extern "C" int dp_sums_by_index(
    const int64_t* index, const float* values, const int64_t* strides, const float* weights, int64_t batch,
    int64_t positions, int64_t width, int64_t rows, int64_t left_out, float* result, int threads) {
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
          outside |= r != left_out;
          continue;
        }
        if ((r & (parts - 1)) != part) continue;
        add(result + r * width, weight, values + b * strides[0] + t * strides[1], strides[2], width);
      }
    }
  }
  return outside;
}
