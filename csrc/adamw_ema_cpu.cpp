// AdamW with EMAs over lists of CPU tensors, in one pass over memory. adamw_ema.h defines the update of one weight.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "adamw_ema.h"

namespace py = pybind11;

namespace fastdit {
namespace {

using Addresses = std::vector<std::uintptr_t>;
constexpr std::int64_t kChunk = 1 << 14;  // weights that a thread owns at a time

float* floats(std::uintptr_t address) { return reinterpret_cast<float*>(address); }

std::uint16_t* halves(std::uintptr_t address) { return reinterpret_cast<std::uint16_t*>(address); }

// A part of one tensor.
struct Chunk {
  std::size_t tensor;
  std::int64_t begin, end;
};

// Cut tensors into chunks, whose borders depend on the sizes only.
std::vector<Chunk> split(const std::vector<std::int64_t>& sizes) {
  std::vector<Chunk> chunks;
  for (std::size_t t = 0; t < sizes.size(); ++t)
    for (std::int64_t begin = 0; begin < sizes[t]; begin += kChunk)
      chunks.push_back({t, begin, std::min(begin + kChunk, sizes[t])});
  return chunks;
}

// The tensors of one chunk. Every pointer is at the chunk's first weight. Gradient is float, or uint16_t for bf16.
template <class Gradient>
struct Span {
  std::int64_t size;
  float *weight, *exp_avg, *exp_avg_sq;
  const Gradient* gradient;
  float* averages[kMaxAverages];
  std::uint16_t* copy;
};

// Update one chunk. Each weight's gradient, weight, moments and EMAs are read once and held in registers; the weight,
// the moments, the EMAs and the bf16 copy are written once.
template <class Gradient, int kAverages, bool kCopy>
void update(const Rule& rule, const Correction now, const float scale, const Span<Gradient>& span) {
  const Rule r = rule;  // a local copy, which stores through the pointers below cannot alias
  const Span<Gradient> s = span;
#pragma omp simd
  for (std::int64_t i = 0; i < s.size; ++i) {
    float weight = s.weight[i], exp_avg = s.exp_avg[i], exp_avg_sq = s.exp_avg_sq[i];
    adamw(r, now, to_float(s.gradient[i]) * scale, weight, exp_avg, exp_avg_sq);
    s.weight[i] = weight, s.exp_avg[i] = exp_avg, s.exp_avg_sq[i] = exp_avg_sq;
    for (int a = 0; a < kAverages; ++a) s.averages[a][i] = r.averages[a](s.averages[a][i], weight);
    if (kCopy) s.copy[i] = to_bfloat16(weight);
  }
}

template <class Gradient>
using Update = void (*)(const Rule&, Correction, float, const Span<Gradient>&);

// Return the instance of `update` for this number of EMAs.
template <class Gradient, bool kCopy>
Update<Gradient> with_averages(std::size_t count) {
  static constexpr Update<Gradient> kUpdates[] = {update<Gradient, 0, kCopy>, update<Gradient, 1, kCopy>,
                                                  update<Gradient, 2, kCopy>, update<Gradient, 3, kCopy>,
                                                  update<Gradient, 4, kCopy>};
  return kUpdates[count];
}

// The lists of tensors of one call, by address. `copies` may be empty.
struct Lists {
  const Addresses &weights, &gradients, &exp_avgs, &exp_avg_sqs;
  const std::vector<Addresses>& averages;
  const Addresses& copies;
  const std::vector<std::int64_t>& sizes;
};

// Update all chunks. Threads take them in any order, which changes no bit.
template <class Gradient>
void update_chunks(const Rule& rule, const std::vector<Correction>& corrections, float scale, const Lists& lists,
                   int threads) {
  const std::size_t count = lists.averages.size();
  const Update<Gradient> update =
      lists.copies.empty() ? with_averages<Gradient, false>(count) : with_averages<Gradient, true>(count);
  const auto chunks = split(lists.sizes);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (std::size_t c = 0; c < chunks.size(); ++c) {
    const auto [t, begin, end] = chunks[c];
    Span<Gradient> span{end - begin,
                        floats(lists.weights[t]) + begin,
                        floats(lists.exp_avgs[t]) + begin,
                        floats(lists.exp_avg_sqs[t]) + begin,
                        reinterpret_cast<const Gradient*>(lists.gradients[t]) + begin,
                        {},
                        nullptr};
    for (std::size_t a = 0; a < count; ++a) span.averages[a] = floats(lists.averages[a][t]) + begin;
    if (!lists.copies.empty()) span.copy = halves(lists.copies[t]) + begin;
    update(rule, corrections[t], scale, span);
  }
}

// Update all tensors by one step, unless `skip` is set.
void adamw_ema(const Addresses& weights, const Addresses& gradients, const Addresses& exp_avgs,
               const Addresses& exp_avg_sqs, const Addresses& steps, const std::vector<Addresses>& averages,
               const Addresses& copies, bool bf16_gradients, const std::vector<std::int64_t>& sizes,
               const std::vector<double>& decays, double lr, double beta1, double beta2, double eps,
               double weight_decay, std::uintptr_t skip, std::uintptr_t grad_scale, int threads) {
  if (decays.size() > kMaxAverages) throw py::value_error("too many EMAs for one pass");
  if (*floats(skip) != 0) return;
  // Count the steps, which give each tensor's bias corrections.
  const Rule rule(lr, beta1, beta2, eps, weight_decay, static_cast<int>(decays.size()), decays.data());
  std::vector<Correction> corrections;
  for (const auto step : steps) corrections.emplace_back(lr, beta1, beta2, *floats(step) += 1);
  const float scale = grad_scale ? *floats(grad_scale) : 1;

  const Lists lists{weights, gradients, exp_avgs, exp_avg_sqs, averages, copies, sizes};
  (bf16_gradients ? update_chunks<std::uint16_t> : update_chunks<float>)(rule, corrections, scale, lists, threads);
}

typedef float Floats __attribute__((vector_size(32), aligned(4)));  // gradients need not be 32-byte aligned
typedef double Doubles __attribute__((vector_size(64)));
typedef std::uint16_t Halves __attribute__((vector_size(16), aligned(2)));
typedef std::uint32_t Bits __attribute__((vector_size(32)));

// Widen eight neighboring numbers, which is exact.
FASTDIT_INLINE void load(const float* from, Doubles& to) {
  to = __builtin_convertvector(*reinterpret_cast<const Floats*>(from), Doubles);
}

FASTDIT_INLINE void load(const std::uint16_t* from, Doubles& to) {
  const Bits bits = __builtin_convertvector(*reinterpret_cast<const Halves*>(from), Bits) << 16;
  Floats wide;
  std::memcpy(&wide, &bits, sizeof wide);
  to = __builtin_convertvector(wide, Doubles);
}

// Return the sum of squares of a chunk, in double, so that no finite gradient overflows. The order is fixed, so the
// number of threads changes no bit.
template <class Gradient>
double sum_of_squares(const Gradient* values, std::int64_t size) {
  constexpr int kLanes = 8, kVectors = 4;
  Doubles sums[kVectors] = {};
  std::int64_t i = 0;
  for (; i + kLanes * kVectors <= size; i += kLanes * kVectors) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Doubles part;
      load(values + i + v * kLanes, part);
      sums[v] += part * part;
    }
  }
  double sum = 0;
  for (const Doubles& vector : sums)
    for (int lane = 0; lane < kLanes; ++lane) sum += vector[lane];
  for (; i < size; ++i) sum += static_cast<double>(to_float(values[i])) * to_float(values[i]);
  return sum;
}

// Return the sum of squares over all tensors. Each chunk has one thread, and the chunks are added in order.
double squared_norm(const Addresses& tensors, bool bf16, const std::vector<std::int64_t>& sizes, int threads) {
  const auto chunks = split(sizes);
  std::vector<double> sums(chunks.size());
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (std::size_t c = 0; c < chunks.size(); ++c) {
    const auto [t, begin, end] = chunks[c];
    sums[c] = bf16 ? sum_of_squares(halves(tensors[t]) + begin, end - begin)
                   : sum_of_squares(floats(tensors[t]) + begin, end - begin);
  }
  double sum = 0;
  for (const double part : sums) sum += part;
  return sum;
}

}  // namespace

void bind_adamw_ema(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("adamw_ema", &adamw_ema, release(), py::arg("weights"), py::arg("gradients"), py::arg("exp_avgs"),
        py::arg("exp_avg_sqs"), py::arg("steps"), py::arg("averages"), py::arg("copies"),
        py::arg("bf16_gradients"), py::arg("sizes"), py::arg("decays"), py::arg("lr"), py::arg("beta1"),
        py::arg("beta2"), py::arg("eps"), py::arg("weight_decay"), py::arg("skip"), py::arg("grad_scale"),
        py::arg("threads"),
        "Update lists of contiguous fp32 tensors, given by address, by one step. Gradients are fp32 or all bf16. "
        "`skip` is the address of a float, `grad_scale` that of a float or 0.");
  m.def("squared_norm", &squared_norm, release(), py::arg("tensors"), py::arg("bf16"), py::arg("sizes"),
        py::arg("threads"), "Return the sum of squares over contiguous fp32 or bf16 tensors, given by address.");
}

}  // namespace fastdit
