// The adaLN operations on CPUs, one pass over memory forward and one backward. kernels/adaln.py defines what is computed.
//
// The stream x, r and its gradients are fp32. All else (y, the vectors, h and their gradients) is of type Branch: float,
// or uint16_t for bf16. Arithmetic and sums are fp32.
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

#include "bfloat16.h"

namespace py = pybind11;

namespace fastdit {
namespace {

using Address = std::uintptr_t;  // 0 stands for an absent tensor
// (address, stride of a sample, stride of a token), as Python passes a matrix.
using View = std::tuple<Address, std::int64_t, std::int64_t>;
constexpr int kLanes = 32;           // partial sums over a row
constexpr std::int64_t kChunk = 16;  // tokens that one thread sums over
constexpr std::int64_t kAhead = 2;   // tokens between the row in work and the row that is prefetched

template <class Number>
Number* pointer(Address address) {
  return reinterpret_cast<Number*>(address);
}

// A (batch, tokens, width) matrix given by strides, with inner stride 1. A vector per sample has token stride 0.
template <class Number>
struct Matrix {
  const Number* data;
  std::int64_t sample, token;

  explicit Matrix(const View& view)
      : data(pointer<Number>(std::get<0>(view))), sample(std::get<1>(view)), token(std::get<2>(view)) {}
  const Number* operator()(std::int64_t b, std::int64_t n) const { return data + b * sample + n * token; }
  explicit operator bool() const { return data; }
};

// Prefetch a row that is read soon. The processor's own prefetcher stops at each page, and is late for short rows.
template <class Number>
void fetch(const Number* row, std::int64_t width) {
  constexpr std::int64_t kLine = 64 / sizeof(Number);
  for (std::int64_t i = 0; i < width; i += kLine) __builtin_prefetch(row + i);
}

void store(float value, float& to) { to = value; }
void store(float value, std::uint16_t& to) { to = to_bfloat16(value); }

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
template <class Branch>
void add_gated(const float* x, const Branch* y, const Branch* gate, float* r, std::int64_t width) {
#pragma omp simd
  for (std::int64_t i = 0; i < width; ++i) r[i] = x[i] + to_float(gate[i]) * to_float(y[i]);
}

// Compute h = (value - mean) * rstd * (1 + scale) + shift for one row.
template <class Branch>
void modulate(const float* value, float mean, float rstd, const Branch* scale, const Branch* shift, Branch* h,
              std::int64_t width) {
#pragma omp simd
  for (std::int64_t i = 0; i < width; ++i)
    store((value[i] - mean) * rstd * (1 + to_float(scale[i])) + to_float(shift[i]), h[i]);
}

// Compute r, h and stats. A thread owns whole rows: it reads x and y once, and writes r, h and two statistics once.
template <class Branch>
void forward(const View& x_, const View& y_, const View& gate_, const View& scale_, const View& shift_, Address r_,
             Address h_, Address stats_, std::int64_t batch, std::int64_t tokens, std::int64_t width, float eps,
             bool rms, int threads) {
  const Matrix<float> x(x_);
  const Matrix<Branch> y(y_), gate(gate_), scale(scale_), shift(shift_);
  float *const rs = pointer<float>(r_), *const stats = pointer<float>(stats_);
  Branch* const hs = pointer<Branch>(h_);
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> buffer(rs ? 0 : width);
#pragma omp for schedule(static)
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
        float* const r = rs ? rs + row * width : buffer.data();
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
}

// Add up the chunks' sums, in order, to the gradient (batch, width) of one vector. A thread owns whole samples.
template <class Branch>
void add_chunks(const float* partials, Branch* gradient, std::int64_t batch, std::int64_t chunks, std::int64_t width) {
  std::vector<float> total(width);
#pragma omp for schedule(static) nowait
  for (std::int64_t b = 0; b < batch; ++b) {
    std::fill(total.begin(), total.end(), 0.0f);
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
      const float* const part = partials + (b * chunks + chunk) * 3 * width;
#pragma omp simd
      for (std::int64_t i = 0; i < width; ++i) total[i] += part[i];
    }
    for (std::int64_t i = 0; i < width; ++i) store(total[i], gradient[b * width + i]);
  }
}

// Compute all gradients. A thread owns chunks of kChunk tokens of a sample. For each row it reads dr, dh, the saved
// stream and y once, and writes dx, dy and h once. The chunk's sums for gate, scale and shift stay in the nearest
// cache, in the chunk's own part of `partials`; add_chunks adds them up after all rows.
template <class Branch>
void backward(const View& dr_, const View& dh_, const View& residual_, const View& y_, const View& gate_,
              const View& scale_, const View& shift_, Address stats_, Address dx_, Address dy_, Address dgate_,
              Address dscale_, Address dshift_, Address h_, std::int64_t batch, std::int64_t tokens,
              std::int64_t width, bool rms, bool from_x, int threads) {
  const Matrix<float> dr(dr_), residual(residual_);
  const Matrix<Branch> dh(dh_), y(y_), gate(gate_), scale(scale_), shift(shift_);
  const float* const stats = pointer<float>(stats_);
  float* const dxs = pointer<float>(dx_);
  Branch *const dys = pointer<Branch>(dy_), *const hs = pointer<Branch>(h_);
  Branch* const vectors[] = {pointer<Branch>(dgate_), pointer<Branch>(dscale_), pointer<Branch>(dshift_)};
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
          const Branch *const upstream = dh(b, n), *const factor = scale(b, n);
          const float* const around = gradient;
          const float mean = stats[2 * row], rstd = stats[2 * row + 1];
          const auto normed = [=](std::int64_t i) { return (value[i] - mean) * rstd; };
          const auto dnormed = [=](std::int64_t i) { return to_float(upstream[i]) * (1 + to_float(factor[i])); };
          const float along = sum(width, [=](std::int64_t i) { return dnormed(i) * normed(i); }) / width;
          const float average = rms ? 0 : sum(width, dnormed) / width;
          float* const dx = dxs + row * width;
#pragma omp simd
          for (std::int64_t i = 0; i < width; ++i) {
            dx[i] = around[i] + (dnormed(i) - normed(i) * along - average) * rstd;
            scale_sum[i] += to_float(upstream[i]) * normed(i);
            shift_sum[i] += to_float(upstream[i]);
          }
          if (hs) modulate(value, mean, rstd, factor, shift(b, n), hs + row * width, width);
          gradient = dx;
        }
        // Differentiate the gated sum.
        if (y) {
          const Branch *const update = y(b, n), *const open = gate(b, n);
          Branch* const dy = dys + row * width;
#pragma omp simd
          for (std::int64_t i = 0; i < width; ++i) {
            store(gradient[i] * to_float(open[i]), dy[i]);
            gate_sum[i] += gradient[i] * to_float(update[i]);
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
  constexpr auto kForward =
      "Fill r, h and stats. x, y, gate, scale and shift are (address, stride of a sample, stride of a token); r, h "
      "and stats are addresses of contiguous tensors; then batch, tokens, width, eps, rms and threads. Address 0 "
      "stands for an absent input or an unneeded result. x, r and stats are fp32; the others have the type that the "
      "name says.";
  constexpr auto kBackward =
      "Fill the gradients. dr, dh, the saved stream, y, gate, scale and shift are as in the forward pass; stats, dx, "
      "dy, dgate, dscale, dshift and h are addresses; then batch, tokens, width, rms, from_x and threads.";
  m.def("adaln_float32", &forward<float>, release(), kForward);
  m.def("adaln_bfloat16", &forward<std::uint16_t>, release(), kForward);
  m.def("adaln_backward_float32", &backward<float>, release(), kBackward);
  m.def("adaln_backward_bfloat16", &backward<std::uint16_t>, release(), kBackward);
}

}  // namespace fastdit
