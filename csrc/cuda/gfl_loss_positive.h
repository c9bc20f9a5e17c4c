// SPDX-License-Identifier: Apache-2.0
// One positive of the head's loss by a warp, eight lanes per side of its box; the arithmetic is that of
// terms/gfl_loss.h.
#pragma once
#include "runtime_dtype.h"
#include "terms/bins.h"
#include "terms/gfl_loss.h"
#include "terms/scalar.h"
#include "warp.h"

namespace gfl::cuda {

constexpr int kSideLanes = kWarp / 4;

// Reduces over the lanes of a side; the same result in each of them, from the same tree in every run.
template <class A, class Join> __device__ __forceinline__ A over_side(A x, const Join& join) {
  for (int offset = kSideLanes / 2; offset > 0; offset /= 2) x = join(x, __shfl_xor_sync(kFullMask, x, offset));
  return x;
}

// The distribution of this lane's side.
template <class A> struct SideLogits {
  const void* data;
  DType dtype;
  int64_t first, stride;  // offset of bin 0, and from bin to bin
  int bins;

  __device__ __forceinline__ A raw(int j) const { return load_as<A>(data, dtype, first + j * stride); }
  __device__ __forceinline__ A operator()(int j) const { return bounded_logit(raw(j)); }
};

template <class A> __device__ __forceinline__ BinSoftmax<A> side_softmax(const SideLogits<A>& logit) {
  const int lane = static_cast<int>(threadIdx.x) % kSideLanes;
  const auto add = [](A a, A b) { return a + b; };
  BinSoftmax<A> s{logit(0), A(0), A(0), 0};
#pragma unroll 1  // a lane has few bins, or classes: code unrolled for many would not run
  for (int j = lane; j < logit.bins; j += kSideLanes) {
    const A x = logit(j);
    if (x > s.max) {
      s.max = x;
      s.peak = j;
    }
  }
  // The lowest bin of the greatest logit; bin 0 if one is a NaN, which the sums below propagate.
  const A greatest = over_side(s.max, [](A a, A b) { return a > b ? a : b; });
  const int lowest = s.max == greatest ? s.peak : logit.bins;
  const int peak = over_side(lowest, [](int a, int b) { return a < b ? a : b; });
  s.max = greatest;
  s.peak = peak < logit.bins ? peak : 0;
#pragma unroll 1
  for (int j = lane; j < logit.bins; j += kSideLanes) {
    const A e = std::exp(logit(j) - s.max);
    s.total += e;
    s.moment += e * A(j - s.peak);
  }
  s.total = over_side(s.total, add);
  s.moment = over_side(s.moment, add);
  return s;
}

// One of four values, without an index that would move the array out of registers.
template <class A> __device__ __forceinline__ A of_side(const A (&values)[4], int side) {
  const A near = (side & 1) != 0 ? values[1] : values[0], far = (side & 1) != 0 ? values[3] : values[2];
  return (side & 2) != 0 ? far : near;
}

// What a warp knows of its positive.
template <class A> struct Positive {
  HeadGeometry<A> geometry;
  SideLogits<A> logit;  // of this lane's side
  BinSoftmax<A> softmax;
  A distance[4];
  int side;
};

template <class Head, class A>
__device__ __forceinline__ Positive<A> positive_at(const HeadLossInput& in, const HeadLevel& level,
                                                   const HeadPositive& p) {
  Positive<A> w;
  w.geometry = head_geometry<Head, A>(in, level, p);
  w.side = static_cast<int>(threadIdx.x) % kWarp / kSideLanes;
  const int bins = static_cast<int>(in.reg_max + 1);
  const int64_t* stride = level.reg_stride;
  w.logit = {level.reg, in.reg_dtype,
             p.image * stride[0] + int64_t(w.side) * bins * stride[1] + p.row * stride[2] + p.column * stride[3],
             stride[1], bins};
  A mean;
  if (has_distances<Head>(in)) {
    mean = w.logit.raw(0);
  } else {
    w.softmax = side_softmax(w.logit);
    mean = w.softmax.mean();
  }
#pragma unroll
  for (int side = 0; side < 4; ++side) w.distance[side] = __shfl_sync(kFullMask, mean, side * kSideLanes);
  return w;
}

template <class A> __device__ __forceinline__ A centre_of_side(const Positive<A>& w) {
  return (w.side & 1) != 0 ? w.geometry.centre_y : w.geometry.centre_x;
}

template <class Head, class A>
__device__ __forceinline__ TwoBins<A> bins_of_side(const HeadLossInput& in, const Positive<A>& w) {
  const A target = of_side(w.geometry.target, w.side);
  return head_bins<Head>(centre_of_side(w), target, w.side, static_cast<int>(in.reg_max));
}

template <class Head, class A>
__device__ __forceinline__ SideError<A> error_of_side(const HeadLossInput& in, const HeadLevel& level,
                                                      const Positive<A>& w) {
  const A target = of_side(w.geometry.target, w.side), distance = of_side(w.distance, w.side);
  return side_error<Head>(in, level, centre_of_side(w), target, w.side, distance);
}

// A quarter of the losses of the four sides, in every lane.
template <class Head, class A>
__device__ __forceinline__ A positive_dfl(const HeadLossInput& in, const HeadLevel& level, const Positive<A>& w) {
  A mine, sum = 0;
  if (has_distances<Head>(in)) {
    mine = error_of_side<Head>(in, level, w).value;
  } else {
    const TwoBins<A> b = bins_of_side<Head>(in, w);
    mine = b.counted ? two_bin_loss(b, two_bin_entropy(w.softmax, b, w.logit)) : A(0);
  }
#pragma unroll
  for (int side = 0; side < 4; ++side) sum += __shfl_sync(kFullMask, mine, side * kSideLanes);
  return sum / A(4);
}

// The largest class probability of a location, in every lane; NaN if one is.
template <class T>
__device__ __forceinline__ acc_t<T> largest_probability(const T* logits, int64_t stride, int64_t classes) {
  using A = acc_t<T>;
  const auto greater = [](A a, A b) { return b > a || b != b ? b : a; };
  A largest = load(logits);
#pragma unroll 1
  for (int64_t c = threadIdx.x % kWarp; c < classes; c += kWarp) largest = greater(largest, load(logits + c * stride));
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    largest = greater(largest, __shfl_xor_sync(kFullMask, largest, offset));
  }
  return bernoulli_from_logit<A>(largest, A(0)).p;
}

// Writes the gradient of the positive's sides.
template <class Head, class A>
__device__ __forceinline__ void positive_backward(const HeadLossInput& in, const HeadLevel& level,
                                                  const HeadGradients& out, const HeadPositive& p, const Positive<A>& w,
                                                  A by_box, A by_dfl) {
  const IouTerm<A> box = head_iou<Head>(w.geometry, w.distance, typename Head::Box{}, in.legacy);
  const A by_distance = by_box * side_sign<A>(w.side) * of_side(box.grad_pred, w.side);
  const int64_t* stride = out.reg_stride;
  const int64_t first =
      p.image * stride[0] + int64_t(w.side) * w.logit.bins * stride[1] + p.row * stride[2] + p.column * stride[3];
  if (has_distances<Head>(in)) {
    const A value = by_distance + by_dfl * error_of_side<Head>(in, level, w).slope;
    if (threadIdx.x % kSideLanes == 0) store_as<A>(out.reg, in.reg_dtype, first, value);
    return;
  }
  const TwoBins<A> b = bins_of_side<Head>(in, w);
#pragma unroll 1
  for (int j = static_cast<int>(threadIdx.x) % kSideLanes; j < w.logit.bins; j += kSideLanes) {
    const A raw = w.logit.raw(j), probability = std::exp(bounded_logit(raw) - w.softmax.max) / w.softmax.total;
    A value = by_distance * w.softmax.mean_gradient(j, probability);
    if (b.counted) value += by_dfl * two_bin_gradient(b, j, probability);
    store_as<A>(out.reg, in.reg_dtype, first + j * stride[1], is_beyond(raw) ? A(0) : value);
  }
}

}  // namespace gfl::cuda
