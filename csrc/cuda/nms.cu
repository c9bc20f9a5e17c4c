// SPDX-License-Identifier: Apache-2.0
// Greedy NMS on the GPU in one chain of launches, exact, with memory linear in the number of boxes.
//
// The boxes, sorted by score, are walked in panels of 1024. A panel's overlaps among themselves are a triangle of bits;
// one block walks it and decides the panel; then the whole grid clears what the panel's kept boxes suppress further on,
// while other blocks of the same launch fill the triangle of the next panel. Two launches per panel, and the host waits
// for nothing.
// Many boxes of many classes take another path: one block per class, which lists the boxes it has kept and tests 64 at
// a time against the list, then among themselves. Two launches, whatever the number of boxes.
//
//   order   [count]      int64  read     boxes [count, 4] dtype read     classes [count] int64 read, or null
//   keep    [count]      uint8  write, by position in `order`
//   sorted  [count]      Box<A> scratch: the boxes in that order      sorted_class [count] int64 scratch
//   bits    [32][1024]   uint32 scratch: bit j of bits[w][i] says that box i of the panel suppresses its box 32w + j
//   kept    [1024]       int32  scratch: the panel's kept boxes, counted from its start; kept_count [1]
// Bytes moved: the sorted boxes and classes, 24 per box (40 in fp64), written once and read once per panel. Arithmetic:
// fp32, fp64 for fp64 boxes, as box.h says. Repeatable bit for bit: the only unordered writes are zeros into `keep`,
// whatever their order.
#include "gfl/select.h"

#include "terms/box.h"
#include "class_segments.h"
#include "launch.h"
#include "terms/scalar.h"
#include "warp.h"

namespace gfl::cuda {
namespace {

constexpr int kPanel = 1024;         // boxes decided by one block, one per thread
constexpr int kWords = kPanel / 32;  // words of bits in a row of the panel, one per warp
constexpr int kTile = 64;            // side of the tile that a block of `overlap_kernel` tests
constexpr int kTiles = kPanel / kTile;
constexpr int kTriangle = kTiles * (kTiles + 1) / 2;
constexpr int kColumns = 128;  // later boxes that a block clears, one per thread
constexpr int kThreads = 128;

template <class A> struct Scratch {
  Box<A>* sorted;
  int64_t* sorted_class;  // null for one class
  uint32_t* bits;
  int32_t* kept;
  int32_t* kept_count;
};

size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

template <class A> Scratch<A> place(void* workspace, int64_t count, bool classes) {
  char* at = static_cast<char*>(workspace);
  const auto take = [&](size_t bytes) {
    char* here = at;
    at += aligned(bytes);
    return here;
  };
  Scratch<A> s;
  const size_t n = static_cast<size_t>(count);
  s.bits = reinterpret_cast<uint32_t*>(take(sizeof(uint32_t) * kWords * kPanel));
  s.kept = reinterpret_cast<int32_t*>(take(sizeof(int32_t) * (kPanel + 1)));
  s.kept_count = s.kept + kPanel;
  s.sorted = reinterpret_cast<Box<A>*>(take(sizeof(Box<A>) * n));
  s.sorted_class = reinterpret_cast<int64_t*>(take(sizeof(int64_t) * n));
  if (!classes) s.sorted_class = nullptr;
  return s;
}

template <class T>
__global__ void gather_kernel(NmsInput in, const int64_t* classes, const int64_t* order, Scratch<acc_t<T>> scratch,
                              uint8_t* keep) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < in.count; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t from = order[i], s = in.stride_coordinate;
    const T* p = static_cast<const T*>(in.boxes) + from * in.stride_box;
    scratch.sorted[i] = {load(p), load(p + s), load(p + 2 * s), load(p + 3 * s)};
    if (classes != nullptr) scratch.sorted_class[i] = classes[from];
    keep[i] = 1;
  }
}

// A tile of boxes in shared memory.
template <class A> struct Staged {
  Box<A> box[kTile];
  A area[kTile];
  int64_t label[kTile];
};

template <class A>
__device__ void stage(Staged<A>& to, int lane, const Scratch<A>& scratch, int64_t position, A offset) {
  to.box[lane] = scratch.sorted[position];
  to.area[lane] = box_area(to.box[lane], offset);
  to.label[lane] = scratch.sorted_class != nullptr ? scratch.sorted_class[position] : 0;
}

template <class A>
__device__ __forceinline__ bool suppresses(const Staged<A>& staged, int k, const Box<A>& box, A area, int64_t label,
                                           A offset, A threshold) {
  return staged.label[k] == label &&
         iou_exceeds(box_overlap(staged.box[k], staged.area[k], box, area, offset), threshold);
}

// One 64×64 tile of a panel's triangle; thread (row, half) fills one word of bits.
template <class A>
__device__ void fill_bits(const Scratch<A>& scratch, int64_t panel, int64_t count, int tile, A offset, A threshold,
                          Staged<A>& columns) {
  int row_tile = 0;
  while (tile >= kTiles - row_tile) tile -= kTiles - row_tile++;
  const int column_tile = row_tile + tile;
  const int lane = threadIdx.x % kTile, half = threadIdx.x / kTile;
  const int row = row_tile * kTile + lane, first = column_tile * kTile;
  if (half == 0 && panel + first + lane < count) stage(columns, lane, scratch, panel + first + lane, offset);
  __syncthreads();
  uint32_t word = 0;
  if (panel + row < count) {
    const Box<A> box = scratch.sorted[panel + row];
    const A area = box_area(box, offset);
    const int64_t label = scratch.sorted_class != nullptr ? scratch.sorted_class[panel + row] : 0;
    for (int j = 0; j < 32; ++j) {
      const int column = first + half * 32 + j;
      if (column <= row || panel + column >= count) continue;
      if (suppresses(columns, half * 32 + j, box, area, label, offset, threshold)) word |= 1u << j;
    }
  }
  scratch.bits[(column_tile * 2 + half) * kPanel + row] = word;
}

// Clears among 128 boxes from `first` on what 64 of the kept boxes of `panel` suppress.
template <class A>
__device__ void clear_columns(const Scratch<A>& scratch, int64_t panel, int64_t first, int64_t count, int part,
                              A offset, A threshold, uint8_t* keep, Staged<A>& rows) {
  const int begin = part * kTile;
  const int left = *scratch.kept_count - begin;
  if (left <= 0) return;  // the same for the whole block
  const int size = left < kTile ? left : kTile;
  const int lane = threadIdx.x;
  if (lane < size) stage(rows, lane, scratch, panel + scratch.kept[begin + lane], offset);
  __syncthreads();
  const int64_t column = first + lane;
  // Another block may clear it meanwhile: a zero more, or a test too many.
  if (column >= count || keep[column] == 0) return;
  const Box<A> box = scratch.sorted[column];
  const A area = box_area(box, offset);
  const int64_t label = scratch.sorted_class != nullptr ? scratch.sorted_class[column] : 0;
  for (int k = 0; k < size; ++k) {
    if (suppresses(rows, k, box, area, label, offset, threshold)) {
      keep[column] = 0;
      return;
    }
  }
}

// The first `triangle` blocks fill the bits of the panel that starts at `next`; the others clear from `next` on what
// the kept boxes of the panel before suppress, each 64 kept against 128 later ones.
template <class A>
__global__ void __launch_bounds__(kThreads)
    overlap_kernel(NmsInput in, Scratch<A> scratch, int64_t next, int triangle, uint8_t* keep) {
  Staged<A>& staged = *shared<Staged<A>>();
  const A offset = box_offset<A>(in.legacy), threshold = static_cast<A>(in.iou_threshold);
  if (static_cast<int>(blockIdx.x) < triangle) {
    fill_bits(scratch, next, in.count, static_cast<int>(blockIdx.x), offset, threshold, staged);
    return;
  }
  const int64_t block = int64_t(blockIdx.x) - triangle;
  clear_columns(scratch, next - kPanel, next + block / kTiles * kColumns, in.count, static_cast<int>(block % kTiles),
                offset, threshold, keep, staged);
}

// Walks a panel: 32 boxes at a time, whose own warp decides them while the others prefetch, and every warp then drops
// from its 32 boxes what the newly kept ones suppress.
__global__ void __launch_bounds__(kPanel) decide_kernel(const uint32_t* bits, int64_t panel, int64_t count,
                                                        int32_t* kept, int32_t* kept_count, uint8_t* keep) {
  uint32_t* decided = shared<uint32_t>();  // [kWords]: the kept boxes of each word
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t position = panel + threadIdx.x;
  uint32_t dropped = __ballot_sync(kFullMask, position >= count || keep[position] == 0);
  const int words = static_cast<int>((count - panel + 31) / 32 < kWords ? (count - panel + 31) / 32 : kWords);
  const uint32_t* column = bits + warp * kPanel + lane;
  uint32_t mine = column[0];  // what box `lane` of word t suppresses among this warp's; of t ≤ warp only
  for (int t = 0; t < words; ++t) {
    if (warp == t) {
#pragma unroll
      for (int r = 0; r < kWarp; ++r) {
        const uint32_t hit = __shfl_sync(kFullMask, mine, r);
        if ((dropped >> r & 1u) == 0) dropped |= hit;
      }
      if (lane == 0) decided[t] = ~dropped;
    }
    const uint32_t suppressed = mine;
    if (t + 1 < words && t + 1 <= warp) mine = column[(t + 1) * kWarp];
    __syncthreads();
    if (warp > t) dropped |= warp_or((decided[t] >> lane & 1u) != 0 ? suppressed : 0u);
  }
  __syncthreads();
  int before = 0;
  for (int w = 0; w < warp && w < words; ++w) before += __popc(decided[w]);
  const uint32_t here = warp < words ? decided[warp] : 0u;
  const bool keeps = (here >> lane & 1u) != 0;
  if (keeps) kept[before + __popc(here & ((1u << lane) - 1u))] = static_cast<int32_t>(threadIdx.x);
  if (position < count && !keeps) keep[position] = 0;
  if (static_cast<int>(threadIdx.x) == (words - 1) * kWarp) *kept_count = before + __popc(here);
}

constexpr int kClassTile = 64;
constexpr int kClassThreads = 256;
constexpr int kParts = kClassThreads / kClassTile;  // threads that share a box of the tile
constexpr int kShare = kClassTile / kParts;         // later boxes of the tile that each of them tests
constexpr int64_t kClassBoxes = 4096;               // beyond, the panels are faster: they have the whole grid

template <class A> struct ClassScratch {
  Box<A> box[kClassTile];
  A area[kClassTile];
  uint32_t alive[kClassThreads / kWarp];
  uint16_t suppressed[kClassTile][kParts];  // by each box, later ones of the tile
  unsigned long long chosen;
};

// Which of the tile's boxes are left, of those whose bits are set: the first, and what no chosen one suppresses.
__device__ __forceinline__ unsigned long long choose(unsigned long long left, const uint16_t (*suppressed)[kParts]) {
  unsigned long long chosen = 0;
  while (left != 0) {
    const int next = __ffsll(static_cast<long long>(left)) - 1;
    unsigned long long gone = 1ull << next;
    chosen |= gone;
    for (int p = 0; p < kParts; ++p) gone |= static_cast<unsigned long long>(suppressed[next][p]) << (p * kShare);
    left &= ~gone;
  }
  return chosen;
}

template <class T>
__global__ void __launch_bounds__(kClassThreads)
    nms_class_kernel(NmsInput in, const int64_t* order, const int64_t* grouped, ClassSegments segments,
                     Box<acc_t<T>>* kept, int32_t* too_large, uint8_t* keep) {
  using A = acc_t<T>;
  ClassScratch<A>& tile = *shared<ClassScratch<A>>();
  const A offset = box_offset<A>(in.legacy), threshold = static_cast<A>(in.iou_threshold);
  const int mine = static_cast<int>(threadIdx.x) % kClassTile, part = static_cast<int>(threadIdx.x) / kClassTile;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  for (int64_t segment = blockIdx.x; segment < segments.size(); segment += gridDim.x) {
    const int64_t first = segments.first(segment), end = segments.end(first);
    if (end - first > kClassBoxes) {
      if (threadIdx.x == 0) *too_large = 1;
      continue;
    }
    int64_t used = first;  // kept: [first, used)
    for (int64_t begin = first; begin < end; begin += kClassTile) {
      const bool there = begin + mine < end;
      if (part == 0) {
        Box<A> box{0, 0, 0, 0};
        if (there) {
          const int64_t s = in.stride_coordinate;
          const T* p = static_cast<const T*>(in.boxes) + order[grouped[begin + mine]] * in.stride_box;
          box = {load(p), load(p + s), load(p + 2 * s), load(p + 3 * s)};
        }
        tile.box[mine] = box;
        tile.area[mine] = box_area(box, offset);
      }
      __syncthreads();
      const Box<A> box = tile.box[mine];
      const A area = tile.area[mine];
      bool alive = there;
      for (int64_t k = first + part; k < used && alive; k += kParts) {
        const Box<A> other = kept[k];
        alive = !iou_exceeds(box_overlap(other, box_area(other, offset), box, area, offset), threshold);
      }
      const uint32_t word = __ballot_sync(kFullMask, alive);
      if (threadIdx.x % kWarp == 0) tile.alive[warp] = word;
      unsigned suppressed = 0;
      for (int j = 0; j < kShare; ++j) {
        const int other = part * kShare + j;
        if (other <= mine || begin + other >= end) continue;
        if (iou_exceeds(box_overlap(box, area, tile.box[other], tile.area[other], offset), threshold)) {
          suppressed |= 1u << j;
        }
      }
      tile.suppressed[mine][part] = static_cast<uint16_t>(suppressed);
      __syncthreads();
      if (threadIdx.x == 0) {
        uint32_t low = ~0u, high = ~0u;
        for (int p = 0; p < kParts; ++p) {
          low &= tile.alive[2 * p];
          high &= tile.alive[2 * p + 1];
        }
        tile.chosen = choose(static_cast<unsigned long long>(high) << 32 | low, tile.suppressed);
      }
      __syncthreads();
      const unsigned long long chosen = tile.chosen;
      if (part == 0 && there) {
        const bool keeps = (chosen >> mine & 1) != 0;
        keep[grouped[begin + mine]] = keeps ? 1 : 0;
        if (keeps) kept[used + __popcll(chosen & ((1ull << mine) - 1))] = box;
      }
      used += __popcll(chosen);
      __syncthreads();
    }
  }
}

}  // namespace

size_t nms_workspace_bytes(int64_t count, DType dtype) {
  const size_t n = static_cast<size_t>(count);
  const size_t box = dtype == DType::f64 ? sizeof(Box<double>) : sizeof(Box<float>);
  return aligned(sizeof(uint32_t) * kWords * kPanel) + aligned(sizeof(int32_t) * (kPanel + 1)) + aligned(box * n) +
         aligned(sizeof(int64_t) * n);
}

cudaError_t nms(const NmsInput& in, const int64_t* classes, const int64_t* order, void* workspace, uint8_t* keep,
                cudaStream_t stream) {
  if (in.count == 0) return cudaSuccess;
  dispatch(in.dtype, [&](auto t) {
    using T = decltype(t);
    using A = acc_t<T>;
    const Scratch<A> scratch = place<A>(workspace, in.count, classes != nullptr);
    GFL_LAUNCH(gather_kernel<T>, strided_grid(in.count, 256), dim3(256), 0, stream, in, classes, order, scratch, keep);
    for (int64_t next = 0; next < in.count; next += kPanel) {
      const int64_t later = next == 0 ? 0 : (in.count - next + kColumns - 1) / kColumns * kTiles;
      GFL_LAUNCH(overlap_kernel<A>, dim3(static_cast<unsigned>(kTriangle + later)), dim3(kThreads), sizeof(Staged<A>),
                 stream, in, scratch, next, kTriangle, keep);
      GFL_LAUNCH(decide_kernel, dim3(1), dim3(kPanel), sizeof(uint32_t) * kWords, stream, scratch.bits, next, in.count,
                 scratch.kept, scratch.kept_count, keep);
    }
  });
  return cudaGetLastError();
}

cudaError_t nms_by_class(const NmsInput& in, const int64_t* order, const int64_t* grouped, const int64_t* labels,
                         void* workspace, int32_t* too_large, uint8_t* keep, cudaStream_t stream) {
  if (in.count == 0) return cudaSuccess;
  const cudaError_t cleared = cudaMemsetAsync(too_large, 0, sizeof(int32_t), stream);
  if (cleared != cudaSuccess) return cleared;
  dispatch(in.dtype, [&](auto t) {
    using T = decltype(t);
    using A = acc_t<T>;
    const Scratch<A> scratch = place<A>(workspace, in.count, true);
    // What the panels use for bits and classes has room for these.
    const ClassSegments segments{labels, in.count, scratch.sorted_class,
                                 reinterpret_cast<unsigned long long*>(scratch.bits)};
    const unsigned blocks = find_segments(segments, stream);
    GFL_LAUNCH(nms_class_kernel<T>, dim3(blocks), dim3(kClassThreads), sizeof(ClassScratch<A>), stream, in, order,
               grouped, segments, scratch.sorted, too_large, keep);
  });
  return cudaGetLastError();
}

}  // namespace gfl::cuda
