// SPDX-License-Identifier: Apache-2.0
// For launchers that take `const void*` and a DType: an array of a dtype known at run time, one way to call a launcher
// on either device, and a comparison of whole arrays.
#pragma once
#include <cstdlib>
#include <random>

#include "testing.h"

namespace gfl::testing {

// Differs from run to run and is printed; GFL_TEST_SEED repeats a run.
inline uint64_t fresh_seed() {
  const char* given = std::getenv("GFL_TEST_SEED");
  const uint64_t seed = given != nullptr ? std::strtoull(given, nullptr, 10) : std::random_device{}();
  std::printf("seed: %llu (repeat with GFL_TEST_SEED)\n", static_cast<unsigned long long>(seed));
  return seed;
}

inline std::vector<double> normals(Generator& generator, size_t count, double scale = 1) {
  std::vector<double> values(count);
  for (double& value : values) value = generator.normal(scale);
  return values;
}
inline std::vector<double> uniforms(Generator& generator, size_t count, double low = 0, double high = 1) {
  std::vector<double> values(count);
  for (double& value : values) value = generator.uniform(low, high);
  return values;
}

constexpr DType kDTypes[] = {DType::f32, DType::f16, DType::bf16, DType::f64};

// The dtype of arithmetic, losses and per-row inputs.
inline DType accumulator_of(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

// Half an ulp of 1.
inline double rounding(DType dtype) {
  switch (dtype) {
    case DType::f16: return 0x1p-11;
    case DType::bf16: return 0x1p-8;
    case DType::f64: return 0x1p-53;
    case DType::f32: break;
  }
  return 0x1p-24;
}

inline const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::f16: return "f16";
    case DType::bf16: return "bf16";
    case DType::f64: return "f64";
    case DType::f32: break;
  }
  return "f32";
}

// What a launcher reads and writes. Values come and go as doubles, rounded to the dtype.
class FloatBuffer {
 public:
  FloatBuffer(DType dtype, size_t count)
      : dtype_(dtype), count_(count), bytes_(count * dispatch(dtype, [](auto t) { return sizeof(t); })) {}
  FloatBuffer(DType dtype, const std::vector<double>& values)
      : dtype_(dtype), count_(values.size()), bytes_(dispatch(dtype, [&](auto t) {
          const auto typed = rounded<decltype(t)>(values);
          const auto* raw = reinterpret_cast<const unsigned char*>(typed.data());
          return std::vector<unsigned char>(raw, raw + typed.size() * sizeof(t));
        })) {}
  void* data() { return bytes_.data(); }
  void* at(size_t element) {
    return bytes_.data() + element * dispatch(dtype_, [](auto t) { return sizeof(t); });
  }
  size_t size() const { return count_; }
  std::vector<double> read(size_t from = 0) const {
    const std::vector<unsigned char> raw = bytes_.read();
    return dispatch(dtype_, [&](auto t) {
      std::vector<decltype(t)> typed(count_);
      if (count_ > 0) std::memcpy(typed.data(), raw.data(), raw.size());
      typed.erase(typed.begin(), typed.begin() + static_cast<std::ptrdiff_t>(from));
      return widened(typed);
    });
  }

 private:
  DType dtype_;
  size_t count_;
  Buffer<unsigned char> bytes_;
};

// Every element within tolerance · max(1, |want|); NaN and infinities must be equal.
inline void expect_close(const std::vector<double>& got, const std::vector<double>& want, double tolerance,
                         const char* what) {
  CHECK(got.size() == want.size(), "%s: %zu values, expected %zu", what, got.size(), want.size());
  for (size_t i = 0; i < got.size() && i < want.size(); ++i) {
    CHECK(close(got[i], want[i], tolerance, tolerance), "%s [%zu]: got %.17g, expected %.17g, tolerance %.3g", what, i,
          got[i], want[i], tolerance);
  }
}

}  // namespace gfl::testing

// GFL_RUN(count, launcher, args…) calls gfl::cpu::launcher(args…, begin, end) in small chunks of [0, count), or
// gfl::cuda::launcher(args…, stream) once.
#if defined(GFL_TEST_CUDA)
#define GFL_RUN(count, launcher, ...)                      \
  do {                                                     \
    CHECK_CUDA(gfl::cuda::launcher(__VA_ARGS__, nullptr)); \
    CHECK_CUDA(cudaDeviceSynchronize());                   \
  } while (0)
#else
#define GFL_RUN(count, launcher, ...)                               \
  for (int64_t gfl_begin = 0; gfl_begin < (count); gfl_begin += 11) \
  gfl::cpu::launcher(__VA_ARGS__, gfl_begin, gfl_begin + 11 < (count) ? gfl_begin + 11 : (count))
#endif
