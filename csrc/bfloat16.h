// Conversions between fp32 and bf16, for the CPU and the CUDA code. A bf16 number is held as its 16 bits.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FASTDIT_INLINE __host__ __device__ __forceinline__
#else
#define FASTDIT_INLINE inline __attribute__((always_inline))
#endif

namespace fastdit {

// Round to nearest, ties to even. Any NaN becomes the quiet NaN, as in torch.
FASTDIT_INLINE uint16_t to_bfloat16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// Return a bf16 number as fp32, which is exact.
FASTDIT_INLINE float to_float(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float wide;
  memcpy(&wide, &bits, sizeof wide);
  return wide;
}

FASTDIT_INLINE float to_float(float value) { return value; }

}  // namespace fastdit
