// SPDX-License-Identifier: Apache-2.0
// A block's piece of a map [B, C, H, W] that lies anywhere in memory: up to 128 locations of one level of one image,
// with all their channels, walked along the dense dimension. The vectorised path reads 16 bytes per access where
// alignment allows and keeps several accesses in flight, so the code for an element is compiled once for each. The
// scalar path reads one element at a time, for code that is too long for that.
#pragma once
#include <cstdint>

#include "launch.h"
#include "terms/scalar.h"
#include "vec.h"

namespace gfl::cuda {

constexpr int kMapThreads = 256;
constexpr int kMapTile = 128;  // locations
constexpr int kMapAhead = 4;   // runs that a thread of the vectorised path fetches before it uses the first

// minBlocksPerSM for __launch_bounds__; without it ptxas spills on sm_90.
template <class T> constexpr int kMapBlocks = sizeof(T) == 8 ? 1 : 2;

// Where the tile's elements lie, as offsets in elements from the map's first, and in what order they are visited.
struct MapTile {
  int64_t image, channel, row, column;  // offset of the image, strides of the rest
  unsigned width, begin;                // by row-major index in the level
  int count, channels;
  bool joined;      // rows follow each other as columns do
  bool planar;      // runs go along locations, else along channels
  int length;       // elements in a run: those of 16 bytes, or one; always one on the scalar path
  int runs, lines;  // runs in a line, lines

  __device__ __forceinline__ int64_t location(int i) const {
    const unsigned at = begin + static_cast<unsigned>(i);
    if (joined) return image + at * column;
    return image + (at / width) * row + (at % width) * column;
  }
  __device__ __forceinline__ int64_t element(int i, int c) const { return location(i) + c * channel; }

  __device__ __forceinline__ bool vectors() const { return length > 1; }
  __device__ __forceinline__ void divide(int run) {
    length = run;
    runs = (planar ? count : channels) / run;
    lines = planar ? channels : count;
  }
  // Falls back to one element at a time unless another map of the same shape has its runs in the same places.
  __device__ __forceinline__ void match_layout(const MapTile& other) {
    if (!other.vectors() || planar != other.planar) divide(1);
  }
};

// `run`: how many elements are 16 bytes; 1 on the scalar path.
__device__ __forceinline__ MapTile map_tile(const void* data, int run, const int64_t (&stride)[4], int64_t image,
                                            int64_t height, int64_t width, int64_t begin, int64_t channels) {
  MapTile t;
  const int64_t left = height * width - begin;
  t.image = image * stride[0];
  t.channel = stride[1];
  t.row = stride[2];
  t.column = stride[3];
  t.width = static_cast<unsigned>(width);
  t.begin = static_cast<unsigned>(begin);
  t.count = static_cast<int>(left < kMapTile ? left : kMapTile);
  t.channels = static_cast<int>(channels);
  t.joined = height == 1 || stride[2] == width * stride[3];
  const bool dense = t.joined && stride[3] == 1;
  t.planar = dense || stride[1] != 1;
  const int64_t steps =
      t.planar ? t.image | (channels == 1 ? 0 : stride[1]) | t.count : t.image | stride[2] | stride[3] | channels;
  const bool aligned = is_aligned(data) && (steps & (run - 1)) == 0;  // run: a power of two
  t.divide(aligned && (dense || !t.planar) ? run : 1);
  return t;
}
template <class T, bool vectorised = true>
__device__ __forceinline__ MapTile map_tile(const void* data, const int64_t (&stride)[4], int64_t image, int64_t height,
                                            int64_t width, int64_t begin, int64_t channels) {
  return map_tile(data, vectorised ? kRun<T> : 1, stride, image, height, width, begin, channels);
}

// A run's elements, and where they belong: `location` and `channel` are those of the first, the others follow along the
// locations of a planar tile or along the channels of another.
template <class T, bool vectorised = true> struct alignas(16) Run {
  static constexpr int length = vectorised ? kRun<T> : 1;
  T element[length];
  int64_t offset;  // from the map's first element
  int location, channel;
};

// For each run of this thread calls fetch(run) to load its elements and then use(run), with several fetches in flight.
template <class T, bool vectorised = true, class Fetch, class Use>
__device__ __forceinline__ void for_runs(const MapTile& tile, const Fetch& fetch, const Use& use) {
  constexpr int most = vectorised ? kMapAhead : 1;
  const int thread = static_cast<int>(threadIdx.x);
  if (tile.runs == 0) return;
  const int line_step = kMapThreads / tile.runs, run_step = kMapThreads % tile.runs;
  int line = thread / tile.runs, run = thread % tile.runs;
  while (line < tile.lines) {
    Run<T, vectorised> ahead[most];
    bool there[most];
#pragma unroll
    for (int a = 0; a < most; ++a) {
      there[a] = line < tile.lines;
      if (!there[a]) continue;
      ahead[a].location = tile.planar ? run * tile.length : line;
      ahead[a].channel = tile.planar ? line : run * tile.length;
      ahead[a].offset = tile.element(ahead[a].location, ahead[a].channel);
      fetch(ahead[a]);
      line += line_step;
      run += run_step;
      if (run >= tile.runs) {
        run -= tile.runs;
        ++line;
      }
    }
#pragma unroll
    for (int a = 0; a < most; ++a) {
      if (there[a]) use(ahead[a]);
    }
  }
}

// Loads a run's elements; stores them where they belong in a map with the layout of `tile`.
template <class T, bool vectorised>
__device__ __forceinline__ void load_run(const T* map, const MapTile& tile, Run<T, vectorised>& run) {
  if constexpr (vectorised) {
    if (tile.vectors()) {
      load_vec(map + run.offset, run.element);
      return;
    }
  }
  run.element[0] = map[run.offset];
}
template <class T, bool vectorised>
__device__ __forceinline__ void store_run(T* map, const MapTile& tile, const MapTile& target,
                                          const Run<T, vectorised>& run) {
  T* const to = map + target.element(run.location, run.channel);
  if constexpr (vectorised) {
    if (tile.vectors()) {
      store_vec(to, run.element);
      return;
    }
  }
  *to = run.element[0];
}

// visit(element, location, channel) for each of a run's elements.
template <class T, bool vectorised, class Visit>
__device__ __forceinline__ void for_elements(const MapTile& tile, Run<T, vectorised>& run, const Visit& visit) {
#pragma unroll
  for (int v = 0; v < Run<T, vectorised>::length; ++v) {
    if (v > 0 && !tile.vectors()) break;
    visit(run.element[v], tile.planar ? run.location + v : run.location, tile.planar ? run.channel : run.channel + v);
  }
}

}  // namespace gfl::cuda
