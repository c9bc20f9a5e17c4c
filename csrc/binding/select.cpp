// SPDX-License-Identifier: Apache-2.0
#include "gfl/select.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/masked_select.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/sort.h>

#include <algorithm>
#include <cmath>

#include "operator.h"

namespace gfl::binding {
namespace {

// `boxes` [N, 4] and what goes with them; returns the classes in one piece.
OptionalTensor check_boxes(const at::Tensor& boxes, const at::Tensor& scores, const OptionalTensor& idxs) {
  check_dim(boxes, 2, "boxes");
  check_shape(boxes, {boxes.size(0), 4}, "boxes");
  check_shape(scores, {boxes.size(0)}, "scores");
  check_device(scores, boxes, "scores");
  if (!idxs.has_value()) return {};
  check_dtype(*idxs, at::kLong, "idxs");
  check_shape(*idxs, {boxes.size(0)}, "idxs");
  check_device(*idxs, boxes, "idxs");
  return idxs->contiguous();
}

// The boxes class by class, in the order of `order` within each.
struct Groups {
  at::Tensor grouped, bounds;
  int64_t count;
  const int64_t* boxes() const { return grouped.const_data_ptr<int64_t>(); }
  const int64_t* bound() const { return bounds.const_data_ptr<int64_t>(); }
};

Groups group(const at::Tensor& order, const OptionalTensor& classes) {
  const int64_t count = order.size(0);
  Groups g{classes.has_value() ? at::empty({count}, order.options()) : order, at::empty({count + 1}, order.options()),
           0};
  g.count = cpu::group_by_class(classes.has_value() ? classes->const_data_ptr<int64_t>() : nullptr,
                                order.const_data_ptr<int64_t>(), count, g.grouped.mutable_data_ptr<int64_t>(),
                                g.bounds.mutable_data_ptr<int64_t>());
  return g;
}

constexpr int64_t kBoxesPerChunk = 1024;  // of classes of an even size: fewer do not pay for waking a thread

at::Tensor nms_on_cpu(const NmsInput& in, const at::Tensor& scores, const OptionalTensor& classes) {
  const auto longs = at::TensorOptions().dtype(at::kLong);
  const at::Tensor order = at::empty({in.count}, longs);
  cpu::order_by_score(scores.const_data_ptr(), dtype_of(scores, "scores"), scores.stride(0), in.count,
                      order.mutable_data_ptr<int64_t>());
  const Groups groups = group(order, classes);
  const at::Tensor keep = at::empty({in.count}, longs.dtype(at::kByte));
  uint8_t* flags = keep.mutable_data_ptr<uint8_t>();
  for_chunks(groups.count, std::max<int64_t>(1, groups.count * kBoxesPerChunk / in.count),
             [&](int64_t begin, int64_t end) { cpu::nms(in, groups.boxes(), groups.bound(), flags, begin, end); });
  at::Tensor result = at::empty({cpu::count_kept(flags, in.count)}, longs);
  cpu::collect_kept(flags, order.const_data_ptr<int64_t>(), in.count, result.mutable_data_ptr<int64_t>());
  return result;
}

#if defined(GFL_WITH_CUDA)
// From so many boxes on, another sort is less than the panels take.
constexpr int64_t kManyBoxes = 2048;

at::Tensor nms_on_cuda(const NmsInput& in, const at::Tensor& boxes, const at::Tensor& scores,
                       const OptionalTensor& classes) {
  const c10::cuda::CUDAGuard guard(boxes.device());
  const at::Tensor order = std::get<1>(at::sort(scores, /*stable=*/true, /*dim=*/0, /*descending=*/true));
  const auto bytes = static_cast<int64_t>(cuda::nms_workspace_bytes(in.count, in.dtype));
  const at::Tensor workspace = at::empty({bytes}, boxes.options().dtype(at::kByte));
  const at::Tensor keep = at::empty({in.count}, boxes.options().dtype(at::kBool));
  uint8_t* const flags = static_cast<uint8_t*>(keep.mutable_data_ptr());
  if (classes.has_value() && in.count > kManyBoxes) {
    const auto [labels, grouped] =
        at::sort(classes->index_select(0, order), /*stable=*/true, /*dim=*/0, /*descending=*/false);
    const at::Tensor too_large = at::empty({1}, boxes.options().dtype(at::kInt));
    on_stream_of(boxes, [&, labels = labels, grouped = grouped](cudaStream_t stream) {
      return cuda::nms_by_class(in, order.const_data_ptr<int64_t>(), grouped.const_data_ptr<int64_t>(),
                                labels.const_data_ptr<int64_t>(), workspace.mutable_data_ptr(),
                                too_large.mutable_data_ptr<int32_t>(), flags, stream);
    });
    // Waits for the device, as the end does.
    if (too_large.item<int32_t>() == 0) return at::masked_select(order, keep);
  }
  on_stream_of(boxes, [&](cudaStream_t stream) {
    return cuda::nms(in, classes.has_value() ? classes->const_data_ptr<int64_t>() : nullptr,
                     order.const_data_ptr<int64_t>(), workspace.mutable_data_ptr(), flags, stream);
  });
  // The number of kept boxes is the result's size: the host waits for it.
  return at::masked_select(order, keep);
}
#endif

at::Tensor nms_forward(const at::Tensor& boxes, const at::Tensor& scores, const OptionalTensor& idxs,
                       double iou_threshold, bool legacy) {
  const OptionalTensor classes = check_boxes(boxes, scores, idxs);
  const NmsInput in{boxes.const_data_ptr(),
                    dtype_of(boxes, "boxes"),
                    boxes.stride(0),
                    boxes.stride(1),
                    boxes.size(0),
                    iou_threshold,
                    legacy};
  dtype_of(scores, "scores");
  TORCH_CHECK_VALUE(!std::isnan(iou_threshold), "gfl: `iou_threshold` must not be NaN");
  if (in.count == 0) return at::empty({0}, boxes.options().dtype(at::kLong));
#if defined(GFL_WITH_CUDA)
  if (boxes.is_cuda()) return nms_on_cuda(in, boxes, scores, classes);
#endif
  return nms_on_cpu(in, scores, classes);
}

// Every pair of a box and a class whose score is above the threshold, in order.
struct Candidates { at::Tensor boxes, scores, labels; };

Candidates room_for(int64_t count, const at::Tensor& boxes, const at::Tensor& scores) {
  return {at::empty({count, 4}, boxes.options()), at::empty({count}, scores.options()),
          at::empty({count}, boxes.options().dtype(at::kLong))};
}

#if defined(GFL_WITH_CUDA)
Candidates candidates_on_cuda(const MulticlassInput& in, const at::Tensor& boxes, const at::Tensor& scores) {
  const c10::cuda::CUDAGuard guard(boxes.device());
  const auto bytes = static_cast<int64_t>(cuda::multiclass_workspace_bytes(in));
  const at::Tensor workspace = at::empty({bytes}, boxes.options().dtype(at::kByte));
  const at::Tensor total = at::empty({1}, boxes.options().dtype(at::kLong));
  on_stream_of(boxes, [&](cudaStream_t stream) {
    return cuda::multiclass_count(in, workspace.mutable_data_ptr(), total.mutable_data_ptr<int64_t>(), stream);
  });
  // The host waits for the number of candidates here, and for that of the kept ones in `nms_forward`.
  const Candidates found = room_for(total.item<int64_t>(), boxes, scores);
  on_stream_of(boxes, [&](cudaStream_t stream) {
    return cuda::multiclass_gather(in, workspace.const_data_ptr(), found.boxes.mutable_data_ptr(),
                                   found.scores.mutable_data_ptr(), found.labels.mutable_data_ptr<int64_t>(), stream);
  });
  return found;
}
#endif

// Candidates, and which of them are kept, by falling score: all that are, or at least `max_detections` > 0.
struct KeptCandidates {
  Candidates found;
  at::Tensor keep;
};

KeptCandidates keep_candidates(const MulticlassInput& in, const at::Tensor& boxes, const at::Tensor& scores,
                               double iou_threshold, int64_t max_detections) {
#if defined(GFL_WITH_CUDA)
  if (boxes.is_cuda()) {
    const Candidates found = candidates_on_cuda(in, boxes, scores);
    return {found, nms_forward(found.boxes, found.scores, found.labels, iou_threshold, false)};
  }
#endif
  // Which of the best are kept does not depend on the others, so a few are enough for a few detections. The next try
  // takes many more: all of them together cost little more than the last.
  const int64_t pairs = in.rows * in.classes;
  int64_t most = max_detections > 0 ? std::max<int64_t>(1024, 16 * std::min(max_detections, pairs)) : pairs;
  for (;; most *= 16) {
    const MulticlassCut cut = cpu::multiclass_cut(in, most);
    const Candidates found = room_for(cut.count, boxes, scores);
    cpu::multiclass_gather(in, cut, found.boxes.mutable_data_ptr(), found.scores.mutable_data_ptr(),
                           found.labels.mutable_data_ptr<int64_t>());
    const at::Tensor keep = nms_forward(found.boxes, found.scores, found.labels, iou_threshold, false);
    if (cut.all || keep.size(0) >= max_detections) return {found, keep};
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> multiclass_nms_forward(const at::Tensor& boxes, const at::Tensor& scores,
                                                                      double score_threshold, double iou_threshold,
                                                                      int64_t max_detections) {
  check_dim(boxes, 2, "boxes");
  check_dim(scores, 2, "scores");
  check_shape(scores, {boxes.size(0), scores.size(1)}, "scores");
  check_device(scores, boxes, "scores");
  const bool per_class = boxes.size(1) != 4;
  check_shape(boxes, {scores.size(0), per_class ? 4 * scores.size(1) : 4}, "boxes");
  TORCH_CHECK_VALUE(!std::isnan(score_threshold), "gfl: `score_threshold` must not be NaN");
  const MulticlassInput in{boxes.const_data_ptr(),
                           dtype_of(boxes, "boxes"),
                           boxes.stride(0),
                           boxes.stride(1),
                           per_class,
                           scores.const_data_ptr(),
                           dtype_of(scores, "scores"),
                           scores.stride(0),
                           scores.stride(1),
                           scores.size(0),
                           scores.size(1),
                           score_threshold};
  auto [found, keep] = keep_candidates(in, boxes, scores, iou_threshold, max_detections);
  if (max_detections > 0) keep = keep.slice(0, 0, max_detections);
  return {at::index_select(found.boxes, 0, keep), at::index_select(found.scores, 0, keep),
          at::index_select(found.labels, 0, keep)};
}

using Kept = std::tuple<at::Tensor, at::Tensor>;  // indices and final scores

Kept soft_nms_on_cpu(const SoftNmsInput& in, const at::Tensor& boxes, const OptionalTensor& classes) {
  const auto longs = boxes.options().dtype(at::kLong);
  const Groups groups = group(at::arange(in.count, longs), classes);
  const at::Tensor final_scores = at::empty({in.count}, boxes.options().dtype(accumulator_of(boxes)));
  const at::Tensor keep = at::empty({in.count}, boxes.options().dtype(at::kByte));
  uint8_t* flags = keep.mutable_data_ptr<uint8_t>();
  for_chunks(groups.count, 1, [&](int64_t begin, int64_t end) {
    cpu::soft_nms(in, groups.boxes(), groups.bound(), final_scores.mutable_data_ptr(), flags, begin, end);
  });
  // Of a nonempty input one is always kept.
  const int64_t kept = std::max<int64_t>(cpu::count_kept(flags, in.count), std::min<int64_t>(in.count, 1));
  at::Tensor indices = at::empty({kept}, longs);
  at::Tensor kept_scores = at::empty({kept}, boxes.options().dtype(at::kFloat));
  cpu::soft_nms_collect(in, final_scores.const_data_ptr(), flags, indices.mutable_data_ptr<int64_t>(),
                        kept_scores.mutable_data_ptr<float>());
  return {indices, kept_scores};
}

#if defined(GFL_WITH_CUDA)
Kept soft_nms_on_cuda(const SoftNmsInput& in, const at::Tensor& boxes, const at::Tensor& scores,
                      const OptionalTensor& classes) {
  const c10::cuda::CUDAGuard guard(boxes.device());
  at::Tensor grouped, labels;
  if (classes.has_value()) {
    std::tie(labels, grouped) = at::sort(*classes, /*stable=*/true, /*dim=*/0, /*descending=*/false);
  } else {
    grouped = at::arange(in.count, boxes.options().dtype(at::kLong));
  }
  const auto bytes = static_cast<int64_t>(cuda::soft_nms_workspace_bytes(in.count, in.dtype));
  const at::Tensor workspace = at::empty({bytes}, boxes.options().dtype(at::kByte));
  const auto accumulator = accumulator_of(boxes);
  const at::Tensor final_scores = at::empty({in.count}, boxes.options().dtype(accumulator));
  const at::Tensor keep = at::empty({in.count}, boxes.options().dtype(at::kByte));
  on_stream_of(boxes, [&](cudaStream_t stream) {
    return cuda::soft_nms(in, grouped.const_data_ptr<int64_t>(),
                          labels.defined() ? labels.const_data_ptr<int64_t>() : nullptr, workspace.mutable_data_ptr(),
                          final_scores.mutable_data_ptr(), keep.mutable_data_ptr<uint8_t>(), stream);
  });
  // The number of kept boxes is the result's size: the one thing here that the host waits for.
  const at::Tensor kept = at::nonzero(keep).squeeze(1);
  const bool none = kept.size(0) == 0;  // then the best of all is taken, as it is
  const at::Tensor candidates = none ? scores.to(accumulator) : final_scores.index_select(0, kept);
  const auto [sorted, order] = at::sort(candidates, /*stable=*/true, /*dim=*/0, /*descending=*/true);
  if (none) return {order.slice(0, 0, 1), sorted.slice(0, 0, 1).to(at::kFloat)};
  return {kept.index_select(0, order), sorted.to(at::kFloat)};
}
#endif

std::tuple<at::Tensor, at::Tensor> soft_nms_forward(const at::Tensor& boxes, const at::Tensor& scores,
                                                    const OptionalTensor& idxs, double iou_threshold, double sigma,
                                                    double min_score, bool gaussian) {
  const OptionalTensor classes = check_boxes(boxes, scores, idxs);
  TORCH_CHECK_VALUE(sigma > 0, "gfl: `sigma` must be > 0, got ", sigma);
  TORCH_CHECK_VALUE(!std::isnan(min_score), "gfl: `min_score` must not be NaN");
  const SoftNmsInput in{boxes.const_data_ptr(),
                        dtype_of(boxes, "boxes"),
                        boxes.stride(0),
                        boxes.stride(1),
                        scores.const_data_ptr(),
                        dtype_of(scores, "scores"),
                        scores.stride(0),
                        boxes.size(0),
                        iou_threshold,
                        sigma,
                        min_score,
                        gaussian};
#if defined(GFL_WITH_CUDA)
  if (boxes.is_cuda() && in.count > 0) return soft_nms_on_cuda(in, boxes, scores, classes);
#endif
  return soft_nms_on_cpu(in, boxes, classes);
}

void check_pairs(const at::Tensor& t, const at::Tensor& like, const char* argument) {
  check_dtype(t, at::kFloat, argument);
  check_shape(t, {like.size(0), 2}, argument);
  check_device(t, like, argument);
}

void take_strides(const at::Tensor& t, int64_t* strides) { std::copy(t.strides().begin(), t.strides().end(), strides); }

void take_level(PostprocessInput& in, int l, const at::Tensor& cls, const at::Tensor& reg, const at::Tensor& first_cls,
                const at::Tensor& first_reg) {
  check_dim(cls, 4, "cls_scores");
  check_dtype(cls, first_cls.scalar_type(), "cls_scores");
  check_dtype(reg, first_reg.scalar_type(), "reg_preds");
  check_device(cls, first_cls, "cls_scores");
  check_device(reg, first_cls, "reg_preds");
  check_shape(cls, {first_cls.size(0), first_cls.size(1), cls.size(2), cls.size(3)}, "cls_scores");
  check_shape(reg, {cls.size(0), 4 * (in.reg_max + 1), cls.size(2), cls.size(3)}, "reg_preds");
  TORCH_CHECK_NOT_IMPLEMENTED(cls.size(1) * cls.size(2) * cls.size(3) <= int64_t(1) << 32,
                              "gfl: `cls_scores` with more than 2^32 pairs of location and class in a level");
  PostprocessLevel& level = in.level[l];
  level.cls = cls.const_data_ptr();
  level.reg = reg.const_data_ptr();
  take_strides(cls, level.cls_stride);
  take_strides(reg, level.reg_stride);
  level.height = cls.size(2);
  level.width = cls.size(3);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> postprocess_forward(
    at::TensorList cls_scores, at::TensorList reg_preds, at::ArrayRef<double> strides, const at::Tensor& image_sizes,
    const OptionalTensor& scale_factors, int64_t reg_max, double score_threshold, int64_t nms_pre, double iou_threshold,
    int64_t max_detections, at::ArrayRef<double> center_offset, bool anchor_topk, bool activated, bool legacy) {
  const size_t levels = cls_scores.size();
  TORCH_CHECK_VALUE(levels >= 1 && levels <= kPostprocessMaxLevels, "gfl: `cls_scores` must have 1 to ",
                    kPostprocessMaxLevels, " levels, got ", levels);
  TORCH_CHECK_VALUE(reg_preds.size() == levels && strides.size() == levels && center_offset.size() == levels,
                    "gfl: `reg_preds`, `strides` and `center_offset` must have one entry per level, ", levels);
  TORCH_CHECK_VALUE(reg_max >= 1 && reg_max <= kPostprocessMaxReg, "gfl: `reg_max` must be 1 to ", kPostprocessMaxReg,
                    ", got ", reg_max);
  TORCH_CHECK_VALUE(max_detections >= 0, "gfl: `max_detections` must be >= 0, got ", max_detections);
  const at::Tensor& first = cls_scores[0];
  check_dim(first, 4, "cls_scores");
  check_pairs(image_sizes, first, "image_sizes");
  if (scale_factors.has_value()) check_pairs(*scale_factors, first, "scale_factors");

  PostprocessInput in{};
  in.levels = static_cast<int>(levels);
  in.cls_dtype = dtype_of(first, "cls_scores");
  in.reg_dtype = dtype_of(reg_preds[0], "reg_preds");
  in.batch = first.size(0);
  in.classes = first.size(1);
  in.reg_max = static_cast<int>(reg_max);
  for (size_t l = 0; l < levels; ++l) {
    take_level(in, static_cast<int>(l), cls_scores[l], reg_preds[l], first, reg_preds[0]);
    in.level[l].stride = strides[l];
    in.level[l].center_offset = center_offset[l];
  }
  const at::Tensor sizes = image_sizes.contiguous();
  const at::Tensor factors = scale_factors.has_value() ? scale_factors->contiguous() : at::Tensor();
  in.image_sizes = sizes.const_data_ptr<float>();
  in.scale_factors = factors.defined() ? factors.const_data_ptr<float>() : nullptr;
  in.score_threshold = score_threshold;
  in.nms_pre = nms_pre;
  in.iou_threshold = iou_threshold;
  in.max_detections = max_detections;
  in.anchor_topk = anchor_topk;
  in.activated = activated;
  in.legacy = legacy;

  const auto options = first.options();
  at::Tensor boxes = at::empty({in.batch, max_detections, 4}, options.dtype(at::kFloat));
  at::Tensor scores = at::empty({in.batch, max_detections}, options.dtype(at::kFloat));
  at::Tensor labels = at::empty({in.batch, max_detections}, options.dtype(at::kLong));
  at::Tensor count = at::empty({in.batch}, options.dtype(at::kInt));
  at::Tensor locations = at::empty({in.batch, max_detections}, options.dtype(at::kLong));
  const PostprocessOutput out{boxes.mutable_data_ptr<float>(), scores.mutable_data_ptr<float>(),
                              labels.mutable_data_ptr<int64_t>(), count.mutable_data_ptr<int32_t>(),
                              locations.mutable_data_ptr<int64_t>()};
  at::Tensor workspace;
#if defined(GFL_WITH_CUDA)
  if (first.is_cuda()) {
    TORCH_CHECK_NOT_IMPLEMENTED(cuda::postprocess_fits(in),
                                "gfl::postprocess on CUDA takes up to 2^32 pairs of location and class in an image");
    workspace = at::empty({static_cast<int64_t>(cuda::postprocess_workspace_bytes(in))}, options.dtype(at::kByte));
  }
#endif
  run(first, in.batch, 1, GFL_CUDA_LAUNCH(postprocess, in, out, workspace.mutable_data_ptr()),
      [&](int64_t begin, int64_t end) { cpu::postprocess(in, out, begin, end); });
  return {boxes, scores, labels, count, locations};
}

GFL_OPERATOR(nms, nms_forward)
GFL_OPERATOR(multiclass_nms, multiclass_nms_forward)
GFL_OPERATOR(soft_nms, soft_nms_forward)
GFL_OPERATOR(postprocess, postprocess_forward)

}  // namespace
}  // namespace gfl::binding
