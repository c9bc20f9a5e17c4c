// SPDX-License-Identifier: Apache-2.0
// Operators on rows of bins on the GPU, p = softmax(pred[row]):
//
//   integral  distance = Σ_j p[j]·j                                                  arXiv 2006.04388, eq. 5
//   decode    boxes: point ∓ scale · distance, clipped to the image
//   dfl       loss = −wₗ log p[l] − wᵣ log p[r], and the distance if asked for          arXiv 2006.04388, eq. 6
//
//   pred        [rows, bins] dtype read, any strides      grad_pred [rows, bins] dtype write, contiguous
//   distance    [rows]       A     write
//   decode:     points [locations, 2], scale [locations], limit [locations, 2] A read     boxes [locations, 4] A write
//               grad_points [locations, 2] A write
//   dfl:        target [rows] A read; or left [rows] int64, weight_left, weight_right [rows] A read
//               loss [rows] A write; grad_target or grad_weight_left, grad_weight_right [rows] A write
// Layout: a tile of up to 128 rows in shared memory, one thread per row (bin_tile.h); what a row gives is a functor's
// (terms/bin_operators.h). The four rows of a location are in the same tile.
// Bytes per element: forward sizeof(dtype), backward 2·sizeof(dtype) (the softmax is recomputed from the logits).
// Accumulator: float (double for double). Repeatable bit for bit: a thread sums its row's bins in order.
#include <type_traits>

#include "bin_tile.h"
#include "terms/bin_operators.h"

namespace gfl::cuda {
namespace {

template <class T, class Operator>
__global__ void __launch_bounds__(kTileThreads, kTilesPerSm)
    bins_forward_kernel(BinRows pred, TileShape shape, int64_t rows, Operator forward) {
  using A = acc_t<T>;
  const BinTile<A> tile = tile_in_shared<A>(shape);
  for_tiles(rows, shape.rows, [&](int64_t first, int count) {
    load_tile<T>(pred, first, count, shape, tile);
    const int r = static_cast<int>(threadIdx.x);
    if (r >= count) return;
    const TileRow<A> logit{tile.values + r * shape.pitch};
    forward(first + r, bin_softmax<A>(static_cast<int>(pred.bins), logit), logit);
  });
}

// grad_pred and, where rows are sides of boxes, grad_points; null where not wanted.
template <class T, class Operator>
__global__ void __launch_bounds__(kTileThreads, kTilesPerSm)
    bins_backward_kernel(BinRows pred, TileShape shape, int64_t rows, Operator backward, T* grad_pred,
                         acc_t<T>* grad_points) {
  using A = acc_t<T>;
  constexpr bool kSides = std::is_same_v<Operator, DecodeBackward<A>>;
  const int bins = static_cast<int>(pred.bins);
  const BinTile<A> tile = tile_in_shared<A>(shape);
  for_tiles(rows, shape.rows, [&](int64_t first, int count) {
    load_tile<T>(pred, first, count, shape, tile);
    const int r = static_cast<int>(threadIdx.x);
    if (r < count) {
      A* x = tile.values + r * shape.pitch;
      const TileRow<A> logit{x};
      const BinSoftmax<A> s = bin_softmax<A>(bins, logit);
      const auto gradient = backward(first + r, s, logit);
      if constexpr (kSides) tile.extra[r] = gradient.of_point;
      for (int j = 0; j < bins && grad_pred != nullptr; ++j) {
        const A g = gradient(s, j, std::exp(logit(j) - s.max) / s.total);
        x[j] = is_beyond(x[j]) ? A(0) : g;
      }
    }
    if (!kSides && grad_pred == nullptr) return;
    __syncthreads();
    if constexpr (kSides) {
      const int side = r % 4;
      if (grad_points != nullptr && r < count && side < 2) {
        grad_points[(first + r) / 4 * 2 + side] = tile.extra[r] + tile.extra[r + 2];
      }
    }
    if (grad_pred != nullptr) store_tile(grad_pred, first, count, bins, shape, tile);
  });
}

template <class T, class Operator>
void launch_forward(const BinRows& pred, const Operator& forward, cudaStream_t stream) {
  const TileShape shape = tile_shape<acc_t<T>>(pred);
  GFL_LAUNCH((bins_forward_kernel<T, Operator>), tile_grid(pred, shape), dim3(kTileThreads), shape.bytes, stream, pred,
             shape, pred.rows(), forward);
}

template <class T, class Operator>
void launch_backward(const BinRows& pred, const Operator& backward, void* grad_pred, void* grad_points,
                     cudaStream_t stream) {
  const TileShape shape = tile_shape<acc_t<T>>(pred);
  GFL_LAUNCH((bins_backward_kernel<T, Operator>), tile_grid(pred, shape), dim3(kTileThreads), shape.bytes, stream, pred,
             shape, pred.rows(), backward, static_cast<T*>(grad_pred), static_cast<acc_t<T>*>(grad_points));
}

// Calls body with a value of the logits' type, if there are rows.
template <class Body> cudaError_t for_dtype(const BinRows& pred, const Body& body) {
  if (pred.rows() == 0) return cudaSuccess;
  dispatch(pred.dtype, body);
  return cudaGetLastError();
}

}  // namespace

cudaError_t integral_forward(const BinRows& pred, void* distance, cudaStream_t stream) {
  return for_dtype(pred, [&](auto t) {
    using T = decltype(t);
    using A = acc_t<T>;
    launch_forward<T>(pred, IntegralForward<A>{static_cast<A*>(distance)}, stream);
  });
}

cudaError_t integral_backward(const BinRows& pred, const void* grad_distance, void* grad_pred, cudaStream_t stream) {
  return for_dtype(pred, [&](auto t) {
    using T = decltype(t);
    using A = acc_t<T>;
    launch_backward<T>(pred, IntegralBackward<A>{static_cast<const A*>(grad_distance)}, grad_pred, nullptr, stream);
  });
}

cudaError_t decode_forward(const DecodeInput& in, void* boxes, cudaStream_t stream) {
  return for_dtype(in.pred, [&](auto t) {
    using T = decltype(t);
    using A = acc_t<T>;
    launch_forward<T>(in.pred, DecodeForward<A>{in, static_cast<A*>(boxes)}, stream);
  });
}

cudaError_t decode_backward(const DecodeInput& in, const void* grad_boxes, void* grad_pred, void* grad_points,
                            cudaStream_t stream) {
  return for_dtype(in.pred, [&](auto t) {
    using T = decltype(t);
    using A = acc_t<T>;
    launch_backward<T>(in.pred, DecodeBackward<A>{in, static_cast<const A*>(grad_boxes)}, grad_pred, grad_points,
                       stream);
  });
}

cudaError_t dfl_forward(const DflInput& in, void* loss, void* distance, cudaStream_t stream) {
  return for_dtype(in.pred, [&](auto t) {
    using T = decltype(t);
    using A = acc_t<T>;
    launch_forward<T>(in.pred, DflForward<A>{in, static_cast<A*>(loss), static_cast<A*>(distance)}, stream);
  });
}

cudaError_t dfl_backward(const DflInput& in, const void* grad_loss, const void* grad_distance, const DflGradients& out,
                         cudaStream_t stream) {
  return for_dtype(in.pred, [&](auto t) {
    using T = decltype(t);
    using A = acc_t<T>;
    const DflBackward<A> backward{in, static_cast<const A*>(grad_loss), static_cast<const A*>(grad_distance), out};
    launch_backward<T>(in.pred, backward, out.pred, nullptr, stream);
  });
}

}  // namespace gfl::cuda
