// The adaLN operations in fp32 on CPUs, one pass over memory forward and one backward. kernels/adaln.py defines what is
// computed.
//
// All arithmetic on a row runs while the row is in the nearest cache. Sums over a row run in a fixed number of lanes,
// and sums over tokens in fixed chunks of a sample, so no bit depends on the threads, the vector width or the batch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <tuple>
#include <vector>

namespace py = pybind11;

namespace fastdit {
namespace {

using Address = std::uintptr_t;  // 0 stands for an absent tensor
// (address, stride of a sample, stride of a token), as Python passes a matrix.
using View = std::tuple<Address, std::int64_t, std::int64_t>;
constexpr int kLanes = 32;           // partial sums over a row
constexpr std::int64_t kChunk = 16;  // tokens that one thread sums over
constexpr std::int64_t kAhead = 2;   // tokens between the row in work and the row that is prefetched

float* floats(Address address) { return reinterpret_cast<float*>(address); }

// A (batch, tokens, width) matrix given by strides, with inner stride 1. A vector per sample has token stride 0.
struct Matrix {
  const float* data;
  std::int64_t sample, token;

  explicit Matrix(const View& view)
      : data(floats(std::get<0>(view))), sample(std::get<1>(view)), token(std::get<2>(view)) {}
  const float* operator()(std::int64_t b, std::int64_t n) const { return data + b * sample + n * token; }
  explicit operator bool() const { return data; }
};

// Prefetch a row that is read soon. The processor's own prefetcher stops at each page, and is late for short rows.
void fetch(const float* row, std::int64_t width) {
  for (std::int64_t i = 0; i < width; i += 16) __builtin_prefetch(row + i);
}

// Return the sum of term(i) over a row: kLanes partial sums, then a tree over the lanes.
template <typename Term>
float sum(std::int64_t width, const Term term) {
  float lanes[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += term(i + lane);
  }
  for (int lane = 0; i < width; ++i, ++lane) lanes[lane] += term(i);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

// Compute r = x + gate * y for one row.
void add_gated(const float* x, const float* y, const float* gate, float* r, std::int64_t width) {
#pragma omp simd
  for (std::int64_t i = 0; i < width; ++i) r[i] = x[i] + gate[i] * y[i];
}

// Compute h = (value - mean) * rstd * (1 + scale) + shift for one row.
void modulate(const float* value, float mean, float rstd, const float* scale, const float* shift, float* h,
              std::int64_t width) {
#pragma omp simd
  for (std::int64_t i = 0; i < width; ++i) h[i] = (value[i] - mean) * rstd * (1 + scale[i]) + shift[i];
}

// Compute r, h and stats. A thread owns whole rows: it reads x and y once, and writes r, h and two statistics once.
void forward(const View& x_, const View& y_, const View& gate_, const View& scale_, const View& shift_, Address r_,
             Address h_, Address stats_, std::int64_t batch, std::int64_t tokens, std::int64_t width, float eps,
             bool rms, int threads) {
  const Matrix x(x_), y(y_), gate(gate_), scale(scale_), shift(shift_);
  float *const rs = floats(r_), *const hs = floats(h_), *const stats = floats(stats_);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t row = 0; row < batch * tokens; ++row) {
    const std::int64_t b = row / tokens, n = row % tokens;
    const float* value = x(b, n);
    // Prefetch the row after next.
    if (const std::int64_t next = std::min(n + kAhead, tokens - 1); next > n) {
      fetch(x(b, next), width);
      if (y) fetch(y(b, next), width);
    }
    // Form the new stream.
    if (y) {
      float* const r = (rs ? rs : hs) + row * width;  // if the caller does not want r, h overwrites it below
      add_gated(value, y(b, n), gate(b, n), r, width);
      value = r;
    }
    // Normalize and modulate it.
    if (scale) {
      const float mean = rms ? 0 : sum(width, [=](std::int64_t i) { return value[i]; }) / width;
      const auto square = [=](std::int64_t i) { return (value[i] - mean) * (value[i] - mean); };
      const float rstd = 1 / std::sqrt(sum(width, square) / width + eps);
      stats[2 * row] = mean, stats[2 * row + 1] = rstd;
      modulate(value, mean, rstd, scale(b, n), shift(b, n), hs + row * width, width);
    }
  }
}

// Add up the chunks' sums, in order, to the gradient (batch, width) of one vector. A thread owns whole samples.
void add_chunks(const float* partials, float* gradient, std::int64_t batch, std::int64_t chunks, std::int64_t width) {
#pragma omp for schedule(static) nowait
  for (std::int64_t b = 0; b < batch; ++b) {
    float* const out = gradient + b * width;
    std::fill_n(out, width, 0.0f);
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
      const float* const part = partials + (b * chunks + chunk) * 3 * width;
#pragma omp simd
      for (std::int64_t i = 0; i < width; ++i) out[i] += part[i];
    }
  }
}

// Compute all gradients. A thread owns chunks of kChunk tokens of a sample. For each row it reads dr, dh, the saved
// stream and y once, and writes dx, dy and h once. The chunk's sums for gate, scale and shift stay in the nearest
// cache, in the chunk's own part of `partials`; add_chunks adds them up after all rows.
void backward(const View& dr_, const View& dh_, const View& residual_, const View& y_, const View& gate_,
              const View& scale_, const View& shift_, Address stats_, Address dx_, Address dy_, Address dgate_,
              Address dscale_, Address dshift_, Address h_, std::int64_t batch, std::int64_t tokens,
              std::int64_t width, bool rms, bool from_x, int threads) {
  const Matrix dr(dr_), dh(dh_), residual(residual_), y(y_), gate(gate_), scale(scale_), shift(shift_);
  const float* const stats = floats(stats_);
  float *const dxs = floats(dx_), *const dys = floats(dy_), *const hs = floats(h_);
  float* const vectors[] = {floats(dgate_), floats(dscale_), floats(dshift_)};
  const std::int64_t chunks = (tokens + kChunk - 1) / kChunk;
  const std::unique_ptr<float[]> partials(new float[batch * chunks * 3 * width]);
  const std::vector<float> zeros(width);
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> buffer(width);
#pragma omp for schedule(static)
    for (std::int64_t chunk = 0; chunk < batch * chunks; ++chunk) {
      const std::int64_t b = chunk / chunks, first = chunk % chunks * kChunk, last = std::min(first + kChunk, tokens);
      float* const gate_sum = &partials[chunk * 3 * width];
      float *const scale_sum = gate_sum + width, *const shift_sum = scale_sum + width;
      std::fill_n(gate_sum, 3 * width, 0.0f);
      for (std::int64_t n = first; n < last; ++n) {
        const std::int64_t row = b * tokens + n;
        // Prefetch the row after next.
        if (const std::int64_t next = std::min(n + kAhead, tokens - 1); next > n) {
          if (dr) fetch(dr(b, next), width);
          if (dh) fetch(dh(b, next), width), fetch(residual(b, next), width);
          if (y) fetch(y(b, next), width);
        }
        // The gradient of r starts with the part that bypasses the norm.
        const float* gradient = dr ? dr(b, n) : zeros.data();
        // Differentiate the modulated norm, and recompute h if the caller needs it.
        if (dh) {
          const float* value = residual(b, n);
          if (from_x && y) {
            add_gated(value, y(b, n), gate(b, n), buffer.data(), width);
            value = buffer.data();
          }
          const float *const upstream = dh(b, n), *const factor = scale(b, n), *const around = gradient;
          const float mean = stats[2 * row], rstd = stats[2 * row + 1];
          const auto normed = [=](std::int64_t i) { return (value[i] - mean) * rstd; };
          const auto dnormed = [=](std::int64_t i) { return upstream[i] * (1 + factor[i]); };
          const float along = sum(width, [=](std::int64_t i) { return dnormed(i) * normed(i); }) / width;
          const float average = rms ? 0 : sum(width, dnormed) / width;
          float* const dx = dxs + row * width;
#pragma omp simd
          for (std::int64_t i = 0; i < width; ++i) {
            dx[i] = around[i] + (dnormed(i) - normed(i) * along - average) * rstd;
            scale_sum[i] += upstream[i] * normed(i);
            shift_sum[i] += upstream[i];
          }
          if (hs) modulate(value, mean, rstd, factor, shift(b, n), hs + row * width, width);
          gradient = dx;
        }
        // Differentiate the gated sum.
        if (y) {
          const float *const update = y(b, n), *const open = gate(b, n);
          float* const dy = dys + row * width;
#pragma omp simd
          for (std::int64_t i = 0; i < width; ++i) {
            dy[i] = gradient[i] * open[i];
            gate_sum[i] += gradient[i] * update[i];
          }
        }
      }
    }
    for (int v = 0; v < 3; ++v)
      if (vectors[v]) add_chunks(&partials[v * width], vectors[v], batch, chunks, width);
  }
}

}  // namespace

void bind_adaln(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("adaln", &forward, release(),
        "Fill r, h and stats. x, y, gate, scale and shift are (address, stride of a sample, stride of a token); r, h "
        "and stats are addresses of contiguous tensors; then batch, tokens, width, eps, rms and threads. Address 0 "
        "stands for an absent input or an unneeded result.");
  m.def("adaln_backward", &backward, release(),
        "Fill the gradients. dr, dh, the saved stream, y, gate, scale and shift are as in adaln; stats, dx, dy, dgate, "
        "dscale, dshift and h are addresses; then batch, tokens, width, rms, from_x and threads.");
}

}  // namespace fastdit
