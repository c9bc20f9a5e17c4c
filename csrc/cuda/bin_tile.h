// SPDX-License-Identifier: Apache-2.0
// A block's rows of bins in shared memory. A row is short (17 logits) and one thread computes it; its memory is read
// and written by the whole block, neighbouring threads at neighbouring addresses, whichever dimension is the dense one.
//
// In shared memory rows have an odd pitch, so that the threads of a warp, each in its own row, use different banks.
#pragma once
#include "gfl/rows.h"
#include "launch.h"
#include "terms/bins.h"
#include "terms/scalar.h"

namespace gfl::cuda {

constexpr int kTileThreads = 128;
constexpr int kTilesPerSm = 8;            // minBlocksPerSM of __launch_bounds__; without it ptxas spills on sm_90
constexpr size_t kTileBytes = 48 * 1024;  // the default limit of dynamic shared memory per block

struct TileShape {
  int rows, pitch;  // rows ≤ kTileThreads, a multiple of 4
  size_t bytes;
};

template <class A> TileShape tile_shape(const BinRows& v) {
  TileShape shape{kTileThreads, static_cast<int>(v.bins | 1), 0};
  const size_t row = sizeof(int64_t) + (static_cast<size_t>(shape.pitch) + 1) * sizeof(A);
  while (static_cast<size_t>(shape.rows) * row > kTileBytes) shape.rows /= 2;
  shape.bytes = static_cast<size_t>(shape.rows) * row;
  return shape;
}

inline dim3 tile_grid(const BinRows& v, const TileShape& shape) { return strided_grid(v.rows(), shape.rows); }

template <class A> struct BinTile {
  int64_t* offsets;  // [rows] where each row begins in memory
  A* values;         // [rows, pitch]
  A* extra;          // [rows] for the kernel to use
};

template <class A> __device__ __forceinline__ BinTile<A> tile_in_shared(const TileShape& shape) {
  int64_t* offsets = shared<int64_t>();
  A* values = reinterpret_cast<A*>(offsets + shape.rows);
  return {offsets, values, values + shape.rows * shape.pitch};
}

// Calls visit(row, bin) for every kTileThreads-th element of `count` rows, without a division in the loop.
template <class Visit> __device__ __forceinline__ void for_tile_elements(int count, int bins, const Visit& visit) {
  const int thread = static_cast<int>(threadIdx.x);
  const int row_step = kTileThreads / bins, bin_step = kTileThreads % bins;
  int row = thread / bins, bin = thread % bins;
  while (row < count) {
    visit(row, bin);
    row += row_step;
    bin += bin_step;
    if (bin >= bins) {
      bin -= bins;
      ++row;
    }
  }
}

// Loads rows [first, first + count). All threads of the block take part; the tile is complete on return.
template <class T>
__device__ __forceinline__ void load_tile(const BinRows& v, int64_t first, int count, const TileShape& shape,
                                          const BinTile<acc_t<T>>& tile) {
  const T* data = static_cast<const T*>(v.data);
  const int bins = static_cast<int>(v.bins), thread = static_cast<int>(threadIdx.x);
  if (v.stride_bin != 1) {  // the rows are the dense dimension: each thread fetches its own
    if (thread < count) {
      const T* from = data + row_offset(v, first + thread);
      for (int j = 0; j < bins; ++j) tile.values[thread * shape.pitch + j] = load(from + j * v.stride_bin);
    }
    __syncthreads();
    return;
  }
  if (thread < count) tile.offsets[thread] = row_offset(v, first + thread);
  __syncthreads();
  for_tile_elements(count, bins, [&](int row, int bin) {
    tile.values[row * shape.pitch + bin] = load(data + tile.offsets[row] + bin);
  });
  __syncthreads();
}

// Writes the values of rows [first, first + count) to a contiguous [rows, bins]; between setting them and this lies a
// barrier.
template <class T>
__device__ __forceinline__ void store_tile(T* out, int64_t first, int count, int bins, const TileShape& shape,
                                           const BinTile<acc_t<T>>& tile) {
  T* to = out + first * bins;
  for_tile_elements(count, bins,
                    [&](int row, int bin) { store(to + row * bins + bin, tile.values[row * shape.pitch + bin]); });
}

// One thread's row of the tile, read as bounded logits.
template <class A> struct TileRow {
  A* x;
  __device__ __forceinline__ A operator()(int j) const { return bounded_logit(x[j]); }
};

// Calls body(first row, rows in the tile) for this block's tiles, with a barrier after each.
template <class Body> __device__ __forceinline__ void for_tiles(int64_t rows, int tile_rows, const Body& body) {
  for (int64_t first = int64_t(blockIdx.x) * tile_rows; first < rows; first += int64_t(gridDim.x) * tile_rows) {
    body(first, static_cast<int>(rows - first < tile_rows ? rows - first : tile_rows));
    __syncthreads();
  }
}

}  // namespace gfl::cuda
