// As much of CUDA as csrc/ uses, on the CPU, so that kernels are tested where there is no GPU: blocks run one after the
// other, and a block's threads by turns, each up to the next __syncthreads. `g++ -x c++ -I tests/cuda_on_cpu csrc/X.cu`.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(threads)

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
inline const char* cudaGetErrorString(cudaError_t) { return "an error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

struct dim3 {
  unsigned x;
  dim3(unsigned x = 1) : x(x) {}
};
inline dim3 threadIdx, blockIdx;

struct Block {
  std::function<void()> body;
  ucontext_t scheduler;
  std::vector<ucontext_t> threads;
  std::vector<char> done;
  std::vector<char> stacks;
};
inline Block block;

inline void __syncthreads() { swapcontext(&block.threads[threadIdx.x], &block.scheduler); }

inline void run_thread() {
  block.body();
  block.done[threadIdx.x] = true;
}

inline void run_block(unsigned threads) {
  constexpr std::size_t kStack = 1 << 15;
  block.threads.resize(threads), block.stacks.resize(threads * kStack), block.done.assign(threads, false);
  for (unsigned t = 0; t < threads; ++t) {
    getcontext(&block.threads[t]);
    block.threads[t].uc_stack.ss_sp = block.stacks.data() + t * kStack;
    block.threads[t].uc_stack.ss_size = kStack;
    block.threads[t].uc_link = &block.scheduler;
    makecontext(&block.threads[t], run_thread, 0);
  }
  for (bool running = true; running;) {
    running = false;
    for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x)
      if (!block.done[threadIdx.x]) swapcontext(&block.scheduler, &block.threads[threadIdx.x]), running = true;
  }
}

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) ushort4 {
  uint16_t x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline ushort4 make_ushort4(uint16_t x, uint16_t y, uint16_t z, uint16_t w) { return {x, y, z, w}; }

struct cudaFuncAttributes {};
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return cudaSuccess;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};
template <class... Expected, class... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Given&&... arguments) {
  block.body = [&] { kernel(arguments...); };
  for (blockIdx.x = 0; blockIdx.x < config->gridDim.x; ++blockIdx.x) run_block(config->blockDim.x);
  return cudaSuccess;
}
