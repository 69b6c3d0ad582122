// AdamW with EMAs over lists of CUDA tensors: a separate library with a C interface, which builds without torch.
//
// The tensors' addresses are passed as a kernel argument, `kTensors` at a time: a ZeRO partition takes one launch, a
// model of 300 tensors takes nine. A block owns one chunk of one tensor and moves 16 bytes a thread at a time where all
// addresses are aligned. Nothing here waits for the device: kernels read the skip flag and the gradients' scale there.
#include <cuda_runtime.h>

#include <cstdint>

#include "adamw_ema.h"

namespace fastdit {
namespace {

constexpr int kThreads = 256;
constexpr int kTensors = 36;                     // 4 KB of kernel arguments hold this many
constexpr int64_t kChunk = 8 * 4 * kThreads;     // weights that a block owns in the update
constexpr int64_t kNormChunk = 64 * 4 * kThreads;  // gradients that a block owns in the norm

// One tensor of an update: addresses of its weights, gradients, moments and EMAs.
struct Tensor {
  float *weight, *exp_avg, *exp_avg_sq, *step;
  const void* gradient;  // fp32, or bf16 in all tensors of a launch
  float* averages[kMaxAverages];
  uint16_t* copy;  // bf16, or null
  Correction* correction;
  int64_t size;
  bool aligned;
};

// The items of one launch, and the first block of each.
template <class Item>
struct Batch {
  int count;
  unsigned first_block[kTensors];
  Item items[kTensors];

  // Return the item that block `block` belongs to, by binary search.
  __device__ int owner(unsigned block) const {
    int low = 0, high = count - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (first_block[middle] <= block) low = middle;
      else high = middle - 1;
    }
    return low;
  }
};

// The argument of the update kernels.
struct Step {
  Rule rule;
  double lr, beta1, beta2;
  const float* skip;        // if it points to anything but 0, nothing changes
  const float* grad_scale;  // or null
  Batch<Tensor> tensors;
};
static_assert(sizeof(Step) <= 4096, "a kernel's arguments hold 4 KB");

// One tensor of the norm.
struct Gradient {
  const void* values;  // fp32, or bf16 in all tensors of a launch
  int64_t size;
  bool aligned;
};

// Load kWide neighboring floats: four in one 16-byte access, or one.
template <int kWide>
__device__ void load(const float* from, float (&to)[kWide]) {
  if constexpr (kWide == 4) {
    const float4 four = *reinterpret_cast<const float4*>(from);
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
  } else {
    to[0] = *from;
  }
}

// Load kWide neighboring bf16 numbers: four in one 8-byte access, or one.
template <int kWide>
__device__ void load(const uint16_t* from, float (&to)[kWide]) {
  if constexpr (kWide == 4) {
    const ushort4 four = *reinterpret_cast<const ushort4*>(from);
    to[0] = to_float(four.x), to[1] = to_float(four.y), to[2] = to_float(four.z), to[3] = to_float(four.w);
  } else {
    to[0] = to_float(*from);
  }
}

template <int kWide>
__device__ void store(float* to, const float (&from)[kWide]) {
  if constexpr (kWide == 4)
    *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
  else
    *to = from[0];
}

template <int kWide>
__device__ void store_bfloat16(uint16_t* to, const float (&from)[kWide]) {
  if constexpr (kWide == 4)
    *reinterpret_cast<ushort4*>(to) =
        make_ushort4(to_bfloat16(from[0]), to_bfloat16(from[1]), to_bfloat16(from[2]), to_bfloat16(from[3]));
  else
    *to = to_bfloat16(from[0]);
}

// Update kWide neighboring weights, which one thread owns. It reads gradient, weight, moments and EMAs once, computes
// in registers, and writes all but the gradient once: 28 bytes a weight, or 26 with a bf16 gradient (Value uint16_t),
// 8 more for each EMA and 2 for a bf16 copy.
template <class Value, int kAverages, int kWide>
__device__ void update_at(const Rule& rule, const Correction& now, float scale, const Tensor& t, int64_t i) {
  float weight[kWide], gradient[kWide], exp_avg[kWide], exp_avg_sq[kWide], average[kAverages + 1][kWide];
  load(static_cast<const Value*>(t.gradient) + i, gradient);
  load(t.weight + i, weight);
  load(t.exp_avg + i, exp_avg);
  load(t.exp_avg_sq + i, exp_avg_sq);
#pragma unroll
  for (int a = 0; a < kAverages; ++a) load(t.averages[a] + i, average[a]);
#pragma unroll
  for (int k = 0; k < kWide; ++k) {
    adamw(rule, now, gradient[k] * scale, weight[k], exp_avg[k], exp_avg_sq[k]);
#pragma unroll
    for (int a = 0; a < kAverages; ++a) average[a][k] = rule.averages[a](average[a][k], weight[k]);
  }
  store(t.weight + i, weight);
  store(t.exp_avg + i, exp_avg);
  store(t.exp_avg_sq + i, exp_avg_sq);
#pragma unroll
  for (int a = 0; a < kAverages; ++a) store(t.averages[a] + i, average[a]);
  if (t.copy) store_bfloat16(t.copy + i, weight);
}

// Count the step and compute the bias corrections, which `adamw_ema_update` reads. A thread owns one tensor.
__global__ void adamw_ema_advance(const __grid_constant__ Step step) {
  if (*step.skip != 0) return;
  const Tensor& t = step.tensors.items[threadIdx.x];
  *t.step += 1;
  *t.correction = Correction(step.lr, step.beta1, step.beta2, *t.step);
}

// Update one chunk of one tensor, which a block owns. Threads take groups of four weights by turns, then single weights
// where the tensor is not aligned or its size is not a multiple of four.
template <class Value, int kAverages>
__global__ void __launch_bounds__(kThreads) adamw_ema_update(const __grid_constant__ Step step) {
  if (*step.skip != 0) return;
  const int owner = step.tensors.owner(blockIdx.x);
  const Tensor& t = step.tensors.items[owner];
  const Correction now = *t.correction;
  const float scale = step.grad_scale ? *step.grad_scale : 1;
  const int64_t begin = (blockIdx.x - step.tensors.first_block[owner]) * kChunk;
  const int64_t end = begin + kChunk < t.size ? begin + kChunk : t.size;
  const int64_t fours = t.aligned ? begin + (end - begin) / 4 * 4 : begin;
  for (int64_t i = begin + 4 * threadIdx.x; i < fours; i += 4 * kThreads)
    update_at<Value, kAverages, 4>(step.rule, now, scale, t, i);
  for (int64_t i = fours + threadIdx.x; i < end; i += kThreads)
    update_at<Value, kAverages, 1>(step.rule, now, scale, t, i);
}

// Return, in thread 0, the sum of `value` over the block's threads, in a fixed order: a tree in shared memory.
__device__ double block_sum(double value) {
  __shared__ double sums[kThreads];
  sums[threadIdx.x] = value;
  for (unsigned half = kThreads / 2; half; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  return sums[0];
}

// Store a block's sum of squares in its own place of `out`. The sum is in double, so that no finite gradient overflows,
// and without atomics, so that it has the same bits in every run. A block owns one chunk and reads it once.
template <class Value>
__global__ void __launch_bounds__(kThreads)
    squared_norm_chunks(const __grid_constant__ Batch<Gradient> gradients, double* out) {
  const int owner = gradients.owner(blockIdx.x);
  const Gradient& g = gradients.items[owner];
  const int64_t begin = (blockIdx.x - gradients.first_block[owner]) * kNormChunk;
  const int64_t end = begin + kNormChunk < g.size ? begin + kNormChunk : g.size;
  const int64_t fours = g.aligned ? begin + (end - begin) / 4 * 4 : begin;
  const Value* const all = static_cast<const Value*>(g.values);
  double sum = 0;
  for (int64_t i = begin + 4 * threadIdx.x; i < fours; i += 4 * kThreads) {
    float values[4];
    load(all + i, values);
#pragma unroll
    for (const double value : values) sum += value * value;
  }
  for (int64_t i = fours + threadIdx.x; i < end; i += kThreads) {
    const double value = to_float(all[i]);
    sum += value * value;
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

// Add up the blocks' sums, in one block.
__global__ void __launch_bounds__(kThreads) squared_norm_total(const double* parts, int64_t count, double* out) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += parts[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *out = sum;
}

template <class... Expected, class... Given>
cudaError_t launch(void (*kernel)(Expected...), unsigned blocks, unsigned threads, cudaStream_t stream,
                   const Given&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks), config.blockDim = dim3(threads), config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

const char* text(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

bool aligned(const void* address, int bytes) { return reinterpret_cast<uintptr_t>(address) % bytes == 0; }

bool aligned(const Tensor& t, int averages, bool bf16_gradients) {
  bool all = aligned(t.weight, 16) && aligned(t.gradient, bf16_gradients ? 8 : 16) && aligned(t.exp_avg, 16) &&
             aligned(t.exp_avg_sq, 16) && aligned(t.copy, 8);
  for (int a = 0; a < averages; ++a) all = all && aligned(t.averages[a], 16);
  return all;
}

unsigned blocks_of(int64_t size, int64_t chunk) { return static_cast<unsigned>((size + chunk - 1) / chunk); }

void (*const kUpdates[2][kMaxAverages + 1])(Step) = {
    {adamw_ema_update<float, 0>, adamw_ema_update<float, 1>, adamw_ema_update<float, 2>, adamw_ema_update<float, 3>,
     adamw_ema_update<float, 4>},
    {adamw_ema_update<uint16_t, 0>, adamw_ema_update<uint16_t, 1>, adamw_ema_update<uint16_t, 2>,
     adamw_ema_update<uint16_t, 3>, adamw_ema_update<uint16_t, 4>}};

}  // namespace
}  // namespace fastdit

// The C interface. All addresses are on the device, except for those of the lists themselves. Functions that launch
// kernels return an error's text or null. Empty tensors are not allowed.
extern "C" {

// Return why these kernels cannot run on the current device, or null.
const char* fastdit_cuda_problem() {
  using namespace fastdit;
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, adamw_ema_update<float, 0>);
  (void)cudaGetLastError();  // clear the error, so that the next caller does not find it
  return text(error);
}

// Launch one step. `averages` holds `average_count` lists of `count` EMA addresses, one after the other. `copies` and
// `grad_scale` may be null. Gradients are bf16 where `bf16_gradients` is not 0. `corrections` is scratch of 2 * count
// floats.
const char* fastdit_adamw_ema(int count, float* const* weights, const void* const* gradients, float* const* exp_avgs,
                              float* const* exp_avg_sqs, float* const* steps, int average_count,
                              float* const* averages, uint16_t* const* copies, int bf16_gradients,
                              const int64_t* sizes, const double* decays, double lr, double beta1, double beta2,
                              double eps, double weight_decay, const float* skip, const float* grad_scale,
                              float* corrections, cudaStream_t stream) {
  using namespace fastdit;
  if (average_count > kMaxAverages) return "too many EMAs for one pass";
  const auto update = kUpdates[bf16_gradients != 0][average_count];
  Step step = {};
  step.rule = Rule(lr, beta1, beta2, eps, weight_decay, average_count, decays);
  step.lr = lr, step.beta1 = beta1, step.beta2 = beta2, step.skip = skip, step.grad_scale = grad_scale;
  for (int first = 0; first < count; first += kTensors) {
    // Fill the kernel argument with the next tensors.
    auto& batch = step.tensors;
    batch.count = count - first < kTensors ? count - first : kTensors;
    unsigned blocks = 0;
    for (int k = 0; k < batch.count; ++k) {
      const int i = first + k;
      Tensor t = {weights[i], exp_avgs[i], exp_avg_sqs[i], steps[i], gradients[i], {}, copies ? copies[i] : nullptr,
                  reinterpret_cast<Correction*>(corrections) + i, sizes[i], false};
      for (int a = 0; a < average_count; ++a) t.averages[a] = averages[a * count + i];
      t.aligned = aligned(t, average_count, bf16_gradients);
      batch.items[k] = t;
      batch.first_block[k] = blocks;
      blocks += blocks_of(t.size, kChunk);
    }
    // Count the step first: the update reads what follows from it.
    if (const char* error = text(launch(adamw_ema_advance, 1, batch.count, stream, step))) return error;
    if (const char* error = text(launch(update, blocks, kThreads, stream, step))) return error;
  }
  return nullptr;
}

// Return how many doubles of scratch `fastdit_squared_norm` needs.
int64_t fastdit_squared_norm_scratch(int count, const int64_t* sizes) {
  int64_t blocks = 0;
  for (int i = 0; i < count; ++i) blocks += fastdit::blocks_of(sizes[i], fastdit::kNormChunk);
  return blocks;
}

// Launch the sum of squares over all tensors, which is stored in `out`. They are bf16 where `bf16` is not 0.
const char* fastdit_squared_norm(int count, const void* const* tensors, int bf16, const int64_t* sizes,
                                 double* scratch, double* out, cudaStream_t stream) {
  using namespace fastdit;
  const auto chunks = bf16 ? squared_norm_chunks<uint16_t> : squared_norm_chunks<float>;
  int64_t parts = 0;
  for (int first = 0; first < count; first += kTensors) {
    Batch<Gradient> batch = {};
    batch.count = count - first < kTensors ? count - first : kTensors;
    unsigned blocks = 0;
    for (int k = 0; k < batch.count; ++k) {
      const int i = first + k;
      batch.items[k] = {tensors[i], sizes[i], aligned(tensors[i], bf16 ? 8 : 16)};
      batch.first_block[k] = blocks;
      blocks += blocks_of(sizes[i], kNormChunk);
    }
    const auto ended = launch(chunks, blocks, kThreads, stream, batch, scratch + parts);
    if (const char* error = text(ended)) return error;
    parts += blocks;
  }
  return text(launch(squared_norm_total, 1, kThreads, stream, scratch, parts, out));
}
}
