// Random numbers by Philox4x32-10 on CPUs. kernels/philox.py defines what is computed.
//
// All functions of a word are polynomials in a fixed order, written out here. So no bit depends on the threads, the
// vector width or the C library.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace py = pybind11;

namespace fastdit {
namespace {

using Address = std::uintptr_t;
using Word = std::uint32_t;
enum Kind { kBits, kUniform, kNormal, kIntegers };  // as in kernels/philox.py
constexpr int kQuads = 64;                          // quads of a block
constexpr float kUnit = 1.0f / (1 << 24);

// The words of a block: word j of all quads stands together, as vector units want it.
struct Block {
  Word words[4][kQuads];
};

// Encrypt the counters of `quads` quads from `quad` on.
void encrypt(Word quad, int quads, std::uint64_t position, Word draw, std::uint64_t seed, Block& block) {
  const Word low = static_cast<Word>(position), high = static_cast<Word>(position >> 32);
#pragma omp simd
  for (int i = 0; i < quads; ++i) {
    Word c0 = quad + i, c1 = low, c2 = high, c3 = draw;
    Word k0 = static_cast<Word>(seed), k1 = static_cast<Word>(seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      const std::uint64_t left = std::uint64_t{0xD2511F53u} * c0, right = std::uint64_t{0xCD9E8D57u} * c2;
      c0 = static_cast<Word>(right >> 32) ^ c1 ^ k0, c1 = static_cast<Word>(right);
      c2 = static_cast<Word>(left >> 32) ^ c3 ^ k1, c3 = static_cast<Word>(left);
    }
    block.words[0][i] = c0, block.words[1][i] = c1, block.words[2][i] = c2, block.words[3][i] = c3;
  }
}

float unit(Word word) { return static_cast<float>(static_cast<std::int32_t>(word >> 8)) * kUnit; }

// Return log(x) for x in [2^-24, 1], by Cephes (logf): x = m 2^e with m in [sqrt(1/2), sqrt(2)).
inline float logarithm(float x) {
  std::int32_t bits;
  std::memcpy(&bits, &x, 4);
  const std::int32_t e = (bits - 0x3F3504F3) >> 23;
  bits -= e * (1 << 23);
  float m;
  std::memcpy(&m, &bits, 4);
  const float f = m - 1.0f, z = f * f, exponent = static_cast<float>(e);
  float y = 7.0376836292e-2f;
  y = y * f - 1.1514610310e-1f;
  y = y * f + 1.1676998740e-1f;
  y = y * f - 1.2420140846e-1f;
  y = y * f + 1.4249322787e-1f;
  y = y * f - 1.6668057665e-1f;
  y = y * f + 2.0000714765e-1f;
  y = y * f - 2.4999993993e-1f;
  y = y * f + 3.3333331174e-1f;
  y = y * f * z + exponent * -2.12194440e-4f - 0.5f * z;
  return f + y + exponent * 0.693359375f;
}

// Write two normal numbers for two words of each of `quads` quads, by Box and Muller. The angle is split into `turn`
// right angles and a rest x in [-pi / 4, pi / 4], whose sine and cosine are Cephes's (sinf, cosf).
void box_muller(const Word* a, const Word* b, int quads, float* first, float* second) {
#pragma omp simd
  for (int i = 0; i < quads; ++i) {
    const float r = std::sqrt(-2.0f * logarithm(1.0f - unit(a[i])));
    const std::int32_t whole = static_cast<std::int32_t>(b[i] >> 8), turn = (whole + (1 << 21)) >> 22;
    const float x = static_cast<float>(whole - turn * (1 << 22)) * 3.7450702829238413e-07f, z = x * x;
    const float sine = x + x * z * (-1.6666654611e-1f + z * (8.3321608736e-3f + z * -1.9515295891e-4f));
    const float cosine =
        1.0f - 0.5f * z + z * z * (4.166664568298827e-2f + z * (-1.388731625493765e-3f + z * 2.443315711809948e-5f));
    const float u = turn & 1 ? sine : cosine, v = turn & 1 ? cosine : sine;
    first[i] = r * ((turn + 1) & 2 ? -u : u);
    second[i] = r * (turn & 2 ? -v : v);
  }
}

// Write a block's numbers in their order: `left` of them, at most 4 * kQuads.
template <typename Number, typename Value>
void store(Number* out, std::int64_t left, const Value (&values)[4][kQuads]) {
  if (left >= 4 * kQuads) {
    for (int i = 0; i < kQuads; ++i)
      for (int j = 0; j < 4; ++j) out[4 * i + j] = static_cast<Number>(values[j][i]);
  } else {
    for (std::int64_t k = 0; k < left; ++k) out[k] = static_cast<Number>(values[k % 4][k / 4]);
  }
}

// Fill `out` (count, numel). A thread owns whole blocks of a sample, keeps their words in the nearest cache and writes
// each number once.
void philox(Address out, int kind, Word high, std::int64_t count, std::int64_t numel, std::uint64_t seed,
            std::uint64_t position, Word draw, int threads) {
  const std::int64_t blocks = (numel + 4 * kQuads - 1) / (4 * kQuads);
#pragma omp parallel for num_threads(threads) schedule(static) if (count * numel > 4096)
  for (std::int64_t task = 0; task < count * blocks; ++task) {
    const std::int64_t sample = task / blocks, first = task % blocks * (4 * kQuads);
    const std::int64_t at = sample * numel + first, left = std::min<std::int64_t>(numel - first, 4 * kQuads);
    const int quads = static_cast<int>((left + 3) / 4);
    Block block;
    encrypt(static_cast<Word>(first / 4), quads, position + sample, draw, seed, block);
    if (kind == kNormal || kind == kUniform) {
      float values[4][kQuads];
      if (kind == kNormal) {
        box_muller(block.words[0], block.words[1], quads, values[0], values[1]);
        box_muller(block.words[2], block.words[3], quads, values[2], values[3]);
      } else {
        for (int j = 0; j < 4; ++j)
          for (int i = 0; i < quads; ++i) values[j][i] = unit(block.words[j][i]);
      }
      store(reinterpret_cast<float*>(out) + at, left, values);
    } else {
      if (kind == kIntegers)
        for (int j = 0; j < 4; ++j)
          for (int i = 0; i < quads; ++i)
            block.words[j][i] = static_cast<Word>(std::uint64_t{block.words[j][i]} * high >> 32);
      store(reinterpret_cast<std::int64_t*>(out) + at, left, block.words);
    }
  }
}

}  // namespace

void bind_philox(py::module_& m) {
  m.def("philox", &philox, py::call_guard<py::gil_scoped_release>(),
        "Fill a contiguous tensor (count, numel) with random numbers: address, kind, high, count, numel, seed, "
        "position, draw and threads. Words and integers are int64, uniform and normal numbers float.");
}

}  // namespace fastdit
