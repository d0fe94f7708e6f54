// Sums of squares.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

// A bfloat16 number: the upper half of a float.
struct Half16 {
  uint16_t bits;
  operator double() const {
    const uint32_t whole = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &whole, sizeof value);
    return value;
  }
};

// result[i, j, k] = sum over l of values[i, j, k, l]^2, in double: no square of a float is too small or large for it.
template <typename Number>
void sums_of_squares(
    const Number* values, const int64_t* sizes, const int64_t* strides, double* result, int threads) {
  const int64_t outer = sizes[0] * sizes[1], rows = sizes[2], length = sizes[3];
#pragma omp parallel for num_threads(threads) schedule(static) if (outer > 1)
  for (int64_t i = 0; i < outer; ++i) {
    const Number* from = values + i / sizes[1] * strides[0] + i % sizes[1] * strides[1];
    double* to = result + i * rows;
    if (strides[3] == 1 || rows == 1) {
      for (int64_t k = 0; k < rows; ++k) {
        const Number* row = from + k * strides[2];
        double sum = 0;
        if (strides[3] == 1) {
#pragma omp simd reduction(+ : sum)
          for (int64_t l = 0; l < length; ++l) sum += double(row[l]) * double(row[l]);
        } else {
          for (int64_t l = 0; l < length; ++l) sum += double(row[l * strides[3]]) * double(row[l * strides[3]]);
        }
        to[k] = sum;
      }
      continue;
    }
    std::fill(to, to + rows, 0.0);
    for (int64_t l = 0; l < length; ++l) {
      const Number* column = from + l * strides[3];
      for (int64_t k = 0; k < rows; ++k) to[k] += double(column[k * strides[2]]) * double(column[k * strides[2]]);
    }
  }
}

extern "C" void dp_squares(
    const void* values, bool narrow, const int64_t* sizes, const int64_t* strides, double* result, int threads) {
  if (narrow)
    sums_of_squares(static_cast<const Half16*>(values), sizes, strides, result, threads);
  else
    sums_of_squares(static_cast<const float*>(values), sizes, strides, result, threads);
}

// The same of many float matrices, each of batch rows: result [count, batch]. A matrix has its row and column strides and
// the length of a row in three places of shapes.
extern "C" void dp_squares_of_vectors(
    const float* const* matrices, const int64_t* shapes, int64_t count, int64_t batch, double* result, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (count > 1)
  for (int64_t k = 0; k < count; ++k) {
    const int64_t sizes[4] = {1, 1, batch, shapes[3 * k + 2]}, strides[4] = {0, 0, shapes[3 * k], shapes[3 * k + 1]};
    sums_of_squares(matrices[k], sizes, strides, result + k * batch, 1);
  }
}

// result[b] = sum over k of (sum over t of |rows[b, k, t]| |columns[b, k, t]|)^2. Each side has its sizes, [b, k, t, n], and
// its strides.
extern "C" void dp_squared_sizes(
    const void* rows, bool narrow_rows, const int64_t* row_sizes, const int64_t* row_strides, const void* columns,
    bool narrow_columns, const int64_t* column_sizes, const int64_t* column_strides, double* result, int threads) {
  const int64_t batch = row_sizes[0], blocks = row_sizes[1], positions = row_sizes[2];
  std::vector<double> left(batch * blocks * positions), right(left.size());
  dp_squares(rows, narrow_rows, row_sizes, row_strides, left.data(), threads);
  dp_squares(columns, narrow_columns, column_sizes, column_strides, right.data(), threads);
  for (int64_t b = 0, at = 0; b < batch; ++b) {
    result[b] = 0;
    for (int64_t k = 0; k < blocks; ++k) {
      double size = 0;
      for (int64_t t = 0; t < positions; ++t, ++at) size += std::sqrt(left[at]) * std::sqrt(right[at]);
      result[b] += size * size;
    }
  }
}

// Squared norms that may be off by slack, or, where that is null, of gradients that may be off by moved of their size: what
// that comes to is added where the size is finite, else the norm is otherwise, and the floor. again[b]: it is more than
// close of the squared norm. How many there are.
extern "C" int64_t dp_settled_norms(
    const double* squared, const double* slack, const double* sizes, const double* otherwise, int64_t batch,
    double moved, double close, double floor, double* result, bool* again) {
  int64_t count = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const bool known = std::isfinite(sizes[b]);
    const double size = moved * std::sqrt(sizes[b]);
    const double off = slack ? slack[b] : size * (2 * std::sqrt(squared[b]) + size);
    again[b] = known && !(off <= close * squared[b] && std::isfinite(squared[b]));
    count += again[b];
    result[b] = (known ? squared[b] + off : otherwise[b]) + floor * sizes[b];
  }
  return count;
}

// dp_settled_norms of kept float gradients, [batch, width] each one after the other, that are sums over the positions of
// these sides.
extern "C" int64_t dp_kept_norms(
    const float* gradients, int64_t width, const void* rows, bool narrow_rows, const int64_t* row_sizes,
    const int64_t* row_strides, const void* columns, bool narrow_columns, const int64_t* column_sizes,
    const int64_t* column_strides, double moved, double close, double floor, double* result, bool* again,
    int threads) {
  const int64_t batch = row_sizes[0], sizes[4] = {batch, 1, 1, width}, strides[4] = {width, 0, 0, 1};
  std::vector<double> squared(batch), spread(batch);
  sums_of_squares(gradients, sizes, strides, squared.data(), threads);
  dp_squared_sizes(
      rows, narrow_rows, row_sizes, row_strides, columns, narrow_columns, column_sizes, column_strides, spread.data(),
      threads);
  return dp_settled_norms(
      squared.data(), nullptr, spread.data(), squared.data(), batch, moved, close, floor, result, again);
}
