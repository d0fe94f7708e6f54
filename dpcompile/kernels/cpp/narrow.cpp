// Products of bfloat16 or float16 matrices, exact in float32 and added up there, by torch's block product (oneDNN's).

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace narrow {

using Block = void (*)(
    int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const void* a, const void* b,
    float* c, bool in_pairs);
using Release = void (*)(bool in_pairs);

constexpr int64_t ROWS = 64, COLUMNS = 128;  // of a block of the result
constexpr int64_t PACKED = 1 << 17;          // pairs of the right side that are laid out at a time: they stay in the cache

// One terms x width part of a matrix as pairs of terms: to[t / 2, j] = (from[t, j], from[t + 1, j]), with 0 behind an odd
// last one.
void in_pairs(const uint16_t* from, int64_t step, int64_t across, int64_t terms, int64_t width, uint32_t* to) {
  for (int64_t t = 0; t < terms; t += 2, to += width) {
    const uint16_t *even = from + t * step, *odd = even + step;
    if (t + 1 == terms) {
      for (int64_t j = 0; j < width; ++j) to[j] = even[j * across];
    } else if (across == 1) {
      for (int64_t j = 0; j < width; ++j) to[j] = uint32_t(even[j]) | uint32_t(odd[j]) << 16;
    } else {
      for (int64_t j = 0; j < width; ++j) to[j] = uint32_t(even[j * across]) | uint32_t(odd[j * across]) << 16;
    }
  }
}

#if defined(__AVX512F__)
void transpose_tile(const uint32_t* from, int64_t from_step, uint32_t* to, int64_t to_step) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(from + i * from_step);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {  // a[4 q + i]: rows 4 q .. 4 q + 3 of columns i, i + 4, i + 8, i + 12
    b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
    b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_si512(to + i * to_step, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
    _mm512_storeu_si512(to + (i + 4) * to_step, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88));
    _mm512_storeu_si512(to + (i + 8) * to_step, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
    _mm512_storeu_si512(to + (i + 12) * to_step, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd));
  }
}
#endif

void transpose(const uint32_t* from, int64_t rows, int64_t columns, uint32_t* to) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= rows; i += 16) {
    int64_t j = 0;
    for (; j + 16 <= columns; j += 16) transpose_tile(from + i * columns + j, columns, to + j * rows + i, rows);
    for (; j < columns; ++j)
      for (int k = 0; k < 16; ++k) to[j * rows + i + k] = from[(i + k) * columns + j];
  }
#endif
  for (; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) to[j * rows + i] = from[i * columns + j];
}

double squares(const float* from, int64_t step, int64_t rows, int64_t columns) {
  double total = 0;
  for (int64_t i = 0; i < rows; ++i, from += step) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < columns; ++j) sum += double(from[j]) * from[j];
    total += sum;
  }
  return total;
}

}  // namespace narrow

// result[b] = left[b]^T right[b], contiguous, and its squared norm: left [B, T, P], right [B, T, D], of any strides.
// Whether that worked: 0, or 1 where torch's block product threw.
extern "C" int dp_narrow(
    narrow::Block block, narrow::Release release, const uint16_t* left, const uint16_t* right, const int64_t* sizes,
    const int64_t* left_strides, const int64_t* right_strides, float* result, double* norms, int threads) {
  using namespace narrow;
  const int64_t batch = sizes[0], terms = sizes[1], p = sizes[2], d = sizes[3], half = (terms + 1) / 2;
  const int64_t most = std::max(COLUMNS, PACKED / half / COLUMNS * COLUMNS);
  const int64_t wide = std::min(most, (d + COLUMNS - 1) / COLUMNS * COLUMNS), chunks = (d + wide - 1) / wide;
  const int64_t blocks = (p + ROWS - 1) / ROWS;
  const int64_t pieces = std::min(blocks, std::max<int64_t>(1, threads / (batch * chunks)));
  const int64_t each = (blocks + pieces - 1) / pieces * ROWS;
  std::vector<double> sums(batch * chunks * pieces);
  std::atomic<int> failed{0};
#pragma omp parallel num_threads(threads)
  {
    std::vector<uint32_t> packed, pairs, turned;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < int64_t(sums.size()); ++task) {
      if (failed) continue;
      const int64_t b = task / (chunks * pieces), start = task / pieces % chunks * wide;
      const int64_t end = std::min(d, start + wide), top = task % pieces * each, bottom = std::min(p, top + each);
      try {
        packed.resize(half * wide);
        pairs.resize(half * ROWS);
        turned.resize(half * ROWS);
        const uint16_t *rows = left + b * left_strides[0], *columns = right + b * right_strides[0];
        for (int64_t j = start; j < end; j += COLUMNS)
          in_pairs(
              columns + j * right_strides[2], right_strides[1], right_strides[2], terms, std::min(COLUMNS, end - j),
              packed.data() + (j - start) * half);
        for (int64_t i = top; i < bottom; i += ROWS) {
          const int64_t m = std::min(ROWS, bottom - i);
          in_pairs(rows + i * left_strides[2], left_strides[1], left_strides[2], terms, m, pairs.data());
          transpose(pairs.data(), half, m, turned.data());
          for (int64_t j = start; j < end; j += COLUMNS) {
            const int64_t n = std::min(COLUMNS, end - j);
            float* to = result + (b * p + i) * d + j;
            block(m, n, 2 * half, 2 * half, n, d, false, turned.data(), packed.data() + (j - start) * half, to, true);
            sums[task] += squares(to, d, m, n);
          }
        }
      } catch (...) {
        failed = 1;
      }
    }
    try {
      release(true);
    } catch (...) {
      failed = 1;
    }
  }
  for (int64_t b = 0; b < batch; ++b) {
    norms[b] = 0;
    for (int64_t k = 0; k < chunks * pieces; ++k) norms[b] += sums[b * chunks * pieces + k];
  }
  return failed;
}
