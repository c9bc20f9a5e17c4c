// SPDX-License-Identifier: Apache-2.0
// What the plain C++ tests share: checks that count failures, a seeded generator, and memory that a launcher can
// access.
//
// With GFL_TEST_CUDA the buffers are the device's, on a GPU or on the host layer.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "gfl/types.h"
#include "terms/scalar.h"

#if defined(GFL_TEST_CUDA)
#include <cuda_runtime.h>
#endif

namespace gfl::testing {

inline int& failures() {
  static int count = 0;
  return count;
}

inline int result(const char* name) {
  std::printf("%s: %s (%d failures)\n", name, failures() == 0 ? "passed" : "FAILED", failures());
  return failures() == 0 ? 0 : 1;
}

// The first few failures are printed with their place; all are counted. `main` returns result("<stem>").
#define CHECK(condition, ...)                                           \
  do {                                                                  \
    if (!(condition) && ++gfl::testing::failures() <= 20) {             \
      std::printf("%s:%d: %s fails: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                         \
      std::printf("\n");                                                \
    }                                                                   \
  } while (0)

#if defined(GFL_TEST_CUDA)
#define CHECK_CUDA(call)                                                                     \
  do {                                                                                       \
    const cudaError_t error_ = (call);                                                       \
    if (error_ != cudaSuccess) {                                                             \
      std::printf("%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(error_)); \
      std::exit(1);                                                                          \
    }                                                                                        \
  } while (0)
#endif

// |got − want| ≤ absolute + relative·|want|; two NaN agree, and two equal infinities.
inline bool close(double got, double want, double relative, double absolute) {
  if (want != want || got != got) return want != want && got != got;
  return got == want || std::fabs(got - want) <= absolute + relative * std::fabs(want);
}

// splitmix64: the same numbers on every platform.
class Generator {
 public:
  explicit Generator(uint64_t seed) : state_(seed) {}
  uint64_t bits() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  double uniform(double low = 0, double high = 1) {
    return low + (high - low) * static_cast<double>(bits() >> 11) * 0x1p-53;
  }
  int64_t integer(int64_t low, int64_t high) {  // [low, high)
    return low + static_cast<int64_t>(bits() % static_cast<uint64_t>(high - low));
  }
  double normal(double scale = 1) {
    const double radius = std::sqrt(-2 * std::log(1 - uniform()));
    return scale * radius * std::cos(6.283185307179586 * uniform());
  }

 private:
  uint64_t state_;
};

// An array that a launcher can read and write: filled from the host, read back to it, of exactly the size asked for.
template <class T> class Buffer {
 public:
  explicit Buffer(const std::vector<T>& values) : size_(values.size()) {
#if defined(GFL_TEST_CUDA)
    CHECK_CUDA(cudaMalloc(reinterpret_cast<void**>(&data_), bytes() == 0 ? 1 : bytes()));
    if (size_ != 0) CHECK_CUDA(cudaMemcpy(data_, values.data(), bytes(), cudaMemcpyHostToDevice));
#else
    data_ = static_cast<T*>(std::malloc(bytes() == 0 ? 1 : bytes()));
    for (size_t i = 0; i < size_; ++i) data_[i] = values[i];
#endif
  }
  // Filled with a byte pattern that is a NaN in every floating type, so that what a kernel leaves unwritten shows.
  explicit Buffer(size_t size) : Buffer(garbage(size)) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
#if defined(GFL_TEST_CUDA)
    cudaFree(data_);
#else
    std::free(data_);
#endif
  }

  T* data() { return data_; }
  const T* data() const { return data_; }
  size_t size() const { return size_; }
  std::vector<T> read() const {
    std::vector<T> values(size_);
#if defined(GFL_TEST_CUDA)
    CHECK_CUDA(cudaDeviceSynchronize());
    if (size_ != 0) CHECK_CUDA(cudaMemcpy(values.data(), data_, bytes(), cudaMemcpyDeviceToHost));
#else
    for (size_t i = 0; i < size_; ++i) values[i] = data_[i];
#endif
    return values;
  }

 private:
  static std::vector<T> garbage(size_t size) {
    std::vector<T> values(size);
    unsigned char* raw = reinterpret_cast<unsigned char*>(values.data());
    for (size_t i = 0; i < size * sizeof(T); ++i) raw[i] = 0xff;
    return values;
  }
  size_t bytes() const { return size_ * sizeof(T); }

  T* data_ = nullptr;
  size_t size_;
};

// Doubles as elements of T, and the doubles that those elements hold.
template <class T> std::vector<T> rounded(const std::vector<double>& values) {
  std::vector<T> result(values.size());
  for (size_t i = 0; i < values.size(); ++i) store(&result[i], static_cast<acc_t<T>>(values[i]));
  return result;
}
template <class T> std::vector<double> widened(const std::vector<T>& values) {
  std::vector<double> result(values.size());
  for (size_t i = 0; i < values.size(); ++i) result[i] = static_cast<double>(load(&values[i]));
  return result;
}

}  // namespace gfl::testing
