// Weighted sums of per-example gradients that were kept.

#include <algorithm>
#include <cstdint>
#include <vector>

constexpr int64_t PIECE = 1024;  // columns that are worked on at once: they stay in the cache

// to[i] = sum over k of weights[k] rows[used[k]][i] of some columns, four rows at a time.
static void weighted_piece(
    const float* rows, int64_t columns, const int64_t* used, const float* weights, int64_t count, int64_t length,
    float* to) {
  std::fill(to, to + length, 0.0f);
  int64_t k = 0;
  for (; k + 4 <= count; k += 4) {
    const float *a = rows + used[k] * columns, *b = rows + used[k + 1] * columns;
    const float *c = rows + used[k + 2] * columns, *d = rows + used[k + 3] * columns;
    const float u = weights[k], v = weights[k + 1], w = weights[k + 2], x = weights[k + 3];
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) to[i] += (u * a[i] + v * b[i]) + (w * c[i] + x * d[i]);
  }
  for (; k < count; ++k) {
    const float *a = rows + used[k] * columns, u = weights[k];
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) to[i] += u * a[i];
  }
}

// Of many matrices: results[m][i] = sum over k of weights[k] matrices[m][used[k]][i], with the weights of the matrix's
// group: those from starts[group] on, up to the next group's.
extern "C" void dp_weighted_sums(
    const float* const* matrices, const int64_t* columns, const int64_t* groups, float* const* results, int64_t count,
    const int64_t* used, const float* weights, const int64_t* starts, int threads) {
  std::vector<int64_t> first(count + 1);
  for (int64_t m = 0; m < count; ++m) first[m + 1] = first[m] + (columns[m] + PIECE - 1) / PIECE;
  const int64_t pieces = first[count];
#pragma omp parallel for num_threads(threads) schedule(static) if (pieces > 8)
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t m = std::upper_bound(first.begin(), first.end(), piece) - first.begin() - 1;
    const int64_t at = (piece - first[m]) * PIECE, begin = starts[groups[m]], end = starts[groups[m] + 1];
    weighted_piece(
        matrices[m] + at, columns[m], used + begin, weights + begin, end - begin, std::min(PIECE, columns[m] - at),
        results[m] + at);
  }
}
