// SPDX-License-Identifier: Apache-2.0
// A block's piece of a map [B, C, H, W] that lies anywhere in memory: up to 128 locations of one level of one image,
// with all their channels, walked along the dense dimension, 16 bytes an access where alignment allows.
#pragma once
#include <cstdint>
#include <cstring>

#include "launch.h"
#include "scalar.h"

namespace gfl::cuda {

constexpr int kMapThreads = 256;
constexpr int kMapTile = 128;   // locations
constexpr int kMapAhead = 4;    // runs a thread fetches before it uses the first

// Blocks an SM, asked of the compiler: with the registers that it takes unasked, it spills for sm_90.
template <class T> constexpr int kMapBlocks = sizeof(T) == 8 ? 1 : 2;

// How many elements of T are 16 bytes.
template <class T> constexpr int kRun = 16 / static_cast<int>(sizeof(T));

// Where the tile's elements lie, in elements from the map's first, and how the walk goes.
struct MapTile {
  int64_t image, channel, row, column;  // offset of the image, strides of the rest
  unsigned width, begin;                // by row-major index in the level
  int count, channels;
  bool joined;   // rows follow each other as columns do
  bool planar;   // runs go along locations, else along channels
  bool vectors;  // a run is kRun elements, else one
  int runs, lines;  // runs in a line, lines

  __device__ __forceinline__ int64_t location(int i) const {
    const unsigned at = begin + static_cast<unsigned>(i);
    if (joined) return image + at * column;
    return image + (at / width) * row + (at % width) * column;
  }
};

template <class T>
__device__ __forceinline__ MapTile map_tile(const void* data, const int64_t (&stride)[4], int64_t image, int64_t height,
                                            int64_t width, int64_t begin, int64_t channels) {
  constexpr int run = kRun<T>;
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
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && t.image % run == 0;
  if (t.planar) {
    t.vectors = aligned && dense && (channels == 1 || stride[1] % run == 0) && t.count % run == 0;
  } else {
    t.vectors = aligned && stride[2] % run == 0 && stride[3] % run == 0 && channels % run == 0;
  }
  t.runs = (t.planar ? t.count : t.channels) / (t.vectors ? run : 1);
  t.lines = t.planar ? t.channels : t.count;
  return t;
}

// A run's elements, and where they belong: `location` and `channel` are those of the first, the others follow along the
// locations of a planar tile or along the channels of another.
template <class T> struct alignas(16) Run {
  T element[kRun<T>];
  int64_t offset;  // from the map's first element
  int location, channel;
};

// Calls fetch(run), to fill the elements, and then use(run) for the runs of this thread, several fetches ahead.
template <class T, class Fetch, class Use>
__device__ __forceinline__ void for_runs(const MapTile& tile, const Fetch& fetch, const Use& use) {
  const int length = tile.vectors ? kRun<T> : 1, thread = static_cast<int>(threadIdx.x);
  if (tile.runs == 0) return;
  const int line_step = kMapThreads / tile.runs, run_step = kMapThreads % tile.runs;
  int line = thread / tile.runs, run = thread % tile.runs;
  while (line < tile.lines) {
    Run<T> ahead[kMapAhead];
    bool there[kMapAhead];
#pragma unroll
    for (int a = 0; a < kMapAhead; ++a) {
      there[a] = line < tile.lines;
      if (!there[a]) continue;
      ahead[a].location = tile.planar ? run * length : line;
      ahead[a].channel = tile.planar ? line : run * length;
      ahead[a].offset = tile.location(ahead[a].location) + ahead[a].channel * tile.channel;
      fetch(ahead[a]);
      line += line_step;
      run += run_step;
      if (run >= tile.runs) {
        run -= tile.runs;
        ++line;
      }
    }
#pragma unroll
    for (int a = 0; a < kMapAhead; ++a) {
      if (there[a]) use(ahead[a]);
    }
  }
}

// The elements of a run from memory, and back.
template <class T> __device__ __forceinline__ void load_run(const T* map, bool vectors, Run<T>& run) {
  if (vectors) {
    const uint4 words = *reinterpret_cast<const uint4*>(map + run.offset);
    memcpy(run.element, &words, sizeof words);
  } else {
    run.element[0] = map[run.offset];
  }
}
template <class T> __device__ __forceinline__ void store_run(T* map, int64_t offset, const T (&element)[kRun<T>]) {
  uint4 words;
  memcpy(&words, element, sizeof words);
  *reinterpret_cast<uint4*>(map + offset) = words;
}

// visit(element, location, channel) for each of a run's elements.
template <class T, class Visit>
__device__ __forceinline__ void for_elements(const MapTile& tile, Run<T>& run, const Visit& visit) {
#pragma unroll
  for (int v = 0; v < kRun<T>; ++v) {
    if (v > 0 && !tile.vectors) break;
    visit(run.element[v], tile.planar ? run.location + v : run.location, tile.planar ? run.channel : run.channel + v);
  }
}

// Whether the runs of one tile lie in another map of the same shape as they do in its own.
__device__ __forceinline__ bool alike(const MapTile& tile, const MapTile& other) {
  return tile.vectors && other.vectors && tile.planar == other.planar;
}

// visit(element, location, channel) for each of a run's elements, which it may change; they then go into `out`, where they
// belong in `target`, unless that is null.
template <class T, class Visit>
__device__ __forceinline__ void for_elements_into(const MapTile& tile, const MapTile& target, T* out, Run<T>& run,
                                                  const Visit& visit) {
  const bool whole = out != nullptr && alike(tile, target);
  for_elements(tile, run, [&](T& element, int location, int channel) {
    visit(element, location, channel);
    if (out != nullptr && !whole) out[target.location(location) + channel * target.channel] = element;
  });
  if (whole) store_run(out, target.location(run.location) + run.channel * target.channel, run.element);
}

}  // namespace gfl::cuda
