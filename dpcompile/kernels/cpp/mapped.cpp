// Norms of gradients behind a linear function that works row by row: dpcompile/kernels/mapped_products.py has the sums.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

static const int64_t kRows = 256;  // of a parameter that are worked on at once
static const int64_t kBases = 9;   // at most, the row of ones among them

static double inner_product(const float* a, const float* b, int64_t width) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < width; ++i) sum += double(a[i]) * double(b[i]);
  return sum;
}

static double sum_of(const float* a, int64_t width) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < width; ++i) sum += double(a[i]);
  return sum;
}

// inner[j, l, o] = <w_j, w_l> of row o, where w_0 is a row of ones and the others are bases [p, width].
extern "C" void dp_rows_inner(
    const float* const* bases, int64_t count, int64_t p, int64_t width, double* inner, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (p * width > 65536)
  for (int64_t o = 0; o < p; ++o) {
    inner[o] = double(width);
    for (int64_t j = 1; j < count; ++j) {
      const float* a = bases[j - 1] + o * width;
      inner[j * p + o] = inner[j * count * p + o] = sum_of(a, width);
      for (int64_t l = 1; l <= j; ++l)
        inner[(j * count + l) * p + o] = inner[(l * count + j) * p + o] =
            inner_product(a, bases[l - 1] + o * width, width);
    }
  }
}

// Of every row: M = 2 s C + C^T G C and the sum of its absolute terms, |w_j|, and by how much the row may become longer:
// by the bases without their means. All but scale and longer, [p], and lengths, [count, p], are [count, count, p].
extern "C" void dp_mapped_form(
    const double* scale, const double* mixed, const double* inner, int64_t count, int64_t p, double* form,
    double* size, double* lengths, double* longer, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (p * count > 4096)
  for (int64_t o = 0; o < p; ++o) {
    const auto at = [=](int64_t j, int64_t l) { return (j * count + l) * p + o; };
    double length[kBases], mean[kBases], rest[kBases], centred[kBases][kBases];
    for (int64_t j = 0; j < count; ++j) {
      const double square = inner[at(j, j)];
      length[j] = lengths[j * p + o] = std::sqrt(square);
      mean[j] = inner[at(0, j)] / inner[o];
      rest[j] = j ? std::sqrt(std::max(square - inner[o] * mean[j] * mean[j], 0.0) + 1e-9 * square) : length[j];
      for (int64_t l = 0; l < count; ++l) centred[j][l] = mixed[at(j, l)];
    }
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t l = 0; l < count; ++l) {
        double value = 2 * scale[o] * mixed[at(j, l)], most = std::fabs(value);
        for (int64_t m = 0; m < count; ++m) {
          for (int64_t n = 0; n < count; ++n) {
            const double left = mixed[at(m, j)], right = mixed[at(n, l)];
            value += left * inner[at(m, n)] * right;
            most += std::fabs(left * right) * length[m] * length[n];
          }
        }
        form[at(j, l)] = value, size[at(j, l)] = most;
      }
    }
    for (int64_t j = 0; j < count; ++j)
      for (int64_t l = 1; l < count; ++l) centred[0][j] += centred[l][j] * mean[l];
    for (int64_t j = 0; j < count; ++j)
      for (int64_t l = 1; l < count; ++l) centred[j][0] += centred[j][l] * mean[l];
    double total = std::fabs(scale[o]);
    for (int64_t j = 0; j < count; ++j)
      for (int64_t l = 0; l < count; ++l) total += std::fabs(centred[j][l]) * rest[j] * rest[l];
    longer[o] = total;
  }
}

// Of every example and block of rows: the sum over rows of a^T M a, and how far it may be off; a_j = <w_j, g>. Of rows
// [batch, positions, p], seen [count - 1, batch, positions, p], ones and lengths [batch, positions] (sums and lengths of
// columns), form and size M and its absolute terms [count, count, p], long_rows |w_j| [count, p].
extern "C" void dp_mapped_sums(
    const float* rows, const float* seen, const double* ones, const double* lengths, const double* form,
    const double* size, const double* long_rows, int64_t batch, int64_t positions, int64_t p, int64_t count,
    double unit, double wide, double lost, double* result, double* slack, int threads) {
  const int64_t blocks = (p + kRows - 1) / kRows;
#pragma omp parallel num_threads(threads) if (batch * blocks > 1)
  {
    std::vector<double> memory((2 * count + 2) * kRows);
    double* const a = memory.data();
    double* const off = a + count * kRows;
    double* const spread = off + count * kRows;
    double* const plain = spread + kRows;
#pragma omp for schedule(static)
    for (int64_t place = 0; place < batch * blocks; ++place) {
      const int64_t b = place / blocks, first = place % blocks * kRows, n = std::min(kRows, p - first);
      std::fill(memory.begin(), memory.end(), 0.0);
      for (int64_t t = 0; t < positions; ++t) {
        const int64_t at = b * positions + t;
        const float* row = rows + at * p + first;
        const double one = ones[at], length = lengths[at];
#pragma omp simd
        for (int64_t o = 0; o < n; ++o) {
          const double value = row[o], absolute = std::fabs(value);
          a[o] += value * one;
          spread[o] += absolute * length;
          plain[o] += absolute;
        }
        for (int64_t j = 1; j < count; ++j) {
          const float* product = seen + ((j - 1) * batch * positions + at) * p + first;
          double* const to = a + j * kRows;
#pragma omp simd
          for (int64_t o = 0; o < n; ++o) to[o] += double(row[o]) * double(product[o]);
        }
      }
      for (int64_t j = 0; j < count; ++j) {
        const double* length = long_rows + j * p + first;
        const double of_product = (j ? unit : 0.0) + wide, vanished = j ? lost : 0.0;
#pragma omp simd
        for (int64_t o = 0; o < n; ++o)
          off[j * kRows + o] = of_product * length[o] * spread[o] + vanished * plain[o];
      }
      double total = 0, moved = 0;
      for (int64_t j = 0; j < count; ++j) {
        for (int64_t l = 0; l < count; ++l) {
          const double* own = form + (j * count + l) * p + first;
          const double* most = size + (j * count + l) * p + first;
          const double *x = a + j * kRows, *y = a + l * kRows, *dx = off + j * kRows, *dy = off + l * kRows;
#pragma omp simd reduction(+ : total, moved)
          for (int64_t o = 0; o < n; ++o) {
            const double ax = std::fabs(x[o]), ay = std::fabs(y[o]), rounded = wide * most[o];
            total += own[o] * x[o] * y[o];
            moved += (std::fabs(own[o]) + rounded) * (ax * dy[o] + dx[o] * (ay + dy[o])) + rounded * ax * ay;
          }
        }
      }
      result[place] = total;
      slack[place] = moved;
    }
  }
}
