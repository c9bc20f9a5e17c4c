// SPDX-License-Identifier: Apache-2.0
// Distribution focal loss on the GPU, optionally with the expected distance: −wₗ log p[l] − wᵣ log p[r] and Σ_j p[j]·j,
// p = softmax(pred[m])   (arXiv 2006.04388, eq. 6 and 5).
//
//   pred        [rows, bins] dtype read, any strides     target                    [rows] A     read, or these three:
//   loss        [rows]       A     write                 left                      [rows] int64 read
//   distance    [rows]       A     write                 weight_left, weight_right [rows] A     read
//   grad_pred   [rows, bins] dtype write, contiguous     grad_target or grad_weight_left, grad_weight_right as these
// Layout: a tile of up to 128 rows in shared memory, one thread a row (bin_tile.h).
// Bytes per element: forward sizeof(dtype), backward 2·sizeof(dtype) (the softmax is recomputed from the logits).
// Accumulator: float (double for double). Repeatable bit for bit: a thread sums its row's bins in order.
#include "gfl/dfl.h"

#include "bin_tile.h"

namespace gfl::cuda {
namespace {

template <class A> __device__ __forceinline__ TwoBins<A> bins_of(const DflInput& in, int64_t row) {
  const int bins = static_cast<int>(in.pred.bins);
  if (in.target != nullptr) {
    return bins_at_position(static_cast<const A*>(in.target)[row], bins, in.ignore_out_of_range);
  }
  return bins_given(in.left[row], static_cast<const A*>(in.weight_left)[row],
                    static_cast<const A*>(in.weight_right)[row], bins);
}

template <class T>
__global__ void __launch_bounds__(kTileThreads, kTilesPerSm)
    dfl_forward_kernel(DflInput in, TileShape shape, int64_t rows, acc_t<T>* loss, acc_t<T>* distance) {
  using A = acc_t<T>;
  const BinTile<A> tile = tile_in_shared<A>(shape);
  for_tiles(rows, shape.rows, [&](int64_t first, int count) {
    load_tile<T>(in.pred, first, count, shape, tile);
    const int r = static_cast<int>(threadIdx.x);
    if (r >= count) return;
    const TileRow<A> logit{tile.values + r * shape.pitch};
    const BinSoftmax<A> s = bin_softmax<A>(static_cast<int>(in.pred.bins), logit);
    if (distance != nullptr) distance[first + r] = s.mean();
    const TwoBins<A> b = bins_of<A>(in, first + r);
    const A value = two_bin_loss(b, two_bin_entropy(s, b, logit));
    loss[first + r] = b.counted ? value : A(0);
  });
}

template <class T>
__global__ void __launch_bounds__(kTileThreads, kTilesPerSm)
    dfl_backward_kernel(DflInput in, TileShape shape, int64_t rows, const acc_t<T>* grad_loss,
                        const acc_t<T>* grad_distance, DflGradients out) {
  using A = acc_t<T>;
  const int bins = static_cast<int>(in.pred.bins);
  const BinTile<A> tile = tile_in_shared<A>(shape);
  for_tiles(rows, shape.rows, [&](int64_t first, int count) {
    load_tile<T>(in.pred, first, count, shape, tile);
    const int r = static_cast<int>(threadIdx.x);
    const int64_t row = first + r;
    if (r < count) {
      A* x = tile.values + r * shape.pitch;
      const TileRow<A> logit{x};
      const BinSoftmax<A> s = bin_softmax<A>(bins, logit);
      const TwoBins<A> b = bins_of<A>(in, row);
      const TwoBinEntropy<A> entropy = two_bin_entropy(s, b, logit);
      const A scale = grad_loss[row];
      const A scale_distance = grad_distance != nullptr ? grad_distance[row] : A(0);
      if (out.target != nullptr) {
        static_cast<A*>(out.target)[row] = b.counted && !b.clamped ? scale * (entropy.right - entropy.left) : A(0);
      }
      if (out.weight_left != nullptr) static_cast<A*>(out.weight_left)[row] = scale * entropy.left;
      if (out.weight_right != nullptr) static_cast<A*>(out.weight_right)[row] = scale * entropy.right;
      for (int j = 0; j < bins && out.pred != nullptr; ++j) {
        const A p = std::exp(logit(j) - s.max) / s.total;
        A g = b.counted ? scale * two_bin_gradient(b, j, p) : A(0);
        if (grad_distance != nullptr) g += scale_distance * s.mean_gradient(j, p);
        x[j] = is_beyond(x[j]) ? A(0) : g;
      }
    }
    if (out.pred == nullptr) return;
    __syncthreads();
    store_tile(static_cast<T*>(out.pred), first, count, bins, shape, tile);
  });
}

}  // namespace

cudaError_t dfl_forward(const DflInput& in, void* loss, void* distance, cudaStream_t stream) {
  if (in.pred.rows() == 0) return cudaSuccess;
  dispatch(in.pred.dtype, [&](auto t) {
    using T = decltype(t);
    using A = acc_t<T>;
    const TileShape shape = tile_shape<A>(in.pred);
    GFL_LAUNCH(dfl_forward_kernel<T>, tile_grid(in.pred, shape), dim3(kTileThreads), shape.bytes, stream, in, shape,
               in.pred.rows(), static_cast<A*>(loss), static_cast<A*>(distance));
  });
  return cudaGetLastError();
}

cudaError_t dfl_backward(const DflInput& in, const void* grad_loss, const void* grad_distance, const DflGradients& out,
                         cudaStream_t stream) {
  if (in.pred.rows() == 0) return cudaSuccess;
  dispatch(in.pred.dtype, [&](auto t) {
    using T = decltype(t);
    using A = acc_t<T>;
    const TileShape shape = tile_shape<A>(in.pred);
    GFL_LAUNCH(dfl_backward_kernel<T>, tile_grid(in.pred, shape), dim3(kTileThreads), shape.bytes, stream, in, shape,
               in.pred.rows(), static_cast<const A*>(grad_loss), static_cast<const A*>(grad_distance), out);
  });
  return cudaGetLastError();
}

}  // namespace gfl::cuda
