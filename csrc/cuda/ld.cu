// SPDX-License-Identifier: Apache-2.0
// Distillation with a temperature T on the GPU (arXiv 2102.12252, 1503.02531); formulas in terms/bins.h.
//   T²/n Σ_j q[j]·log(q[j]/p[j]), p = softmax(pred[m]/T), q = softmax(teacher[m]/T)
//
//   pred, teacher [rows, bins] dtype read, any strides     loss, grad_loss [rows] A write, read
//   grad_pred     [rows, bins] dtype write, contiguous
// Layout: a tile of rows of student and teacher in shared memory, moved in 16-byte accesses where alignment allows,
// with a power of two of lanes per row: one lane for up to 32 bins, a warp for 513 and more. Rows too long for a
// block's shared memory (6000 bins and more) are read from global memory in each pass, one warp per row.
// Bytes per element: forward 2·sizeof(dtype), backward 3·sizeof(dtype) (the softmaxes are recomputed).
// Accumulator: float (double for double). Repeatable bit for bit: a lane sums its bins in order, the lanes in a fixed
// tree.
#include "bin_tile.h"
#include "terms/bins.h"
#include "vec.h"
#include "warp.h"

namespace gfl::cuda {
namespace {

constexpr int kBinsPerLane = 32;  // at most, up to the 32 lanes of a warp

// How a block's tile of the student, the teacher or the gradient lies in global memory.
struct Side {
  int64_t stride_row, stride_bin;
  bool dense;    // each row begins where the one before ends
  bool vectors;  // 16-byte accesses
  bool by_rows;  // neighbouring rows are nearer to each other than neighbouring bins
};

struct Plan {
  int64_t rows;
  int bins, lanes, tile_rows, pitch;
  Side pred, teacher, grad;
};

template <class T> Side side_of(const Plan& plan, const void* data, int64_t stride_row, int64_t stride_bin) {
  Side side{stride_row, stride_bin, stride_bin == 1 && stride_row == plan.bins, false, false};
  const int64_t step = side.dense ? int64_t(plan.tile_rows) * plan.bins : stride_row;
  side.vectors = stride_bin == 1 && is_aligned(data) && step % kRun<T> == 0;
  side.by_rows = stride_bin != 1 && stride_row < stride_bin;
  return side;
}

// tile_rows is 0 where no row fits.
template <class T> Plan plan_of(const LdInput& in, const void* grad_pred) {
  Plan plan{in.rows, 0, 1, 0, 0, {}, {}, {}};
  if (in.bins * int64_t(2 * sizeof(acc_t<T>)) > int64_t(kTileBytes)) return plan;
  plan.bins = static_cast<int>(in.bins);
  while (plan.lanes < kWarp && plan.bins > kBinsPerLane * plan.lanes) plan.lanes *= 2;
  // An odd multiple of the lanes, so that no two threads of a warp share a bank.
  plan.pitch = plan.lanes * (((plan.bins + plan.lanes - 1) / plan.lanes) | 1);
  plan.tile_rows = kTileThreads / plan.lanes;
  while (plan.tile_rows * size_t(plan.pitch) * 2 * sizeof(acc_t<T>) > kTileBytes) plan.tile_rows /= 2;
  plan.pred = side_of<T>(plan, in.pred, in.pred_stride_row, in.pred_stride_bin);
  plan.teacher = side_of<T>(plan, in.teacher, in.teacher_stride_row, in.teacher_stride_bin);
  plan.grad = side_of<T>(plan, grad_pred, in.bins, 1);
  return plan;
}

// Calls visit(row, first bin, elements) for this thread's runs of a tile whose bins lie side by side. In a dense tile a
// run may extend over the end of a row.
template <int run, class Visit>
__device__ __forceinline__ void for_runs(bool dense, int bins, int count, const Visit& visit) {
  const int width = dense ? bins : (bins + run - 1) / run * run;
  const int first = static_cast<int>(threadIdx.x) * run, step = kTileThreads * run;
  const int row_step = step / width, bin_step = step % width;
  int row = first / width, bin = first % width;
  while (row < count) {
    const int left = (dense ? (count - row) * bins : bins) - bin;
    visit(row, bin, left < run ? left : run);
    row += row_step;
    bin += bin_step;
    if (bin >= width) {
      bin -= width;
      ++row;
    }
  }
}

// Loads `count` rows into `tile`.
template <class T, int run>
__device__ __forceinline__ void load_runs(const Plan& plan, const Side& side, const T* data, int count,
                                          acc_t<T>* tile) {
  for_runs<run>(side.dense, plan.bins, count, [&](int row, int bin, int many) {
    const T* from = data + row * side.stride_row + bin;
    T element[run];
    if (run > 1 && many == run) {
      if constexpr (run > 1) load_vec(from, element);
    } else {
#pragma unroll
      for (int v = 0; v < run; ++v) {
        if (v < many) element[v] = from[v];
      }
    }
#pragma unroll
    for (int v = 0; v < run; ++v) {
      if (v < many) tile[row * plan.pitch + bin] = load(&element[v]);
      if (++bin == plan.bins) bin = 0, ++row;
    }
  });
}

template <class T>
__device__ __forceinline__ void load_side(const Plan& plan, const Side& side, const void* data, int64_t first,
                                          int count, acc_t<T>* tile) {
  const T* from = static_cast<const T*>(data) + first * side.stride_row;
  if (side.vectors) return load_runs<T, kRun<T>>(plan, side, from, count, tile);
  if (side.stride_bin == 1) return load_runs<T, 1>(plan, side, from, count, tile);
  const int inner = side.by_rows ? count : plan.bins;
  for (int i = static_cast<int>(threadIdx.x); i < count * plan.bins; i += kTileThreads) {
    const int row = side.by_rows ? i % inner : i / inner, bin = side.by_rows ? i / inner : i % inner;
    tile[row * plan.pitch + bin] = load(from + row * side.stride_row + bin * side.stride_bin);
  }
}

template <class T, int run>
__device__ __forceinline__ void store_runs(const Plan& plan, T* to, int count, const acc_t<T>* tile) {
  for_runs<run>(true, plan.bins, count, [&](int row, int bin, int many) {
    T* at = to + row * plan.bins + bin;
    T element[run];
#pragma unroll
    for (int v = 0; v < run; ++v) {
      if (v < many) store(&element[v], tile[row * plan.pitch + bin]);
      if (++bin == plan.bins) bin = 0, ++row;
    }
    if (run > 1 && many == run) {
      if constexpr (run > 1) store_vec(at, element);
      return;
    }
#pragma unroll
    for (int v = 0; v < run; ++v) {
      if (v < many) at[v] = element[v];
    }
  });
}

// Reductions over the lanes of a row, the result in all of them; all threads of the warp take part.
template <class A> struct LargestOfLanes {
  int lanes;
  __device__ __forceinline__ A operator()(A x) const {
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
      const A other = __shfl_xor_sync(kFullMask, x, offset);
      x = other > x ? other : x;
    }
    return x;
  }
};
template <class A> struct SumOfLanes {
  int lanes;
  __device__ __forceinline__ A operator()(A x) const {
    for (int offset = lanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullMask, x, offset);
    return x;
  }
};

// A lane's part of a row in shared memory; `bins` is 0 where there is no row.
template <class A> struct TileWalk {
  A *pred, *teacher;
  int bins, lane, lanes;
  template <class Visit> __device__ __forceinline__ void operator()(const Visit& visit) const {
    for (int j = lane; j < bins; j += lanes) visit(pred[j], teacher[j]);
  }
};

// Loads a tile and calls body(has_row, row, walk) for this thread's row; without one its walk is empty.
template <class T, class Body>
__device__ __forceinline__ void for_tile_rows(const LdInput& in, const Plan& plan, int64_t first, int count,
                                              acc_t<T>* pred, acc_t<T>* teacher, const Body& body) {
  load_side<T>(plan, plan.pred, in.pred, first, count, pred);
  load_side<T>(plan, plan.teacher, in.teacher, first, count, teacher);
  __syncthreads();
  const int thread = static_cast<int>(threadIdx.x), row = thread / plan.lanes;
  const bool has_row = row < count;
  const int at = has_row ? row * plan.pitch : 0;
  body(has_row, first + row,
       TileWalk<acc_t<T>>{pred + at, teacher + at, has_row ? plan.bins : 0, thread % plan.lanes, plan.lanes});
}

template <class T>
__global__ void __launch_bounds__(kTileThreads, kTilesPerSm)
    ld_forward_kernel(LdInput in, Plan plan, LdScale<acc_t<T>> scale, acc_t<T>* loss) {
  using A = acc_t<T>;
  A* pred = shared<A>();
  for_tiles(plan.rows, plan.tile_rows, [&](int64_t first, int count) {
    for_tile_rows<T>(in, plan, first, count, pred, pred + plan.tile_rows * plan.pitch,
                     [&](bool has_row, int64_t row, const TileWalk<A>& walk) {
                       const LdSums<A> s =
                           ld_sums<false>(scale, walk, LargestOfLanes<A>{plan.lanes}, SumOfLanes<A>{plan.lanes});
                       if (has_row && walk.lane == 0) loss[row] = scale.loss * s.divergence();
                     });
  });
}

template <class T>
__global__ void __launch_bounds__(kTileThreads, kTilesPerSm)
    ld_backward_kernel(LdInput in, Plan plan, LdScale<acc_t<T>> scale, const acc_t<T>* grad_loss, T* grad_pred) {
  using A = acc_t<T>;
  A* pred = shared<A>();
  for_tiles(plan.rows, plan.tile_rows, [&](int64_t first, int count) {
    for_tile_rows<T>(in, plan, first, count, pred, pred + plan.tile_rows * plan.pitch,
                     [&](bool has_row, int64_t row, const TileWalk<A>& walk) {
                       const LdSums<A> s =
                           ld_sums<true>(scale, walk, LargestOfLanes<A>{plan.lanes}, SumOfLanes<A>{plan.lanes});
                       const A factor = has_row ? scale.gradient * grad_loss[row] : A(0);
                       const A of_pred = factor / s.total_pred, of_teacher = factor / s.total_teacher;
                       walk([&](A& e_a, A& e_b) { e_a = e_a < A(0) ? A(0) : e_a * of_pred - e_b * of_teacher; });
                     });
    __syncthreads();
    T* to = grad_pred + first * plan.bins;
    if (plan.grad.vectors) store_runs<T, kRun<T>>(plan, to, count, pred);
    else store_runs<T, 1>(plan, to, count, pred);
  });
}

// A lane's part of a row in global memory.
template <class T> struct GlobalWalk {
  using A = acc_t<T>;
  const T *pred, *teacher;
  int64_t step_pred, step_teacher, bins;

  __device__ __forceinline__ GlobalWalk(const LdInput& in, int64_t row)
      : pred(static_cast<const T*>(in.pred) + row * in.pred_stride_row),
        teacher(static_cast<const T*>(in.teacher) + row * in.teacher_stride_row),
        step_pred(in.pred_stride_bin),
        step_teacher(in.teacher_stride_bin),
        bins(in.bins) {}

  template <class Visit> __device__ __forceinline__ void operator()(const Visit& visit) const {
    for (int64_t j = threadIdx.x % kWarp; j < bins; j += kWarp) {
      A x = load(pred + j * step_pred), z = load(teacher + j * step_teacher);
      visit(x, z);
    }
  }
};

// Calls body(row, walk, sums) for rows too long for a tile, one warp per row.
template <class T, class Body>
__device__ __forceinline__ void for_long_rows(const LdInput& in, const LdScale<acc_t<T>>& scale, const Body& body) {
  using A = acc_t<T>;
  constexpr int per_block = kTileThreads / kWarp;
  for (int64_t row = int64_t(blockIdx.x) * per_block + threadIdx.x / kWarp; row < in.rows;
       row += int64_t(gridDim.x) * per_block) {
    const GlobalWalk<T> walk(in, row);
    body(row, walk, ld_sums<false>(scale, walk, LargestOfLanes<A>{kWarp}, SumOfLanes<A>{kWarp}));
  }
}

template <class T>
__global__ void __launch_bounds__(kTileThreads, kTilesPerSm)
    ld_long_forward_kernel(LdInput in, LdScale<acc_t<T>> scale, acc_t<T>* loss) {
  using A = acc_t<T>;
  for_long_rows<T>(in, scale, [&](int64_t row, const GlobalWalk<T>&, const LdSums<A>& s) {
    if (threadIdx.x % kWarp == 0) loss[row] = scale.loss * s.divergence();
  });
}

template <class T>
__global__ void __launch_bounds__(kTileThreads, kTilesPerSm)
    ld_long_backward_kernel(LdInput in, LdScale<acc_t<T>> scale, const acc_t<T>* grad_loss, T* grad_pred) {
  using A = acc_t<T>;
  for_long_rows<T>(in, scale, [&](int64_t row, const GlobalWalk<T>& walk, const LdSums<A>& s) {
    const A factor = scale.gradient * grad_loss[row];
    T* to = grad_pred + row * in.bins + threadIdx.x % kWarp;
    walk([&](A x, A z) {
      store(to, ld_gradient(scale, s, factor, x, z));
      to += kWarp;
    });
  });
}

}  // namespace

cudaError_t ld_forward(const LdInput& in, void* loss, cudaStream_t stream) {
  if (in.rows == 0) return cudaSuccess;
  dispatch(in.dtype, [&](auto t) {
    using T = decltype(t);
    using A = acc_t<T>;
    const Plan plan = plan_of<T>(in, nullptr);
    if (plan.tile_rows == 0) {
      GFL_LAUNCH(ld_long_forward_kernel<T>, strided_grid(in.rows, kTileThreads / kWarp), dim3(kTileThreads), 0, stream,
                 in, LdScale<A>(in), static_cast<A*>(loss));
      return;
    }
    const size_t bytes = size_t(plan.tile_rows) * plan.pitch * 2 * sizeof(A);
    GFL_LAUNCH(ld_forward_kernel<T>, strided_grid(in.rows, plan.tile_rows), dim3(kTileThreads), bytes, stream, in, plan,
               LdScale<A>(in), static_cast<A*>(loss));
  });
  return cudaGetLastError();
}

cudaError_t ld_backward(const LdInput& in, const void* grad_loss, void* grad_pred, cudaStream_t stream) {
  if (in.rows == 0) return cudaSuccess;
  dispatch(in.dtype, [&](auto t) {
    using T = decltype(t);
    using A = acc_t<T>;
    const Plan plan = plan_of<T>(in, grad_pred);
    if (plan.tile_rows == 0) {
      GFL_LAUNCH(ld_long_backward_kernel<T>, strided_grid(in.rows, kTileThreads / kWarp), dim3(kTileThreads), 0, stream,
                 in, LdScale<A>(in), static_cast<const A*>(grad_loss), static_cast<T*>(grad_pred));
      return;
    }
    const size_t bytes = size_t(plan.tile_rows) * plan.pitch * 2 * sizeof(A);
    GFL_LAUNCH(ld_backward_kernel<T>, strided_grid(in.rows, plan.tile_rows), dim3(kTileThreads), bytes, stream, in,
               plan, LdScale<A>(in), static_cast<const A*>(grad_loss), static_cast<T*>(grad_pred));
  });
  return cudaGetLastError();
}

}  // namespace gfl::cuda
