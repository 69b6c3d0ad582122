// The adaLN family in fp32 on CPUs, one pass over memory forward and one backward; fastdit/kernels/adaln.py says what is
// computed.
//
// A row goes through all of its arithmetic while it lies in the nearest cache. Sums over a row run in a fixed number of
// lanes, sums over tokens in fixed chunks of a sample: no bit depends on the threads, the vector width or the batch.
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

using Address = std::uintptr_t;  // 0: there is none
using View = std::tuple<Address, std::int64_t, std::int64_t>;
constexpr int kLanes = 32;
constexpr std::int64_t kChunk = 16;  // tokens
constexpr std::int64_t kAhead = 2;   // tokens

float* floats(Address address) { return reinterpret_cast<float*>(address); }

// (batch, tokens, width) by strides, the inner one 1; a vector for a whole sample has token stride 0.
struct Matrix {
  const float* data;
  std::int64_t sample, token;

  explicit Matrix(const View& view)
      : data(floats(std::get<0>(view))), sample(std::get<1>(view)), token(std::get<2>(view)) {}
  const float* operator()(std::int64_t b, std::int64_t n) const { return data + b * sample + n * token; }
  explicit operator bool() const { return data; }
};

// A row that is read soon: the processor's own look-ahead ends at each page, and is late for short rows.
void fetch(const float* row, std::int64_t width) {
  for (std::int64_t i = 0; i < width; i += 16) __builtin_prefetch(row + i);
}

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

void add_gated(const float* x, const float* y, const float* gate, float* r, std::int64_t width) {
#pragma omp simd
  for (std::int64_t i = 0; i < width; ++i) r[i] = x[i] + gate[i] * y[i];
}

void modulate(const float* value, float mean, float rstd, const float* scale, const float* shift, float* h,
              std::int64_t width) {
#pragma omp simd
  for (std::int64_t i = 0; i < width; ++i) h[i] = (value[i] - mean) * rstd * (1 + scale[i]) + shift[i];
}

void forward(const View& x_, const View& y_, const View& gate_, const View& scale_, const View& shift_, Address r_,
             Address h_, Address stats_, std::int64_t batch, std::int64_t tokens, std::int64_t width, float eps,
             bool rms, int threads) {
  const Matrix x(x_), y(y_), gate(gate_), scale(scale_), shift(shift_);
  float *const rs = floats(r_), *const hs = floats(h_), *const stats = floats(stats_);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t row = 0; row < batch * tokens; ++row) {
    const std::int64_t b = row / tokens, n = row % tokens;
    const float* value = x(b, n);
    if (const std::int64_t next = std::min(n + kAhead, tokens - 1); next > n) {
      fetch(x(b, next), width);
      if (y) fetch(y(b, next), width);
    }
    if (y) {
      float* const r = (rs ? rs : hs) + row * width;  // where r is not wanted, h overwrites it below
      add_gated(value, y(b, n), gate(b, n), r, width);
      value = r;
    }
    if (scale) {
      const float mean = rms ? 0 : sum(width, [=](std::int64_t i) { return value[i]; }) / width;
      const auto square = [=](std::int64_t i) { return (value[i] - mean) * (value[i] - mean); };
      const float rstd = 1 / std::sqrt(sum(width, square) / width + eps);
      stats[2 * row] = mean, stats[2 * row + 1] = rstd;
      modulate(value, mean, rstd, scale(b, n), shift(b, n), hs + row * width, width);
    }
  }
}

// Gradients of one vector (batch, width) from the sums of all chunks.
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

void backward(const View& dr_, const View& dh_, const View& kept_, const View& y_, const View& gate_,
              const View& scale_, const View& shift_, Address stats_, Address dx_, Address dy_, Address dgate_,
              Address dscale_, Address dshift_, Address h_, std::int64_t batch, std::int64_t tokens,
              std::int64_t width, bool rms, bool from_x, int threads) {
  const Matrix dr(dr_), dh(dh_), kept(kept_), y(y_), gate(gate_), scale(scale_), shift(shift_);
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
        if (const std::int64_t next = std::min(n + kAhead, tokens - 1); next > n) {
          if (dr) fetch(dr(b, next), width);
          if (dh) fetch(dh(b, next), width), fetch(kept(b, next), width);
          if (y) fetch(y(b, next), width);
        }
        const float* gradient = dr ? dr(b, n) : zeros.data();  // of r, to begin with the part that passed the norm by
        if (dh) {
          const float* value = kept(b, n);
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
        "x, y, gate, scale, shift as (address, stride of a sample, stride of a token); r, h, stats by address, each "
        "contiguous; batch, tokens, width, eps, rms, threads. Address 0: not there, not wanted.");
  m.def("adaln_backward", &backward, release(),
        "dr, dh, kept, y, gate, scale, shift as above; stats, dx, dy, dgate, dscale, dshift, h by address; batch, "
        "tokens, width, rms, from_x, threads.");
}

}  // namespace fastdit
