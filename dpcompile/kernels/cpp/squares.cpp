// Sums of squares.

#include <algorithm>
#include <cstdint>
#include <cstring>

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
