// All steps of a recurrent layer, and of its backward. A thread takes some examples through all steps; the matrix is
// laid out once, in panels that are read in one piece, and what an example's step needs stays in the cache.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__)
constexpr int64_t LANES = 16, VECTORS = 2;
#elif defined(__AVX2__)
constexpr int64_t LANES = 8, VECTORS = 1;
#else
constexpr int64_t LANES = 4, VECTORS = 2;
#endif
constexpr int64_t COLS = LANES * VECTORS;
constexpr int64_t ROWS = 8;    // of a product that stays in registers
constexpr int64_t MOST = 32;   // examples that a thread takes along: the matrix is read once for all of them

typedef float Vector __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

enum Kind : int64_t { LSTM, GRU, TANH, RELU };

struct Sizes {
  int64_t kind, steps, batch, hidden, reverse;
};

namespace {

int64_t padded(int64_t length) { return (length + COLS - 1) / COLS * COLS; }

int64_t gates_of(const Sizes& s) { return (s.kind == LSTM ? 4 : s.kind == GRU ? 3 : 1) * s.hidden; }
int64_t saved_of(const Sizes& s) { return (s.kind == LSTM ? 5 : s.kind == GRU ? 4 : 1) * s.hidden; }

// [rows, cols] at `from[row * down + col * right]`, as panels of COLS columns, zeros behind the last.
std::vector<float> panels(const float* from, int64_t rows, int64_t cols, int64_t down, int64_t right) {
  std::vector<float> result(padded(cols) * rows);
  for (int64_t c = 0; c < cols; ++c)
    for (int64_t r = 0; r < rows; ++r)
      result[(c / COLS * rows + r) * COLS + c % COLS] = from[r * down + c * right];
  return result;
}

// result[r][c] = start[c] + sum over k of left[r][k] * panel[k][c].
template <int64_t R>
void multiply_rows(
    const float* left, int64_t left_row, const float* panel, int64_t length, const float* start, float* result,
    int64_t result_row) {
  Vector sum[R][VECTORS];
#pragma GCC unroll 8
  for (int64_t r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int64_t v = 0; v < VECTORS; ++v) sum[r][v] = *(const Vector*)(start + v * LANES);
  for (int64_t k = 0; k < length; ++k, panel += COLS) {
    Vector column[VECTORS];
#pragma GCC unroll 4
    for (int64_t v = 0; v < VECTORS; ++v) column[v] = *(const Vector*)(panel + v * LANES);
#pragma GCC unroll 8
    for (int64_t r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int64_t v = 0; v < VECTORS; ++v) sum[r][v] += left[r * left_row + k] * column[v];
  }
#pragma GCC unroll 8
  for (int64_t r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int64_t v = 0; v < VECTORS; ++v) *(Vector*)(result + r * result_row + v * LANES) = sum[r][v];
}

// [rows, length] times a matrix in panels, onto `start`: [rows, padded(cols)]. A row's sum has the same order in all.
void multiply(
    const float* left, int64_t rows, int64_t length, const std::vector<float>& matrix, int64_t cols, const float* start,
    float* result) {
  const int64_t row = padded(cols);
  for (int64_t c = 0; c < row; c += COLS) {
    const float* panel = matrix.data() + c * length;
    int64_t r = 0;
    for (; r + ROWS <= rows; r += ROWS)
      multiply_rows<ROWS>(left + r * length, length, panel, length, start + c, result + r * row + c, row);
    for (; r + 4 <= rows; r += 4)
      multiply_rows<4>(left + r * length, length, panel, length, start + c, result + r * row + c, row);
    for (; r < rows; ++r)
      multiply_rows<1>(left + r * length, length, panel, length, start + c, result + r * row + c, row);
  }
}

// LANES numbers, or the last few with zeros behind them.
inline Vector load(const float* from, int64_t count) {
  if (count >= LANES) return *(const Vector*)from;
  Vector result = {};
  std::memcpy(&result, from, count * sizeof(float));
  return result;
}

inline void store(float* to, int64_t count, Vector value) {
  if (count >= LANES)
    *(Vector*)to = value;
  else
    std::memcpy(to, &value, count * sizeof(float));
}

// To one or two units in the last place, between the numbers where float32 ends; NaN stays NaN.
inline Vector exponential(Vector x) {
  const Vector zero = {}, bounded = x > 88.0f ? zero + 88.0f : x < -87.0f ? zero - 87.0f : x;
  const Vector number = bounded == bounded ? bounded : zero;
  const Ints whole = __builtin_convertvector(number * 1.44269504f + (number < 0.0f ? zero - 0.5f : zero + 0.5f), Ints);
  const Vector count = __builtin_convertvector(whole, Vector);
  const Vector rest = (number - count * 0.693359375f) + count * 2.12194440e-4f;
  Vector sum = rest * 1.9875691500e-4f + 1.3981999507e-3f;
  sum = sum * rest + 8.3334519073e-3f;
  sum = sum * rest + 4.1665795894e-2f;
  sum = sum * rest + 1.6666665459e-1f;
  sum = sum * rest + 5.0000001201e-1f;
  sum = sum * rest * rest + rest + 1.0f;
  return x == x ? sum * (Vector)((whole + 127) << 23) : x;
}

inline Vector sigmoid(Vector x) { return 1.0f / (1.0f + exponential(-x)); }

inline Vector hyperbolic(Vector x) {
  const Vector zero = {}, square = x * x, size = x < 0.0f ? -x : x;
  Vector sum = square * -5.70498872745e-3f + 2.06390887954e-2f;
  sum = sum * square - 5.37397155531e-2f;
  sum = sum * square + 1.33314422036e-1f;
  sum = sum * square - 3.33332819422e-1f;
  const Vector near = sum * square * x + x, far = 1.0f - 2.0f / (exponential(2.0f * size) + 1.0f);
  return size < 0.625f ? near : x < 0.0f ? zero - far : x == x ? far : x;
}

// One example's step. `x`: what the layer's inputs give; `p`: what its state gives.
void step(const Sizes& s, const float* x, const float* p, float* h, float* c, float* saved) {
  const int64_t n = s.hidden;
  for (int64_t j = 0; j < n; j += LANES) {
    const int64_t left = n - j;
    const auto gate = [&](int64_t g) { return load(x + g * n + j, left) + load(p + g * n + j, left); };
    const auto keep = [&](int64_t g, Vector value) { store(saved + g * n + j, left, value); };
    if (s.kind == LSTM) {
      const Vector i = sigmoid(gate(0)), f = sigmoid(gate(1)), g = hyperbolic(gate(2)), o = sigmoid(gate(3));
      const Vector before = load(c + j, left), cell = f * before + i * g;
      keep(0, i), keep(1, f), keep(2, g), keep(3, o), keep(4, before);
      store(c + j, left, cell), store(h + j, left, o * hyperbolic(cell));
    } else if (s.kind == GRU) {
      const Vector r = sigmoid(gate(0)), z = sigmoid(gate(1)), q = load(p + 2 * n + j, left);
      const Vector m = hyperbolic(load(x + 2 * n + j, left) + r * q);
      keep(0, r), keep(1, z), keep(2, m), keep(3, q);
      store(h + j, left, m + z * (load(h + j, left) - m));
    } else {
      const Vector sum = gate(0), zero = {};
      const Vector own = s.kind == TANH ? hyperbolic(sum) : sum < 0.0f ? zero : sum;
      keep(0, own), store(h + j, left, own);
    }
  }
}

// One example's step back. `h`, `c`: cotangents of the state behind the step, and then of that before it, but for what
// comes through the product. `x`: the cotangent of what the inputs give; `p`: of what the state gives.
void step_back(
    const Sizes& s, const float* saved, const float* previous, const float* cotangent, float* h, float* c, float* x,
    float* p) {
  const int64_t n = s.hidden;
  const Vector zero = {};
  for (int64_t j = 0; j < n; j += LANES) {
    const int64_t left = n - j;
    const auto kept = [&](int64_t g) { return load(saved + g * n + j, left); };
    const auto slope = [&](int64_t g, Vector value) {
      store(x + g * n + j, left, value), store(p + g * n + j, left, value);
    };
    const Vector own = load(h + j, left) + load(cotangent + j, left);
    if (s.kind == LSTM) {
      const Vector i = kept(0), f = kept(1), g = kept(2), o = kept(3), before = kept(4);
      const Vector t = hyperbolic(f * before + i * g), d = load(c + j, left) + own * o * (1.0f - t * t);
      slope(0, d * g * i * (1.0f - i)), slope(1, d * before * f * (1.0f - f)), slope(2, d * i * (1.0f - g * g));
      slope(3, own * t * o * (1.0f - o));
      store(c + j, left, d * f), store(h + j, left, zero);
    } else if (s.kind == GRU) {
      const Vector r = kept(0), z = kept(1), m = kept(2), q = kept(3);
      const Vector d = own * (1.0f - z) * (1.0f - m * m);
      slope(0, d * q * r * (1.0f - r)), slope(1, own * (load(previous + j, left) - m) * z * (1.0f - z));
      store(x + 2 * n + j, left, d), store(p + 2 * n + j, left, d * r), store(h + j, left, own * z);
    } else {
      const Vector value = kept(0);
      const Vector along = s.kind == TANH ? 1.0f - value * value : value > 0.0f ? zero + 1.0f : value * 0.0f;
      slope(0, own * along), store(h + j, left, zero);
    }
  }
}

int64_t examples_of_a_task(const Sizes& s, int threads) {
  const int64_t each = (s.batch + threads - 1) / threads, whole = (each + ROWS - 1) / ROWS * ROWS;
  return std::max<int64_t>(1, std::min({whole, MOST, s.batch}));
}

}  // namespace

// inputs: [steps, batch, gates]; state: [1 or 2, batch, hidden]; matrix: [gates, hidden]; bias: [gates] or none; inside:
// [steps, batch] or none: where it is false an example's state stays and its output is 0. outputs: [steps, batch,
// hidden]; last: as state; saved: [steps, batch, saved_of].
extern "C" void dp_recurrence(
    const float* inputs, const float* state, const float* matrix, const float* bias, const bool* inside,
    const Sizes* sizes, float* outputs, float* last, float* saved, int threads) {
  const Sizes& s = *sizes;
  const int64_t n = s.hidden, gates = gates_of(s), room = padded(gates), kept = saved_of(s);
  const std::vector<float> weights = panels(matrix, n, gates, 1, n);
  std::vector<float> start(room);
  if (bias) std::copy(bias, bias + gates, start.begin());
  const int64_t most = examples_of_a_task(s, threads), cells = s.kind == LSTM ? s.batch * n : 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t first = 0; first < s.batch; first += most) {
    const int64_t rows = std::min(most, s.batch - first);
    std::vector<float> h(state + first * n, state + (first + rows) * n), c(rows * n), products(rows * room);
    if (cells) std::copy(state + cells + first * n, state + cells + (first + rows) * n, c.begin());
    for (int64_t k = 0; k < s.steps; ++k) {
      const int64_t t = s.reverse ? s.steps - 1 - k : k;
      multiply(h.data(), rows, n, weights, gates, start.data(), products.data());
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = t * s.batch + first + r;
        float *own = h.data() + r * n, *output = outputs + at * n;
        if (inside && !inside[at]) {
          std::fill(output, output + n, 0.0f), std::fill(saved + at * kept, saved + (at + 1) * kept, 0.0f);
          continue;
        }
        step(s, inputs + at * gates, products.data() + r * room, own, c.data() + r * n, saved + at * kept);
        std::copy(own, own + n, output);
      }
    }
    std::copy(h.begin(), h.end(), last + first * n);
    if (cells) std::copy(c.begin(), c.end(), last + cells + first * n);
  }
}

// cotangent: of the outputs; of_last: of the last state; previous: [steps, batch, hidden], the state before each step.
// of_inputs, of_state: the gradients.
extern "C" void dp_recurrence_backward(
    const float* cotangent, const float* of_last, const float* previous, const float* saved, const float* matrix,
    const bool* inside, const Sizes* sizes, float* of_inputs, float* of_state, int threads) {
  const Sizes& s = *sizes;
  const int64_t n = s.hidden, gates = gates_of(s), room = padded(n), kept = saved_of(s);
  const std::vector<float> weights = panels(matrix, gates, n, n, 1), start(room);
  const int64_t most = examples_of_a_task(s, threads), cells = s.kind == LSTM ? s.batch * n : 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t first = 0; first < s.batch; first += most) {
    const int64_t rows = std::min(most, s.batch - first);
    std::vector<float> h(of_last + first * n, of_last + (first + rows) * n), c(rows * n);
    std::vector<float> products(rows * gates), back(rows * room);
    if (cells) std::copy(of_last + cells + first * n, of_last + cells + (first + rows) * n, c.begin());
    for (int64_t k = s.steps; k-- > 0;) {
      const int64_t t = s.reverse ? s.steps - 1 - k : k;
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = t * s.batch + first + r;
        float *own = h.data() + r * n, *x = of_inputs + at * gates, *p = products.data() + r * gates;
        if (inside && !inside[at]) {
          std::fill(x, x + gates, 0.0f), std::fill(p, p + gates, 0.0f);
          continue;
        }
        step_back(s, saved + at * kept, previous + at * n, cotangent + at * n, own, c.data() + r * n, x, p);
      }
      multiply(products.data(), rows, gates, weights, n, start.data(), back.data());
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = 0; j < n; ++j) h[r * n + j] += back[r * room + j];
    }
    std::copy(h.begin(), h.end(), of_state + first * n);
    if (cells) std::copy(c.begin(), c.end(), of_state + cells + first * n);
  }
}
