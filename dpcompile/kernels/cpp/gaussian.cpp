// The noise of noise/normal.py, added in one pass over memory; with it the division, and Adam's update.
//
// The same numbers as noise.py: its counters, Philox4x32-10, 53 bits for each uniform, Box-Muller in double. Every
// operation is one of IEEE 754, a fused multiply-add only where it is written, so that a value depends neither on the
// width of vectors, the compiler or the number of threads, nor on where a span begins. To be compiled without
// -ffast-math and without contraction.
//
// Sources: Salmon et al. 2011 (Philox); Box and Muller 1958; Cody and Waite 1980 (reduction of the angle);
// minimax coefficients by Remez exchange.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__) && defined(__AVX512DQ__)
constexpr int LANES = 8;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int LANES = 4;
#else
constexpr int LANES = 2;
#endif
constexpr int GROUPS = 32;  // vectors in a stage, a multiple of 4: its buffers stay in the first-level cache
constexpr int64_t CHUNK = 1 << 14;  // elements per task; even

typedef uint64_t Bits __attribute__((vector_size(8 * LANES)));
typedef int64_t Mask __attribute__((vector_size(8 * LANES)));
typedef double Reals __attribute__((vector_size(8 * LANES)));
typedef float Floats __attribute__((vector_size(4 * LANES)));

inline Bits bits(Reals x) { return (Bits)x; }
inline Reals reals(Bits x) { return (Reals)x; }

#if defined(__AVX512F__) && defined(__AVX512DQ__)
inline Bits multiply(Bits a, Bits b) { return (Bits)_mm512_mul_epu32((__m512i)a, (__m512i)b); }
inline Bits exclusive_or(Bits a, Bits b, Bits c) {
  return (Bits)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
}
inline Reals fma(Reals a, Reals b, Reals c) { return (Reals)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c); }
inline Reals root(Reals a) { return (Reals)_mm512_sqrt_pd((__m512d)a); }
inline Reals real(Bits a) { return __builtin_convertvector((Mask)a, Reals); }
#else
inline Bits exclusive_or(Bits a, Bits b, Bits c) { return a ^ b ^ c; }
#if defined(__AVX2__) && defined(__FMA__)
inline Bits multiply(Bits a, Bits b) { return (Bits)_mm256_mul_epu32((__m256i)a, (__m256i)b); }
inline Reals fma(Reals a, Reals b, Reals c) { return (Reals)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c); }
inline Reals root(Reals a) { return (Reals)_mm256_sqrt_pd((__m256d)a); }
#else
inline Bits multiply(Bits a, Bits b) { return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu); }
inline Reals fma(Reals a, Reals b, Reals c) {
  Reals out;
  for (int i = 0; i < LANES; ++i) out[i] = std::fma(a[i], b[i], c[i]);
  return out;
}
inline Reals root(Reals a) {
  Reals out;
  for (int i = 0; i < LANES; ++i) out[i] = std::sqrt(a[i]);
  return out;
}
#endif
// Integers up to 2**53, exactly: high and low word put into the mantissas of 2**84 and 2**52.
inline Reals real(Bits a) {
  const Reals high = reals((a >> 32) | 0x4530000000000000u), low = reals((a & 0xFFFFFFFFu) | 0x4330000000000000u);
  return (high - 0x1.00000001p84) + low;
}
#endif
inline Bits where_odd(Bits n, Bits a, Bits b) { return (Mask)(n << 63) < 0 ? a : b; }
inline Bits fill(uint64_t x, Bits) { return x + Bits{}; }
inline Reals fill(double x, Reals) { return x - Reals{}; }

// Two of a kind, operated on side by side: the processor finds independent work next to each operation.
template <class T>
struct Two {
  T a, b;
};
#define UNARY(name) \
  template <class T> \
  inline auto name(Two<T> x) { return Two<decltype(name(x.a))>{name(x.a), name(x.b)}; }
#define OPERATOR(op) \
  template <class T> \
  inline Two<T> operator op(Two<T> x, Two<T> y) { return {x.a op y.a, x.b op y.b}; } \
  template <class T, class S> \
  inline Two<T> operator op(Two<T> x, S y) { return {x.a op y, x.b op y}; }
#define TERNARY(name) \
  template <class T> \
  inline Two<T> name(Two<T> x, Two<T> y, Two<T> z) { return {name(x.a, y.a, z.a), name(x.b, y.b, z.b)}; }
UNARY(bits) UNARY(reals) UNARY(root) UNARY(real)
OPERATOR(+) OPERATOR(-) OPERATOR(*) OPERATOR(/) OPERATOR(^) OPERATOR(&) OPERATOR(|) OPERATOR(<<) OPERATOR(>>)
TERNARY(exclusive_or) TERNARY(fma) TERNARY(where_odd)
template <class T> inline Two<T> multiply(Two<T> x, Two<T> y) { return {multiply(x.a, y.a), multiply(x.b, y.b)}; }
template <class S, class T> inline Two<T> fill(S x, Two<T> like) { return {fill(x, like.a), fill(x, like.b)}; }

struct Job {
  uint32_t key0, key1, step;
};

// Philox4x32-10. Words are the low halves of their lanes; whatever stands in the high halves is ignored.
template <class B>
inline void philox(const Job& job, B block, uint32_t high, uint32_t tag, B& first, B& second) {
  const B m0 = fill(uint64_t(0xD2511F53u), block), m1 = fill(uint64_t(0xCD9E8D57u), block);
  const auto key = [&](uint32_t k) { return fill(uint64_t(k), block); };
  uint32_t k0 = job.key0, k1 = job.key1;
  // In the first round only word 0 differs between lanes, so half of the first two rounds is done once.
  const uint64_t s = uint64_t(0xCD9E8D57u) * job.step;
  const uint64_t q = uint64_t(0xD2511F53u) * (uint32_t(s >> 32) ^ high ^ k0);
  B p0 = multiply(block, m0);
  B c2 = (p0 >> 32) ^ key(tag ^ k1), c3 = p0;
  k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  B p1 = multiply(c2, m1);
  B c0 = (p1 >> 32) ^ key(uint32_t(s) ^ k0), c1 = p1;
  c2 = c3 ^ key(uint32_t(q >> 32) ^ k1), c3 = key(uint32_t(q));
#pragma GCC unroll 8
  for (int round = 2; round < 10; ++round) {
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    p0 = multiply(c0, m0), p1 = multiply(c2, m1);
    c0 = exclusive_or(p1 >> 32, c1, key(k0)), c1 = p1;
    c2 = exclusive_or(p0 >> 32, c3, key(k1)), c3 = p0;
  }
  first = ((c0 << 32) | (c1 & uint64_t(0xFFFFFFFFu))) >> 11;
  second = ((c2 << 32) | (c3 & uint64_t(0xFFFFFFFFu))) >> 11;
}

// a[0] + z * a[1] + ... with the highest coefficient first
template <class R>
inline R horner(R, R sum) { return sum; }
template <class R, class... Rest>
inline R horner(R z, R sum, double next, Rest... rest) {
  return horner(z, fma(z, sum, fill(next, z)), rest...);
}

// sqrt(-2 log((k + 1) / 2**53)) for k in [0, 2**53).
template <class B>
inline auto radius(B k) {
  const B x = bits(real(k + uint64_t(1)));
  const B above = x - uint64_t(0x3FE6A09E667F3BCDu);  // bits of sqrt(1/2)
  const auto e = reals((above >> 52) | uint64_t(0x4330000000000000u)) - (0x1p52 + 53);
  const auto f = reals(x - (above & uint64_t(0xFFF0000000000000u))) - 1.0;
  // log(1 + f) = 2 atanh(s)
  const auto s = f / (f + 2.0), z = s * s;
  const auto p = horner(z, fill(0x1.2ef13d36ebd20p-3, z), 0x1.39a3e58d1503ep-3, 0x1.7466274adbc47p-3,
                        0x1.c71c528a1bee9p-3, 0x1.249249413b27cp-2, 0x1.9999999980d1ep-2, 0x1.555555555558fp-1);
  const auto half = f * f * 0.5;
  const auto tail = fma(s, fma(z, p, half), e * 0x1.abc9e3b39803fp-56);
  return root(fma(e, fill(0x1.62e42fefa39efp-1, e), f - (half - tail)) * -2.0);
}

// r cos and r sin of 2 pi (k + 1) / 2**53, the angle rounded to double as a tensor's would be.
template <class B, class R>
inline void turn(B k, R r, R& cosine, R& sine) {
  const R angle = real(k + uint64_t(1)) * 0x1.921fb54442d18p-51;
  const R t = fma(angle, fill(0x1.45f306dc9c883p-1, r), fill(0x1.8p52, r));
  const R n = t - 0x1.8p52;
  const R near = fma(n, fill(-0x1.921fb54442d18p0, r), angle);  // pi / 2 in two parts
  const R x = fma(n, fill(-0x1.1a62633145c07p-54, r), near), z = x * x;
  const R s = fma(z * x, horner(z, fill(0x1.5d9df4a355366p-33, z), -0x1.ae5e9024d6248p-26, 0x1.71de35b4430fep-19,
                                -0x1.a01a019c62c2fp-13, 0x1.111111110fb8dp-7, -0x1.555555555554bp-3), x);
  const R c = fma(z * z, horner(z, fill(-0x1.900160d613a03p-37, z), 0x1.1eea949b14396p-29, -0x1.27e4f911164a4p-22,
                                0x1.a01a019e35fe0p-16, -0x1.6c16c16c16223p-10, 0x1.5555555555554p-5),
                  fma(z, fill(-0.5, z), fill(1.0, z)));
  const B quadrant = bits(t), sign = fill(uint64_t(1) << 63, k);
  cosine = r * reals(where_odd(quadrant, bits(s), bits(c)) ^ (((quadrant + uint64_t(1)) << 62) & sign));
  sine = r * reals(where_odd(quadrant, bits(c), bits(s)) ^ ((quadrant << 62) & sign));
}

template <class T>
inline T load(const void* from) {
  T out;
  std::memcpy(&out, from, sizeof out);
  return out;
}

inline void pairs(Reals a, Reals b, float* out) {
  const Floats x = __builtin_convertvector(a, Floats), y = __builtin_convertvector(b, Floats);
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  const __m512 both = _mm512_insertf32x8(_mm512_castps256_ps512((__m256)x), (__m256)y, 1);
  const __m512i order = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
  _mm512_storeu_ps(out, _mm512_permutexvar_ps(order, both));
#else
  for (int i = 0; i < LANES; ++i) out[2 * i] = x[i], out[2 * i + 1] = y[i];
#endif
}

inline void pairs(Reals a, Reals b, double* out) {
  for (int i = 0; i < LANES; ++i) out[2 * i] = a[i], out[2 * i + 1] = b[i];
}

template <class T, class Scalar>
inline void pairs(Two<T> a, Two<T> b, Scalar* out) {
  pairs(a.a, b.a, out);
  pairs(a.b, b.b, out + sizeof(T) / 4);
}

// The numbers of elements 2 * block and on, 2 * LANES for each of `groups` vectors (rounded up to 4).
template <class Scalar>
void draw(const Job& job, uint64_t block, uint32_t tag, int groups, Scalar* out) {
  typedef Two<Two<Bits>> Bits4;
  typedef Two<Two<Reals>> Reals4;
  alignas(64) Bits first[GROUPS], second[GROUPS];
  alignas(64) Reals r[GROUPS];
  Bits4 lane;
  Bits* lanes[] = {&lane.a.a, &lane.a.b, &lane.b.a, &lane.b.b};
  for (int i = 0; i < 4 * LANES; ++i) (*lanes[i / LANES])[i % LANES] = block + i;
  for (int g = 0; g < groups; g += 4) {
    Bits4 x, y;
    philox(job, lane + uint64_t(g) * LANES, uint32_t(block >> 32), tag, x, y);
    std::memcpy(first + g, &x, sizeof x);
    std::memcpy(second + g, &y, sizeof y);
  }
  for (int g = 0; g < groups; g += 4) {
    for (int h = g; h < g + 4; h += 2) {
      const auto out2 = radius(load<Two<Bits>>(first + h));
      std::memcpy(r + h, &out2, sizeof out2);
    }
    Reals4 c, s;
    turn(load<Bits4>(second + g), load<Reals4>(r + g), c, s);
    pairs(c, s, out + int64_t(g) * 2 * LANES);
  }
}

// What happens to element i, whose number is z: the total x[i] becomes the private mean.
template <class Scalar>
struct Mean {
  Scalar* x;
  Scalar std, divisor;
  void run(int64_t at, const Scalar* __restrict z, int64_t n) const {
    Scalar* __restrict to = x + at;
    const Scalar scale = std, by = divisor;  // locals: a store through `to` might change members
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] = std::fma(z[i], scale, to[i]) / by;
  }
};

// The same, and then the update of Adam: `decay` multiplies the weight (AdamW), `l2` of it is added to the gradient.
struct Rates {
  double decay, l2, beta1, beta2, step_size, root_correction, eps;
};

template <class Scalar>
struct Adam {
  Scalar *x, *weight, *mean, *square;
  Scalar std, divisor, decay, l2, rate1, beta2, rate2, step_size, scale, eps;
  void run(int64_t at, const Scalar* __restrict z, int64_t n) const {
    Scalar *__restrict to = x + at, *__restrict w = weight + at, *__restrict m = mean + at, *__restrict v = square + at;
    const Adam c = *this;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const Scalar mean_gradient = std::fma(z[i], c.std, to[i]) / c.divisor;
      const Scalar g = std::fma(w[i], c.l2, mean_gradient);
      const Scalar first = std::fma(g - m[i], c.rate1, m[i]), second = std::fma(g * c.rate2, g, v[i] * c.beta2);
      to[i] = mean_gradient, m[i] = first, v[i] = second;
      w[i] = w[i] * c.decay - c.step_size * first / std::fma(std::sqrt(second), c.scale, c.eps);
    }
  }
};

// Elements [start, start + n) of a parameter; `apply` sees them as [at, at + n).
template <class Scalar, class Apply>
void span(const Job& job, bool noisy, const Apply& apply, int64_t at, uint64_t start, int64_t n, uint32_t tag) {
  constexpr int64_t ROOM = 2 * LANES * GROUPS, CARRY = int64_t(1) << 33;  // elements between carries into word 1
  alignas(64) Scalar z[ROOM] = {};
  while (n > 0) {
    const int skip = start & 1;
    const int64_t take = std::min({n, ROOM - skip, CARRY - int64_t(start & (CARRY - 1))});
    if (noisy) draw<Scalar>(job, start >> 1, tag, int((take + skip + 2 * LANES - 1) / (2 * LANES)), z);
    apply.run(at, z + skip, take);
    at += take, start += take, n -= take;
  }
}

template <class Scalar>
inline void scaled(Scalar* __restrict to, const Scalar* __restrict from, Scalar factor, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = from[i] * factor;
}

template <class Scalar>
inline void subtract(Scalar* __restrict to, const Scalar* __restrict from, Scalar factor, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = std::fma(from[i], factor, to[i]);
}

// The same of four rows, the latest first: `to` is read and written once.
template <class Scalar>
inline void subtract4(Scalar* __restrict to, const Scalar* ring, int64_t numel, int64_t latest, int64_t kept,
                      const double* factors, int64_t n) {
  const auto row = [=](int64_t back) { return ring + ((latest + kept - back) % kept) * numel; };
  const Scalar *__restrict a = row(0), *__restrict b = row(1), *__restrict c = row(2), *__restrict d = row(3);
  const Scalar f = Scalar(-factors[0]), g = Scalar(-factors[1]), h = Scalar(-factors[2]), k = Scalar(-factors[3]);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i)
    to[i] = std::fma(d[i], k, std::fma(c[i], h, std::fma(b[i], g, std::fma(a[i], f, to[i]))));
}

// Rows of correlated noise, K of the latest of each element kept: row r of a block, in place of row r - K, is
// y[r] = factors[0] * z[r] - factors[1] * y[r - 1] - ... - factors[K] * y[r - K], and z[r] the numbers of step first + r.
template <class Scalar>
struct Rows {
  Job job;
  uint32_t first;
  int64_t made, more, kept;
  const double* factors;
  void run(Scalar* ring, int64_t numel, int64_t at, uint64_t start, int64_t n, uint32_t tag) const {
    constexpr int64_t ROOM = 2 * LANES * GROUPS, CARRY = int64_t(1) << 33;
    alignas(64) Scalar z[ROOM] = {}, y[ROOM];
    while (n > 0) {
      const int skip = start & 1;
      const int64_t take = std::min({n, ROOM - skip, CARRY - int64_t(start & (CARRY - 1))});
      for (int64_t row = made; row < made + more; ++row) {
        const Job now{job.key0, job.key1, first + uint32_t(row)};
        draw<Scalar>(now, start >> 1, tag, int((take + skip + 2 * LANES - 1) / (2 * LANES)), z);
        scaled(y, z + skip, Scalar(factors[0]), take);
        int64_t j = 1;
        for (; j + 3 <= kept; j += 4)
          subtract4(y, ring + at, numel, (row + kept - j) % kept, kept, factors + j, take);
        for (; j <= kept; ++j) subtract(y, ring + ((row + kept - j) % kept) * numel + at, Scalar(-factors[j]), take);
        std::memcpy(ring + (row % kept) * numel + at, y, take * sizeof(Scalar));
      }
      at += take, start += take, n -= take;
    }
  }
};

// Cuts all spans into tasks of equal size: each(i, at, n) does elements [at, at + n) of span i.
template <class Each>
void tasks(int64_t count, const int64_t* numels, int threads, const Each& each) {
  std::vector<int64_t> ends(count);
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) ends[i] = total += numels[i];
  const int64_t parts = (total + CHUNK - 1) / CHUNK;
#pragma omp parallel for num_threads(threads) schedule(static) if (parts > 1)
  for (int64_t part = 0; part < parts; ++part) {
    int64_t now = part * CHUNK;
    const int64_t end = std::min(now + CHUNK, total);
    for (int64_t i = std::upper_bound(ends.begin(), ends.end(), now) - ends.begin(); now < end; ++i) {
      const int64_t at = now - (ends[i] - numels[i]), n = std::min(end, ends[i]) - now;
      each(i, at, n);
      now += n;
    }
  }
}

// make(i) is what to apply to span i.
template <class Scalar, class Make>
void spans(const Job& job, bool noisy, int64_t count, const int64_t* starts, const int64_t* numels, const int64_t* tags,
           int threads, const Make& make) {
  tasks(count, numels, threads, [&](int64_t i, int64_t at, int64_t n) {
    span<Scalar>(job, noisy, make(i), at, uint64_t(starts[i]) + uint64_t(at), n, uint32_t(tags[i]));
  });
}

template <class Scalar>
void rows_of(const Rows<Scalar>& rows, int64_t count, void* const* rings, const int64_t* starts, const int64_t* numels,
             const int64_t* tags, int threads) {
  tasks(count, numels, threads, [&](int64_t i, int64_t at, int64_t n) {
    rows.run((Scalar*)rings[i], numels[i], at, uint64_t(starts[i]) + uint64_t(at), n, uint32_t(tags[i]));
  });
}

template <class Scalar>
void mean_of(const Job& job, int64_t count, void* const* x, const int64_t* starts, const int64_t* numels,
             const int64_t* tags, double std, double divisor, int threads) {
  spans<Scalar>(job, std != 0, count, starts, numels, tags, threads, [=](int64_t i) {
    return Mean<Scalar>{(Scalar*)x[i], Scalar(std), Scalar(divisor)};
  });
}

template <class Scalar>
void adam_of(const Job& job, int64_t count, void* const* pointers, const int64_t* starts, const int64_t* numels,
             const int64_t* tags, double std, double divisor, const Rates& rates, void* const* drawn, int threads) {
  const auto of = [](double x) { return Scalar(x); };
  const auto make = [=](int64_t i) {
    return Adam<Scalar>{(Scalar*)pointers[i], (Scalar*)pointers[count + i], (Scalar*)pointers[2 * count + i],
                        (Scalar*)pointers[3 * count + i], of(std), of(divisor), of(rates.decay), of(rates.l2),
                        of(1 - rates.beta1), of(rates.beta2), of(1 - rates.beta2), of(rates.step_size),
                        of(1 / rates.root_correction), of(rates.eps)};
  };
  if (drawn)
    tasks(count, numels, threads,
          [=](int64_t i, int64_t at, int64_t n) { make(i).run(at, (const Scalar*)drawn[i] + at, n); });
  else
    spans<Scalar>(job, std != 0, count, starts, numels, tags, threads, make);
}

}  // namespace

extern "C" {

// x = (x + std * noise) / divisor on `count` spans of float, or of double if `wide`.
void dp_mean(int64_t count, void* const* x, const int64_t* starts, const int64_t* numels, const int64_t* tags, int wide,
             double std, double divisor, uint64_t seed, int64_t step, int threads) {
  const Job job{uint32_t(seed), uint32_t(seed >> 32), uint32_t(step)};
  (wide ? mean_of<double> : mean_of<float>)(job, count, x, starts, numels, tags, std, divisor, threads);
}

// The same, then Adam. pointers: totals, weights, means, means of squares, `count` of each; rates: as in Rates; drawn:
// noise that was drawn before, or null.
void dp_adam(int64_t count, void* const* pointers, const int64_t* starts, const int64_t* numels, const int64_t* tags,
             int wide, double std, double divisor, uint64_t seed, int64_t step, const double* rates,
             void* const* drawn, int threads) {
  const Job job{uint32_t(seed), uint32_t(seed >> 32), uint32_t(step)};
  const Rates r{rates[0], rates[1], rates[2], rates[3], rates[4], rates[5], rates[6]};
  (wide ? adam_of<double> : adam_of<float>)(job, count, pointers, starts, numels, tags, std, divisor, r, drawn, threads);
}

// Rows [made, made + more) of a block of correlated noise that began at step `first`; `kept` rows of each span.
void dp_rows(int64_t count, void* const* rings, const int64_t* starts, const int64_t* numels, const int64_t* tags,
             int wide, uint64_t seed, int64_t first, int64_t made, int64_t more, int64_t kept, const double* factors,
             int threads) {
  const Job job{uint32_t(seed), uint32_t(seed >> 32), 0};
  if (wide)
    rows_of(Rows<double>{job, uint32_t(first), made, more, kept, factors}, count, rings, starts, numels, tags, threads);
  else
    rows_of(Rows<float>{job, uint32_t(first), made, more, kept, factors}, count, rings, starts, numels, tags, threads);
}

// The two numbers of one block, any counter: for tests against known answers. Returns how many.
int dp_block(uint64_t block, uint32_t step, uint32_t tag, uint64_t seed, double* out) {
  double z[8 * LANES];
  draw<double>(Job{uint32_t(seed), uint32_t(seed >> 32), step}, block, tag, 1, z);
  std::memcpy(out, z, 2 * sizeof(double));
  return 2;
}
}
