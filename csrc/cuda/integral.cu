// SPDX-License-Identifier: Apache-2.0
// Integral on the GPU: distance[row] = Σ_j softmax(pred[row])[j] · j            (arXiv 2006.04388, eq. 5)
//
//   pred     [rows, bins] dtype read, any strides     grad_pred [rows, bins] dtype write, contiguous
//   distance [rows]       A     write
// Layout: a tile of up to 128 rows in shared memory, one thread a row (bin_tile.h).
// Bytes per element: forward sizeof(dtype), backward 2·sizeof(dtype) (the softmax is recomputed from the logits).
// Accumulator: float (double for double). Repeatable bit for bit: a thread sums its row's bins in order.
#include "gfl/integral.h"

#include "bin_tile.h"

namespace gfl::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kTileThreads, kTilesPerSm)
    integral_forward_kernel(BinRows pred, TileShape shape, int64_t rows, acc_t<T>* distance) {
  using A = acc_t<T>;
  const BinTile<A> tile = tile_in_shared<A>(shape);
  for_tiles(rows, shape.rows, [&](int64_t first, int count) {
    load_tile<T>(pred, first, count, shape, tile);
    const int r = static_cast<int>(threadIdx.x);
    if (r >= count) return;
    const TileRow<A> logit{tile.values + r * shape.pitch};
    distance[first + r] = bin_softmax<A>(static_cast<int>(pred.bins), logit).mean();
  });
}

template <class T>
__global__ void __launch_bounds__(kTileThreads, kTilesPerSm)
    integral_backward_kernel(BinRows pred, TileShape shape, int64_t rows, const acc_t<T>* grad_distance, T* grad_pred) {
  using A = acc_t<T>;
  const int bins = static_cast<int>(pred.bins);
  const BinTile<A> tile = tile_in_shared<A>(shape);
  for_tiles(rows, shape.rows, [&](int64_t first, int count) {
    load_tile<T>(pred, first, count, shape, tile);
    const int r = static_cast<int>(threadIdx.x);
    if (r < count) {
      A* x = tile.values + r * shape.pitch;
      const TileRow<A> logit{x};
      const BinSoftmax<A> s = bin_softmax<A>(bins, logit);
      const A scale = grad_distance[first + r];
      for (int j = 0; j < bins; ++j) {
        const A g = scale * s.mean_gradient(j, std::exp(logit(j) - s.max) / s.total);
        x[j] = is_beyond(x[j]) ? A(0) : g;
      }
    }
    __syncthreads();
    store_tile(grad_pred, first, count, bins, shape, tile);
  });
}

}  // namespace

cudaError_t integral_forward(const BinRows& pred, void* distance, cudaStream_t stream) {
  if (pred.rows() == 0) return cudaSuccess;
  dispatch(pred.dtype, [&](auto t) {
    using T = decltype(t);
    using A = acc_t<T>;
    const TileShape shape = tile_shape<A>(pred);
    GFL_LAUNCH(integral_forward_kernel<T>, tile_grid(pred, shape), dim3(kTileThreads), shape.bytes, stream, pred, shape,
               pred.rows(), static_cast<A*>(distance));
  });
  return cudaGetLastError();
}

cudaError_t integral_backward(const BinRows& pred, const void* grad_distance, void* grad_pred, cudaStream_t stream) {
  if (pred.rows() == 0) return cudaSuccess;
  dispatch(pred.dtype, [&](auto t) {
    using T = decltype(t);
    using A = acc_t<T>;
    const TileShape shape = tile_shape<A>(pred);
    GFL_LAUNCH(integral_backward_kernel<T>, tile_grid(pred, shape), dim3(kTileThreads), shape.bytes, stream, pred,
               shape, pred.rows(), static_cast<const A*>(grad_distance), static_cast<T*>(grad_pred));
  });
  return cudaGetLastError();
}

}  // namespace gfl::cuda
