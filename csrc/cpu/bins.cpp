// SPDX-License-Identifier: Apache-2.0
// Integral, decode and distribution focal loss on the CPU, rows [begin, end) of the caller's chunk. fp64 runs here, a
// row at a time with the functors of terms/bin_operators.h; every other dtype in the vector code of simd/bins.cpp.
#include "gfl/score.h"
#include "simd/bins.h"
#include "terms/bin_operators.h"

namespace gfl::cpu {
namespace {

template <class Operator> void forward_rows(const BinRows& pred, const Operator& forward, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const double* x = static_cast<const double*>(pred.data) + row_offset(pred, row);
    const auto logit = [&](int j) { return bounded_logit(x[j * pred.stride_bin]); };
    forward(row, bin_softmax<double>(static_cast<int>(pred.bins), logit), logit);
  }
}

// visit(row, gradient) comes before the row's gradient is written to `grad_pred`, if that is wanted.
template <class Operator, class Visit>
void backward_rows(const BinRows& pred, const Operator& backward, void* grad_pred, int64_t begin, int64_t end,
                   const Visit& visit) {
  const int bins = static_cast<int>(pred.bins);
  double e[kMaxBins];
  for (int64_t row = begin; row < end; ++row) {
    const double* x = static_cast<const double*>(pred.data) + row_offset(pred, row);
    const auto logit = [&](int j) { return bounded_logit(x[j * pred.stride_bin]); };
    const BinSoftmax<double> s = bin_softmax<double>(bins, logit, [&](int j, double value) { e[j] = value; });
    const auto gradient = backward(row, s, logit);
    visit(row, gradient);
    if (grad_pred == nullptr) continue;
    double* grad = static_cast<double*>(grad_pred) + row * bins;
    for (int j = 0; j < bins; ++j) {
      grad[j] = is_beyond(x[j * pred.stride_bin]) ? 0.0 : gradient(s, j, e[j] / s.total);
    }
  }
}

template <class Operator>
void backward_rows(const BinRows& pred, const Operator& backward, void* grad_pred, int64_t begin, int64_t end) {
  backward_rows(pred, backward, grad_pred, begin, end, [](int64_t, const auto&) {});
}

const double* doubles(const void* p) { return static_cast<const double*>(p); }
double* doubles(void* p) { return static_cast<double*>(p); }
const float* floats(const void* p) { return static_cast<const float*>(p); }
float* floats(void* p) { return static_cast<float*>(p); }

template <class A> void boxes_of_means(const DecodeInput& in, A* boxes, int64_t begin, int64_t end) {
  LocationIndex i = location_index(in.pred, begin);
  for (int64_t location = begin; location < end; ++location) {
    BoxSide<A> box(in, i, 0);
    if (++i.inner == in.pred.count_inner) i = {i.outer + 1, 0};
    for (box.side = 0; box.side < 4; ++box.side) {
      A& at = boxes[location * 4 + box.side];
      at = box.at(at).value;
    }
  }
}

// What the sum of the losses is multiplied by.
float scale_of(const DflReduction& reduction) {
  if (reduction.norm == nullptr) return static_cast<float>(reduction.factor);
  return static_cast<float>(reduction.factor / (*reduction.norm + static_cast<float>(kScoreNormEps)));
}

}  // namespace

void integral_forward(const BinRows& pred, void* distance, int64_t begin, int64_t end) {
  if (pred.dtype == DType::f64) return forward_rows(pred, IntegralForward<double>{doubles(distance)}, begin, end);
  GFL_BY_ISA(integral_forward, pred, floats(distance), begin, end);
}

void integral_backward(const BinRows& pred, const void* grad_distance, void* grad_pred, int64_t begin, int64_t end) {
  if (pred.dtype == DType::f64) {
    return backward_rows(pred, IntegralBackward<double>{doubles(grad_distance)}, grad_pred, begin, end);
  }
  GFL_BY_ISA(integral_backward, pred, floats(grad_distance), grad_pred, begin, end);
}

// The means are turned into coordinates in place: each location's point, stride and limit are looked up once.
void decode_forward(const DecodeInput& in, void* boxes, int64_t begin, int64_t end) {
  integral_forward(in.pred, boxes, begin * 4, end * 4);
  if (in.pred.dtype == DType::f64) boxes_of_means(in, doubles(boxes), begin, end);
  else boxes_of_means(in, floats(boxes), begin, end);
}

void decode_backward(const DecodeInput& in, const void* grad_boxes, void* grad_pred, void* grad_points, int64_t begin,
                     int64_t end) {
  begin *= 4, end *= 4;
  if (in.pred.dtype == DType::f64) {
    return backward_rows(in.pred, DecodeBackward<double>{in, doubles(grad_boxes)}, grad_pred, begin, end,
                         [&](int64_t row, const DecodeBackward<double>::Gradient& gradient) {
                           add_to_point(doubles(grad_points), row, gradient.of_point);
                         });
  }
  GFL_BY_ISA(decode_backward, in, floats(grad_boxes), grad_pred, floats(grad_points), begin, end);
}

void dfl_forward(const DflInput& in, void* loss, void* distance, int64_t begin, int64_t end) {
  if (in.pred.dtype == DType::f64) {
    return forward_rows(in.pred, DflForward<double>{in, doubles(loss), doubles(distance)}, begin, end);
  }
  GFL_BY_ISA(dfl_forward, in, floats(loss), floats(distance), begin, end);
}

void dfl_backward(const DflInput& in, const void* grad_loss, const void* grad_distance, const DflGradients& out,
                  int64_t begin, int64_t end) {
  if (in.pred.dtype == DType::f64) {
    return backward_rows(in.pred, DflBackward<double>{in, doubles(grad_loss), doubles(grad_distance), out}, out.pred,
                         begin, end);
  }
  GFL_BY_ISA(dfl_backward, in, floats(grad_loss), floats(grad_distance), out, begin, end);
}

void dfl_forward_keeping(const DflInput& in, float* loss, float* distance, const DflKept& kept, int64_t begin,
                         int64_t end) {
  GFL_BY_ISA(dfl_forward_keeping, in, loss, distance, kept, begin, end);
}

double dfl_sum_keeping(const DflInput& in, const DflReduction& reduction, float* distance, const DflKept& kept,
                       int64_t begin, int64_t end) {
  GFL_BY_ISA(dfl_sum_keeping, in, reduction.weight, distance, kept, begin, end);
}

float dfl_reduce(const DflReduction& reduction, const double* sums, int64_t chunks) {
  double total = 0;
  for (int64_t i = 0; i < chunks; ++i) total += sums[i];
  return static_cast<float>(scale_of(reduction) * total);
}

void dfl_finish(const DflInput& in, const DflReduction* reduction, const float* grad_loss, const float* grad_distance,
                const DflKept& kept, int64_t begin, int64_t end) {
  if (reduction == nullptr) {
    GFL_BY_ISA(dfl_finish, in, grad_loss, grad_distance, kept, begin, end);
  }
  const float scale = *grad_loss * scale_of(*reduction);
  GFL_BY_ISA(dfl_finish_reduced, in, reduction->weight, scale, grad_distance, kept, begin, end);
}

}  // namespace gfl::cpu
