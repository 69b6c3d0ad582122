// The update of one weight: AdamW (arXiv 1711.05101, algorithm 2), and then any number of EMAs of the weight.
//
// The CPU and the CUDA code share this definition. It uses plain fp32 operations, each rounded on its own. Compiled
// without contraction (-ffp-contract=off, --fmad=false), a result does not depend on the vector width, the number of
// threads, the compiler or the position of a weight in its tensor. A run therefore resumes to the bit on any machine.
#pragma once

#include <cmath>

#include "bfloat16.h"

namespace fastdit {

constexpr int kMaxAverages = 4;  // EMAs that one pass updates

// Computes a + weight * (b - a) from the nearer end, so that weight 0 gives a and weight 1 gives b, exactly.
struct Lerp {
  float step;  // weight, or weight - 1
  bool from_a;

  Lerp() = default;
  FASTDIT_INLINE explicit Lerp(double weight)
      : step(static_cast<float>(weight < 0.5 ? weight : weight - 1)), from_a(weight < 0.5) {}
  FASTDIT_INLINE float operator()(float a, float b) const { return (from_a ? a : b) + step * (b - a); }
};

// The constants that all weights of one call share.
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

// The bias corrections lr / (1 - beta1^t) and 1 / sqrt(1 - beta2^t), where t is the tensor's own number of steps,
// including the current one.
struct Correction {
  float step_size, root_scale;

  Correction() = default;
  FASTDIT_INLINE Correction(double lr, double beta1, double beta2, double steps)
      : step_size(static_cast<float>(lr / (1 - pow(beta1, steps)))),
        root_scale(static_cast<float>(1 / sqrt(1 - pow(beta2, steps)))) {}
};

// Update one weight and its moments. Decay and step are added first, so that the weight is rounded once.
FASTDIT_INLINE void adamw(const Rule& rule, const Correction& now, float gradient, float& weight, float& exp_avg,
                          float& exp_avg_sq) {
  exp_avg = rule.first_moment(exp_avg, gradient);
  exp_avg_sq = rule.beta2 * exp_avg_sq + rule.beta2_rest * gradient * gradient;
  const float denominator = sqrtf(exp_avg_sq) * now.root_scale + rule.eps;
  weight -= now.step_size * exp_avg / denominator + rule.shrink * weight;
}

}  // namespace fastdit
