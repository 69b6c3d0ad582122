// The update of one weight: AdamW (Loshchilov and Hutter 2019) and then any number of exponential moving averages.
//
// The one definition behind the CPU and the CUDA code. Plain fp32 multiplications and additions, each rounded by
// itself: compiled without contraction (-ffp-contract=off, --fmad=false), a result does not depend on the vector width,
// the number of threads, the compiler or the place of a weight in its tensor. So a run resumes to the bit anywhere.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FASTDIT_INLINE __host__ __device__ __forceinline__
#else
#define FASTDIT_INLINE inline __attribute__((always_inline))
#endif

namespace fastdit {

constexpr int kMaxAverages = 4;  // of one pass

// a + weight * (b - a), computed from the nearer end: weight 0 gives a and weight 1 gives b, exactly.
struct Lerp {
  float step;  // weight, or weight - 1
  bool from_a;

  Lerp() = default;
  FASTDIT_INLINE explicit Lerp(double weight)
      : step(static_cast<float>(weight < 0.5 ? weight : weight - 1)), from_a(weight < 0.5) {}
  FASTDIT_INLINE float operator()(float a, float b) const { return (from_a ? a : b) + step * (b - a); }
};

// What one call has in common for all its weights.
struct Rule {
  Lerp first_moment;
  float beta2, beta2_rest;  // beta2 and 1 - beta2
  float eps;
  float shrink;  // lr * weight_decay
  Lerp averages[kMaxAverages];

  Rule() = default;
  Rule(double lr, double beta1, double beta2, double eps, double weight_decay, int count, const double* decays)
      : first_moment(1 - beta1),
        beta2(static_cast<float>(beta2)),
        beta2_rest(static_cast<float>(1 - beta2)),
        eps(static_cast<float>(eps)),
        shrink(static_cast<float>(lr * weight_decay)) {
    for (int a = 0; a < count; ++a) averages[a] = Lerp(1 - decays[a]);
  }
};

// What depends on a tensor's own number of steps, the present one included: lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t).
struct Correction {
  float step_size, root_scale;

  Correction() = default;
  FASTDIT_INLINE Correction(double lr, double beta1, double beta2, double steps)
      : step_size(static_cast<float>(lr / (1 - pow(beta1, steps)))),
        root_scale(static_cast<float>(1 / sqrt(1 - pow(beta2, steps)))) {}
};

// Decay and step are added up before they leave the weight, so it is rounded once.
FASTDIT_INLINE void adamw(const Rule& rule, const Correction& now, float gradient, float& weight, float& exp_avg,
                          float& exp_avg_sq) {
  exp_avg = rule.first_moment(exp_avg, gradient);
  exp_avg_sq = rule.beta2 * exp_avg_sq + rule.beta2_rest * gradient * gradient;
  const float denominator = sqrtf(exp_avg_sq) * now.root_scale + rule.eps;
  weight -= now.step_size * exp_avg / denominator + rule.shrink * weight;
}

// To nearest, ties to even; a NaN becomes the quiet one, as in torch.
FASTDIT_INLINE uint16_t to_bfloat16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

}  // namespace fastdit
