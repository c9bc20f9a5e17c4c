// SPDX-License-Identifier: Apache-2.0
// The class maps of a YOLO head, and of the others with β = 2, as background.
#include "../head_tile.h"
#include "background.h"
#include "gfl/head.h"

namespace gfl::GFL_ISA {
namespace {

template <class Loss, bool kLoss, bool kGrad, class T>
void background(HeadTile<const T> in, int64_t count, int64_t classes, float scale, float* sums, HeadTile<T> out) {
  if (in.location == 1 && (!kGrad || out.location == 1)) {
    return background_columns<Loss, kHeadTile, kLoss, kGrad>(in.data, in.channel, count, classes, scale, sums, out.data,
                                                             out.channel);
  }
  const bool contiguous = in.channel == 1 && (!kGrad || out.channel == 1);
  for (int64_t i = 0; i < count; ++i, in.data += in.location, out.data += kGrad ? out.location : 0) {
    const float sum = contiguous ? background_row<Loss, kLoss, kGrad>(in.data, classes, scale, out.data)
                                 : background_row<Loss, kLoss, kGrad>(in.data, in.channel, classes, -1 - kWidth, scale,
                                                                      out.data, out.channel);
    if (kLoss) sums[i] = sum;
  }
}

template <class F> void dispatch_loss(HeadLossKind kind, const F& f) {
  if (kind == HeadLossKind::yolo) f(SoftBce{});
  else f(Qfl{});
}

}  // namespace

// Of `count` locations up to kHeadTile: the losses to `sums`, `scale` times their gradients to `out`; either may be
// null.
void head_background(HeadLossKind kind, DType dtype, HeadTile<const void> in, int64_t count, int64_t classes,
                     float scale, float* sums, HeadTile<void> out) {
  dispatch_loss(kind, [&](auto loss) {
    using Loss = decltype(loss);
    dispatch_float(dtype, [&](auto t) {
      using T = decltype(t);
      const HeadTile<const T> from{static_cast<const T*>(in.data), in.location, in.channel};
      const HeadTile<T> to{static_cast<T*>(out.data), out.location, out.channel};
      if (sums == nullptr) background<Loss, false, true>(from, count, classes, scale, sums, to);
      else if (to.data == nullptr) background<Loss, true, false>(from, count, classes, scale, sums, to);
      else background<Loss, true, true>(from, count, classes, scale, sums, to);
    });
  });
}

// The loss of one location without that of the class `label`.
float head_background_without(HeadLossKind kind, DType dtype, const void* cls, int64_t channel, int64_t classes,
                              int64_t label) {
  float sum = 0.0f;
  dispatch_loss(kind, [&](auto loss) {
    dispatch_float(dtype, [&](auto t) {
      using T = decltype(t);
      const T* const first = static_cast<const T*>(cls);
      sum = background_row<decltype(loss), true, false, T>(first, channel, classes, label, 0.0f, nullptr, 0);
    });
  });
  return sum;
}

}  // namespace gfl::GFL_ISA
