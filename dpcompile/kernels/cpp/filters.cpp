// Every example's gradient of a convolution's filters, its squared norm, and what that would be if no two places
// cancelled, without an unfolded copy of the images.
//
// An image is laid out with its channels last and zeros around it. What a line of a filter sees from one place, its
// columns times the channels, then lies in memory in one piece, and that of the next place one stride further on: the
// gradient is a product of cotangents and images as they lie, of which a tile of ROWS filters times COLS such numbers
// stays in registers while all places of the image are added up.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num() { return 0; }
#endif

#if defined(__AVX512F__)
constexpr int64_t LANES = 16, VECTORS = 2, ROWS = 8;
#elif defined(__AVX2__)
constexpr int64_t LANES = 8, VECTORS = 2, ROWS = 6;
#else
constexpr int64_t LANES = 4, VECTORS = 4, ROWS = 4;
#endif
constexpr int64_t COLS = LANES * VECTORS;
// Places that are added up from zero, about, before a tile is added to memory: `additions` in filters.py counts on it.
constexpr int64_t PLACES = 128;

typedef float Vector __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

struct Sizes {
  int64_t batch, frames, channels, filters, groups;
  int64_t image[3], places[3], kernel[3], stride[3], padding[3], dilation[3];
  int64_t image_strides[6], cotangent_strides[6];  // of examples, frames, channels, and in space
};

namespace {

int64_t pieces(int64_t whole, int64_t piece) { return (whole + piece - 1) / piece; }

// What follows from the sizes.
struct Layout {
  int64_t padded[3], channels, filters;  // channels and filters of a group
  bool joined;                           // the columns of a filter's line lie together
  int64_t length, segments;              // numbers that lie together; how many such pieces a filter has
  int64_t blocks, lines, row, size;      // tiles of filters; lines of places; numbers of a filter, and of all of them

  explicit Layout(const Sizes& s) {
    for (int i = 0; i < 3; ++i) padded[i] = s.image[i] + 2 * s.padding[i];
    channels = s.channels / s.groups, filters = s.filters / s.groups;
    joined = s.groups == 1 && s.dilation[2] == 1;
    length = joined ? s.kernel[2] * channels : channels;
    segments = s.kernel[0] * s.kernel[1] * (joined ? 1 : s.kernel[2]);
    blocks = pieces(filters, ROWS), lines = s.places[0] * s.places[1];
    row = segments * length, size = s.filters * row;
  }

  int64_t image_numbers(const Sizes& s) const { return padded[0] * padded[1] * padded[2] * s.channels + COLS; }
  int64_t cotangent_numbers(const Sizes& s) const { return lines * s.places[2] * ROWS; }

  // Where in the image the filter's segment begins at the first place.
  int64_t segment(const Sizes& s, int64_t k) const {
    const int64_t width = joined ? 1 : s.kernel[2];
    const int64_t w = k % width, h = k / width % s.kernel[1], d = k / width / s.kernel[1];
    return at(s, d * s.dilation[0], h * s.dilation[1], w * s.dilation[2]);
  }
  int64_t at(const Sizes& s, int64_t d, int64_t h, int64_t w) const {
    return ((d * padded[1] + h) * padded[2] + w) * s.channels;
  }
};

// Channels last, inside of zeros that are there already.
void lay_out_image(const float* from, const Sizes& s, const Layout& layout, float* to) {
  const int64_t *t = s.image_strides, n = s.channels;
  for (int64_t d = 0; d < s.image[0]; ++d)
    for (int64_t h = 0; h < s.image[1]; ++h) {
      float* line = to + layout.at(s, d + s.padding[0], h + s.padding[1], s.padding[2]);
      const float* source = from + d * t[3] + h * t[4];
      if (t[2] == 1 && t[5] == n) {
        std::memcpy(line, source, s.image[2] * n * sizeof(float));
        continue;
      }
      for (int64_t w = 0; w < s.image[2]; ++w)
        for (int64_t c = 0; c < n; ++c) line[w * n + c] = source[w * t[5] + c * t[2]];
    }
}

// [places, ROWS] of the filters from `first` on, zeros behind the last.
void lay_out_cotangents(const float* from, const Sizes& s, int64_t first, int64_t count, float* to) {
  const int64_t* t = s.cotangent_strides;
  for (int64_t d = 0; d < s.places[0]; ++d)
    for (int64_t h = 0; h < s.places[1]; ++h) {
      const float* source = from + first * t[2] + d * t[3] + h * t[4];
      for (int64_t w = 0; w < s.places[2]; ++w, source += t[5], to += ROWS) {
        if (count == ROWS && t[2] == 1) {
          std::memcpy(to, source, ROWS * sizeof(float));
          continue;
        }
        for (int64_t r = 0; r < ROWS; ++r) to[r] = r < count ? source[r * t[2]] : 0.0f;
      }
    }
}

// sums[r][c] += rows[i][r] * cols[i][c], over all places i of some lines.
template <int64_t V>
void add_places(
    const float* rows, const float* cols, const Sizes& s, const Layout& layout, int64_t first, int64_t last,
    float* sums, int64_t apart) {
  const int64_t step = s.stride[2] * s.channels;
  Vector sum[ROWS][V];
#pragma GCC unroll 8
  for (int64_t r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int64_t v = 0; v < V; ++v) sum[r][v] = Vector{};
  int64_t d = first / s.places[1], h = first % s.places[1];
  for (int64_t l = first; l < last; ++l) {
    const float* col = cols + layout.at(s, d * s.stride[0], h * s.stride[1], 0);
    if (++h == s.places[1]) h = 0, ++d;
    for (int64_t w = 0; w < s.places[2]; ++w, rows += ROWS, col += step) {
      Vector c[V];
#pragma GCC unroll 4
      for (int64_t v = 0; v < V; ++v) c[v] = *(const Vector*)(col + v * LANES);
#pragma GCC unroll 8
      for (int64_t r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int64_t v = 0; v < V; ++v) sum[r][v] += rows[r] * c[v];
    }
  }
#pragma GCC unroll 8
  for (int64_t r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int64_t v = 0; v < V; ++v) *(Vector*)(sums + r * apart + v * LANES) += sum[r][v];
}

// Adds one image's share to the gradients of `count` filters, `layout.row` numbers each.
void add_image(
    const float* image, const float* cotangents, const Sizes& s, const Layout& layout, int64_t count, float* sums) {
  const int64_t chunk = std::max<int64_t>(1, PLACES / s.places[2]);
  float edge[ROWS * COLS] = {};
  for (int64_t first = 0; first < layout.lines; first += chunk) {
    const int64_t last = std::min(first + chunk, layout.lines);
    const float* rows = cotangents + first * s.places[2] * ROWS;
    for (int64_t k = 0; k < layout.segments; ++k)
      for (int64_t c = 0; c < layout.length; c += COLS) {
        const float* cols = image + layout.segment(s, k) + c;
        const int64_t width = std::min(COLS, layout.length - c);
        float* tile = sums + k * layout.length + c;
        const bool inside = count == ROWS && width % LANES == 0 && (width == LANES || width == COLS);
        if (!inside)
          for (int64_t r = 0; r < count; ++r) std::memcpy(edge + r * COLS, tile + r * layout.row, width * sizeof(float));
        float* to = inside ? tile : edge;
        const int64_t apart = inside ? layout.row : COLS;
        if (width <= LANES)
          add_places<1>(rows, cols, s, layout, first, last, to, apart);
        else
          add_places<VECTORS>(rows, cols, s, layout, first, last, to, apart);
        if (!inside)
          for (int64_t r = 0; r < count; ++r) std::memcpy(tile + r * layout.row, edge + r * COLS, width * sizeof(float));
      }
  }
}

// In double: no square of a float is too small for it or too large.
double squared_norm(const float* values, int64_t length) {
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < length; ++i) total += double(values[i]) * values[i];
  return total;
}

// Adds the squares of `channels` numbers at every point of space: onto `sums`, with lines of `row` in planes of `plane`.
void add_squares(
    const float* from, int64_t channels, const int64_t* space, const int64_t* strides, double* sums, int64_t plane,
    int64_t row) {
  const int64_t *t = strides, width = space[2];
  for (int64_t d = 0; d < space[0]; ++d)
    for (int64_t h = 0; h < space[1]; ++h) {
      const float* line = from + d * t[3] + h * t[4];
      double* to = sums + d * plane + h * row;
      if (t[2] == 1 && channels > 4) {  // fewer are added up along the line, place beside place
        for (int64_t w = 0; w < width; ++w) to[w] += squared_norm(line + w * t[5], channels);
        continue;
      }
      for (int64_t c = 0; c < channels; ++c) {
        const float* numbers = line + c * t[2];
#pragma omp simd
        for (int64_t w = 0; w < width; ++w) to[w] += double(numbers[w * t[5]]) * numbers[w * t[5]];
      }
    }
}

// The sum over places of the length of the cotangents times that of what the filter sees from there, both squared.
// Roots are taken of products: those of squares of floats are inside of double. `seen`: a line of places.
double lengths(const double* image, const double* cotangent, const Sizes& s, const Layout& layout, double* seen) {
  const int64_t width = s.places[2];
  double total = 0;
  for (int64_t l = 0; l < layout.lines; ++l, cotangent += width) {
    std::fill(seen, seen + width, 0.0);
    for (int64_t i = 0; i < s.kernel[0]; ++i)
      for (int64_t j = 0; j < s.kernel[1]; ++j) {
        const int64_t d = l / s.places[1] * s.stride[0] + i * s.dilation[0];
        const int64_t h = l % s.places[1] * s.stride[1] + j * s.dilation[1];
        for (int64_t k = 0; k < s.kernel[2]; ++k) {
          const double* line = image + (d * layout.padded[1] + h) * layout.padded[2] + k * s.dilation[2];
#pragma omp simd
          for (int64_t w = 0; w < width; ++w) seen[w] += line[w * s.stride[2]];
        }
      }
#pragma omp simd reduction(+ : total)
    for (int64_t w = 0; w < width; ++w) total += std::sqrt(seen[w] * cotangent[w]);
  }
  return total;
}

// An example's squared size, of the groups' gradients together.
double squared_size(const float* images, const float* cotangents, const Sizes& s, const Layout& layout) {
  const int64_t *pad = s.padding, *padded = layout.padded, *t = s.image_strides, *u = s.cotangent_strides;
  const int64_t plane = padded[1] * padded[2], row = padded[2], inside = pad[0] * plane + pad[1] * row + pad[2];
  std::vector<double> image(padded[0] * plane), cotangent(layout.lines * s.places[2]), seen(s.places[2]);
  double total = 0;
  for (int64_t group = 0; group < s.groups; ++group) {
    double size = 0;
    for (int64_t frame = 0; frame < s.frames; ++frame) {
      std::fill(image.begin(), image.end(), 0.0), std::fill(cotangent.begin(), cotangent.end(), 0.0);
      const float* source = images + frame * t[1] + group * layout.channels * t[2];
      add_squares(source, layout.channels, s.image, t, image.data() + inside, plane, row);
      source = cotangents + frame * u[1] + group * layout.filters * u[2];
      add_squares(source, layout.filters, s.places, u, cotangent.data(), s.places[1] * s.places[2], s.places[2]);
      size += lengths(image.data(), cotangent.data(), s, layout, seen.data());
    }
    total += size * size;
  }
  return total;
}

}  // namespace

// How many numbers of memory a thread needs to work in.
extern "C" int64_t dp_filter_workspace(const Sizes* sizes) {
  const Layout layout(*sizes);
  return layout.image_numbers(*sizes) + layout.cotangent_numbers(*sizes) + ROWS * layout.row;
}

// Gradients [batch, filters, *kernel, channels / groups], if `result` is there, and squared norms [batch, parts]: each
// example's filters are worked on in `parts` parts. Squared sizes [batch]: what the norms would be if no two places
// cancelled. `work`: [threads, dp_filter_workspace], zeros.
extern "C" void dp_filter_gradients(
    const float* images, const float* cotangents, const Sizes* sizes, int64_t parts, float* work, float* result,
    double* norms, double* squared_sizes, int threads) {
  const Sizes& s = *sizes;
  const Layout layout(s);
  const int64_t each = dp_filter_workspace(sizes), units = s.groups * layout.blocks;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t task = 0; task < s.batch * parts; ++task) {
    const int64_t b = task / parts, part = task % parts;
    float* image = work + omp_get_thread_num() * each;
    float* cotangent = image + layout.image_numbers(s);
    float* spare = cotangent + layout.cotangent_numbers(s);
    double norm = 0;
    for (int64_t unit = units * part / parts; unit < units * (part + 1) / parts; ++unit) {
      const int64_t group = unit / layout.blocks, inside = unit % layout.blocks * ROWS;
      const int64_t first = group * layout.filters + inside, count = std::min(ROWS, layout.filters - inside);
      float* sums = result ? result + b * layout.size + first * layout.row : spare;
      std::memset(sums, 0, count * layout.row * sizeof(float));
      for (int64_t frame = 0; frame < s.frames; ++frame) {
        const float* source = images + b * s.image_strides[0] + frame * s.image_strides[1];
        if (s.frames > 1 || unit == units * part / parts) lay_out_image(source, s, layout, image);
        source = cotangents + b * s.cotangent_strides[0] + frame * s.cotangent_strides[1];
        lay_out_cotangents(source, s, first, count, cotangent);
        add_image(image + group * layout.channels, cotangent, s, layout, count, sums);
      }
      norm += squared_norm(sums, count * layout.row);
    }
    norms[task] = norm;
    if (part == 0) {
      const int64_t *i = s.image_strides, *c = s.cotangent_strides;
      squared_sizes[b] = squared_size(images + b * i[0], cotangents + b * c[0], s, layout);
    }
  }
}
