// SPDX-License-Identifier: Apache-2.0
// Distillation with a temperature of fp32 and 16-bit logits; formulas in terms/bins.h. Rows of up to kTileBins bins go
// kLanes at a time, one per lane; longer rows one at a time, a register of logits at once. The choice depends on the
// number of bins alone, so a row has the same bits in any layout.
#include "bin_tile.h"
#include "gfl/bins.h"
#include "row_sum.h"
#include "terms/bins.h"

namespace gfl::GFL_ISA {
namespace {

constexpr int kTileBins = 64;
// How many exponentials of a long row are kept for its gradient; the rest are recomputed.
constexpr int64_t kKept = 2048;

using Scale = LdScale<float>;

template <class F> inline F bounded(const Scale& scale, F x) { return at_least(-scale.limit, at_most(scale.limit, x)); }

struct Sums {
  Floats pred, teacher, cross;

  // Adds the terms of the next logits, a and b of terms/bins.h, where `inside` is set. Returns their exponentials.
  struct Exponentials { Floats pred, teacher; };
  Exponentials add(Floats a, Floats b, Ints inside) {
    const Floats e_a = (Floats)((Ints)exp_of_negative(a) & inside), e_b = (Floats)((Ints)exp_of_negative(b) & inside);
    pred += e_a;
    teacher += e_b;
    cross = multiply_add(e_b, b - a, cross);
    return {e_a, e_b};
  }
};

inline float divergence(float total_pred, float total_teacher, float cross) {
  return cross / total_teacher + (log_of_sum(total_pred) - log_of_sum(total_teacher));
}

// ---- kLanes rows at a time ----

// Logits of kLanes rows of student and teacher; their exponentials may take their place.
template <class T> struct Pair {
  RowGroup<T> of_pred, of_teacher;
  Lanes pred[kTileBins], teacher[kTileBins];
  Lanes total_pred, total_teacher, cross;
  bool beyond;

  void load(const LdInput& in, int64_t first, int64_t end) {
    const int bins = static_cast<int>(in.bins);
    of_pred.set_spaced(static_cast<const T*>(in.pred) + first * in.pred_stride_row, first, end, in.pred_stride_row);
    of_teacher.set_spaced(static_cast<const T*>(in.teacher) + first * in.teacher_stride_row, first, end,
                          in.teacher_stride_row);
    load_tile(of_pred, in.pred_stride_bin, bins, pred);
    load_tile(of_teacher, in.teacher_stride_bin, bins, teacher);
  }

  // With kKeep the exponentials take the logits' place.
  template <bool kKeep> void soften(int bins, const Scale& scale) {
    beyond = false;
    for (int k = 0; k < kLanes; k += kWidth) soften<kKeep>(bins, scale, k);
  }

 private:
  // For the kWidth rows from k on.
  template <bool kKeep> void soften(int bins, const Scale& scale, int k) {
    Floats max_pred = lanes_at(pred[0], k), max_teacher = lanes_at(teacher[0], k), extent{};
    for (int j = 0; j < bins; ++j) {
      const Floats x = lanes_at(pred[j], k), z = lanes_at(teacher[j], k);
      max_pred = larger_of(x, max_pred);
      max_teacher = larger_of(z, max_teacher);
      extent = larger_of(absolute_of(x), larger_of(absolute_of(z), extent));
    }
    if (any_of(extent > scale.limit)) {
      beyond = true;
      max_pred = bounded(scale, max_pred);
      max_teacher = bounded(scale, max_teacher);
      for (int j = 0; j < bins; ++j) {
        store_floats(bounded(scale, lanes_at(pred[j], k)), pred[j].at + k);
        store_floats(bounded(scale, lanes_at(teacher[j], k)), teacher[j].at + k);
      }
    }
    Sums s{};
    for (int j = 0; j < bins; ++j) {
      const Floats a = (lanes_at(pred[j], k) - max_pred) * scale.inverse;
      const Floats b = (lanes_at(teacher[j], k) - max_teacher) * scale.inverse;
      const auto e = s.add(a, b, ~Ints{});
      if (!kKeep) continue;
      store_floats(e.pred, pred[j].at + k);
      store_floats(e.teacher, teacher[j].at + k);
    }
    store_floats(s.pred, total_pred.at + k);
    store_floats(s.teacher, total_teacher.at + k);
    store_floats(s.cross, cross.at + k);
  }
};

template <class T> void forward_tiles(const LdInput& in, float* loss, int64_t begin, int64_t end) {
  const int bins = static_cast<int>(in.bins);
  const Scale scale(in);
  Pair<T> pair;
  for (int64_t first = begin; first < end; first += kLanes) {
    pair.load(in, first, end);
    pair.template soften<false>(bins, scale);
    Lanes value;
    GFL_LANES(k) value[k] = scale.loss * divergence(pair.total_pred[k], pair.total_teacher[k], pair.cross[k]);
    store_rows(value, pair.of_pred, loss);
  }
}

template <class T> void backward_tiles(const LdInput& in, const float* grad_loss, T* grad, int64_t begin, int64_t end) {
  const int bins = static_cast<int>(in.bins);
  const Scale scale(in);
  Pair<T> pair;
  for (int64_t first = begin; first < end; first += kLanes) {
    pair.load(in, first, end);
    pair.template soften<true>(bins, scale);
    Lanes arriving;
    load_rows(grad_loss, pair.of_pred, arriving);
    for (int k = 0; k < kLanes; k += kWidth) {
      const Floats factor = lanes_at(arriving, k) * scale.gradient;
      const Floats of_pred = factor / lanes_at(pair.total_pred, k),
                   of_teacher = factor / lanes_at(pair.total_teacher, k);
      for (int j = 0; j < bins; ++j) {
        const Floats slope = lanes_at(pair.pred[j], k) * of_pred - lanes_at(pair.teacher[j], k) * of_teacher;
        store_floats(slope, pair.pred[j].at + k);
      }
    }
    if (pair.beyond) {
      load_tile(pair.of_pred, in.pred_stride_bin, bins, pair.teacher);
      for (int j = 0; j < bins; ++j) {
        GFL_LANES(k) pair.pred[j][k] = absolute_of(pair.teacher[j][k]) > scale.limit ? 0.0f : pair.pred[j][k];
      }
    }
    store_tile(pair.pred, pair.of_pred, bins, grad);
  }
}

// ---- one long row ----

inline float largest_in(Floats x) {
  float largest = x[0];
  for (int j = 1; j < kWidth; ++j) largest = x[j] > largest ? x[j] : largest;
  return largest;
}

// The first `count` lanes.
inline Ints lanes_inside(int64_t count) {
  Ints lane;
  for (int j = 0; j < kWidth; ++j) lane[j] = j;
  return lane < static_cast<int32_t>(count < kWidth ? count : kWidth);
}

template <class T> struct LongRow {
  const Scale& scale;
  const T *pred, *teacher;
  int64_t step_pred, step_teacher, bins;
  float max_pred, max_teacher, total_pred, total_teacher, cross;
  bool beyond;

  LongRow(const LdInput& in, const Scale& scale, int64_t row)
      : scale(scale),
        pred(static_cast<const T*>(in.pred) + row * in.pred_stride_row),
        teacher(static_cast<const T*>(in.teacher) + row * in.teacher_stride_row),
        step_pred(in.pred_stride_bin),
        step_teacher(in.teacher_stride_bin),
        bins(in.bins) {
    find_largest();
  }

  // visit(part, first bin, pred, teacher): `part` numbers the registers of the row's kLanes partial sums.
  template <class Visit> void walk(const Visit& visit) const {
    // Fills the lanes beyond the last bin, where it cannot change the largest.
    const float first_pred = load(pred), first_teacher = load(teacher);
    for (int64_t j = 0, part = 0; j < bins; j += kWidth, part = (part + 1) % kParts) {
      visit(part, j, load_every(pred + j * step_pred, step_pred, bins - j, first_pred),
            load_every(teacher + j * step_teacher, step_teacher, bins - j, first_teacher));
    }
  }

  void find_largest() {
    constexpr float lowest = -std::numeric_limits<float>::infinity();
    Floats largest_pred = splat<Floats>(lowest), largest_teacher = largest_pred, extent{};
    walk([&](int64_t, int64_t, Floats x, Floats z) {
      largest_pred = larger_of(x, largest_pred);
      largest_teacher = larger_of(z, largest_teacher);
      extent = larger_of(absolute_of(x), larger_of(absolute_of(z), extent));
    });
    max_pred = bounded(scale, largest_in(largest_pred));
    max_teacher = bounded(scale, largest_in(largest_teacher));
    beyond = any_of(extent > scale.limit);
  }

  // The logits less the row's largest, over the temperature.
  Floats below_largest(Floats x, float max) const {
    if (beyond) x = bounded(scale, x);
    return (x - max) * scale.inverse;
  }

  // keep(first bin, exponentials)
  template <class Keep> void soften(const Keep& keep) {
    Sums sums[kParts] = {};
    const Ints inside = lanes_inside(kWidth);
    walk([&](int64_t part, int64_t j, Floats x, Floats z) {
      const Ints in_row = bins - j < kWidth ? lanes_inside(bins - j) : inside;
      keep(j, sums[part].add(below_largest(x, max_pred), below_largest(z, max_teacher), in_row));
    });
    RowSum of_pred, of_teacher, of_cross;
    for (int part = 0; part < kParts; ++part) {
      of_pred.parts[part] = sums[part].pred;
      of_teacher.parts[part] = sums[part].teacher;
      of_cross.parts[part] = sums[part].cross;
    }
    total_pred = of_pred.total();
    total_teacher = of_teacher.total();
    cross = of_cross.total();
  }
};

template <class T> void forward_rows(const LdInput& in, float* loss, int64_t begin, int64_t end) {
  const Scale scale(in);
  for (int64_t index = begin; index < end; ++index) {
    LongRow<T> row(in, scale, index);
    row.soften([](int64_t, const Sums::Exponentials&) {});
    loss[index] = scale.loss * divergence(row.total_pred, row.total_teacher, row.cross);
  }
}

template <class T> void backward_rows(const LdInput& in, const float* grad_loss, T* grad, int64_t begin, int64_t end) {
  const Scale scale(in);
  alignas(64) float kept_pred[kKept], kept_teacher[kKept];
  for (int64_t index = begin; index < end; ++index) {
    LongRow<T> row(in, scale, index);
    row.soften([&](int64_t j, const Sums::Exponentials& e) {
      if (j >= kKept) return;
      store_floats(e.pred, kept_pred + j);
      store_floats(e.teacher, kept_teacher + j);
    });
    const float factor = scale.gradient * grad_loss[index];
    const float of_pred = factor / row.total_pred, of_teacher = factor / row.total_teacher;
    T* to = grad + index * in.bins;
    const auto put = [&](int64_t j, Floats e_pred, Floats e_teacher) {
      Floats slope = e_pred * of_pred - e_teacher * of_teacher;
      if (row.beyond) {
        const Floats x = load_every(row.pred + j * row.step_pred, row.step_pred, in.bins - j, 0.0f);
        slope = absolute_of(x) > scale.limit ? Floats{} : slope;
      }
      store_floats(slope, in.bins - j, to + j);
    };
    int64_t j = 0;
    for (; j < in.bins && j < kKept; j += kWidth) put(j, load_floats(kept_pred + j), load_floats(kept_teacher + j));
    if (j >= in.bins) continue;
    row.walk([&](int64_t, int64_t at, Floats x, Floats z) {
      if (at < kKept) return;
      put(at, exp_of_negative(row.below_largest(x, row.max_pred)),
          exp_of_negative(row.below_largest(z, row.max_teacher)));
    });
  }
}

}  // namespace

void ld_forward(const LdInput& in, float* loss, int64_t begin, int64_t end) {
  dispatch_float(in.dtype, [&](auto t) {
    using T = decltype(t);
    if (in.bins <= kTileBins) forward_tiles<T>(in, loss, begin, end);
    else forward_rows<T>(in, loss, begin, end);
  });
}

void ld_backward(const LdInput& in, const float* grad_loss, void* grad_pred, int64_t begin, int64_t end) {
  dispatch_float(in.dtype, [&](auto t) {
    auto* grad = static_cast<decltype(t)*>(grad_pred);
    if (in.bins <= kTileBins) backward_tiles(in, grad_loss, grad, begin, end);
    else backward_rows(in, grad_loss, grad, begin, end);
  });
}

}  // namespace gfl::GFL_ISA
