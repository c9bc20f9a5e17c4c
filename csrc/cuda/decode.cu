// SPDX-License-Identifier: Apache-2.0
// Decoding on the GPU: softmax, expectation, stride, box and clipping in one kernel   (arXiv 2006.04388, eq. 5)
//
//   pred      [locations, 4, bins] dtype read, any strides      boxes       [locations, 4] A write
//   points    [locations, 2]       A     read                   limit       [locations, 2] A read
//   scale     [locations]          A     read                   grad_points [locations, 2] A write
//   grad_pred [locations, 4, bins] dtype write, contiguous
// Layout: a tile of up to 128 rows, 32 locations, in shared memory, one thread a row (bin_tile.h): a side's coordinate
// depends on its own row alone.
// Bytes per element: forward sizeof(dtype), backward 2·sizeof(dtype) (the softmax is recomputed from the logits).
// Accumulator: float (double for double). Repeatable bit for bit: a thread sums its row's bins in order.
#include "gfl/decode.h"

#include "bin_tile.h"
#include "terms/distance.h"

namespace gfl::cuda {
namespace {

// One side's coordinate from its expected distance in bins. `scale` comes back too.
template <class A>
__device__ __forceinline__ Clamped<A> side_of(const DecodeInput& in, int64_t location, int side, A mean, A& scale) {
  const int64_t outer = in.pred.count_outer, inner = in.pred.count_inner;
  const A* point = static_cast<const A*>(in.points) + location_offset(in.stride_points, outer, inner, location);
  scale = static_cast<const A*>(in.scale)[location_offset(in.stride_scale, outer, inner, location)];
  const A* limit = static_cast<const A*>(in.limit);
  if (limit != nullptr) limit += location_offset(in.stride_limit, outer, inner, location);
  return clipped_side_at(point[side & 1], mul_rn(mean, scale), side, limit);
}

template <class T>
__global__ void __launch_bounds__(kTileThreads, kTilesPerSm)
    decode_forward_kernel(DecodeInput in, TileShape shape, int64_t rows, acc_t<T>* boxes) {
  using A = acc_t<T>;
  const BinTile<A> tile = tile_in_shared<A>(shape);
  for_tiles(rows, shape.rows, [&](int64_t first, int count) {
    load_tile<T>(in.pred, first, count, shape, tile);
    const int r = static_cast<int>(threadIdx.x);
    if (r >= count) return;
    const TileRow<A> logit{tile.values + r * shape.pitch};
    const A mean = bin_softmax<A>(static_cast<int>(in.pred.bins), logit).mean();
    A scale;
    boxes[first + r] = side_of(in, (first + r) / 4, r % 4, mean, scale).value;  // a tile holds whole locations
  });
}

template <class T>
__global__ void __launch_bounds__(kTileThreads, kTilesPerSm)
    decode_backward_kernel(DecodeInput in, TileShape shape, int64_t rows, const acc_t<T>* grad_boxes, T* grad_pred,
                           acc_t<T>* grad_points) {
  using A = acc_t<T>;
  const int bins = static_cast<int>(in.pred.bins);
  const BinTile<A> tile = tile_in_shared<A>(shape);
  for_tiles(rows, shape.rows, [&](int64_t first, int count) {
    load_tile<T>(in.pred, first, count, shape, tile);
    const int r = static_cast<int>(threadIdx.x), side = r % 4;
    const int64_t location = (first + r) / 4;
    if (r < count) {
      A* x = tile.values + r * shape.pitch;
      const TileRow<A> logit{x};
      const BinSoftmax<A> s = bin_softmax<A>(bins, logit);
      A scale;
      const bool inside = side_of(in, location, side, s.mean(), scale).inside;
      const A through = inside ? grad_boxes[first + r] : A(0);
      tile.extra[r] = through;
      scale = through * side_sign<A>(side) * scale;
      for (int j = 0; j < bins && grad_pred != nullptr; ++j) {
        const A g = scale * s.mean_gradient(j, std::exp(logit(j) - s.max) / s.total);
        x[j] = is_beyond(x[j]) ? A(0) : g;
      }
    }
    __syncthreads();
    if (grad_points != nullptr && r < count && side < 2) {
      grad_points[location * 2 + side] = tile.extra[r] + tile.extra[r + 2];
    }
    if (grad_pred != nullptr) store_tile(grad_pred, first, count, bins, shape, tile);
  });
}

}  // namespace

cudaError_t decode_forward(const DecodeInput& in, void* boxes, cudaStream_t stream) {
  if (in.pred.rows() == 0) return cudaSuccess;
  dispatch(in.pred.dtype, [&](auto t) {
    using T = decltype(t);
    using A = acc_t<T>;
    const TileShape shape = tile_shape<A>(in.pred);
    GFL_LAUNCH(decode_forward_kernel<T>, tile_grid(in.pred, shape), dim3(kTileThreads), shape.bytes, stream, in, shape,
               in.pred.rows(), static_cast<A*>(boxes));
  });
  return cudaGetLastError();
}

cudaError_t decode_backward(const DecodeInput& in, const void* grad_boxes, void* grad_pred, void* grad_points,
                            cudaStream_t stream) {
  if (in.pred.rows() == 0) return cudaSuccess;
  dispatch(in.pred.dtype, [&](auto t) {
    using T = decltype(t);
    using A = acc_t<T>;
    const TileShape shape = tile_shape<A>(in.pred);
    GFL_LAUNCH(decode_backward_kernel<T>, tile_grid(in.pred, shape), dim3(kTileThreads), shape.bytes, stream, in, shape,
               in.pred.rows(), static_cast<const A*>(grad_boxes), static_cast<T*>(grad_pred),
               static_cast<A*>(grad_points));
  });
  return cudaGetLastError();
}

}  // namespace gfl::cuda
