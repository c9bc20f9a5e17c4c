// SPDX-License-Identifier: Apache-2.0
#include "gfl/postprocess.h"

#include "operator.h"

namespace gfl::binding {
namespace {

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

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> postprocess_forward(
    at::TensorList cls_scores, at::TensorList reg_preds, at::ArrayRef<double> strides, const at::Tensor& image_sizes,
    const OptionalTensor& scale_factors, int64_t reg_max, double score_threshold, int64_t nms_pre, double iou_threshold,
    int64_t max_detections, at::ArrayRef<double> center_offset, bool anchor_topk, bool activated, bool legacy,
    bool uncertainty) {
  const size_t levels = cls_scores.size();
  TORCH_CHECK_VALUE(levels >= 1 && levels <= kPostprocessMaxLevels, "gfl: `cls_scores` must have 1 to ",
                    kPostprocessMaxLevels, " levels, got ", levels);
  TORCH_CHECK_VALUE(reg_preds.size() == levels && strides.size() == levels && center_offset.size() == levels,
                    "gfl: `reg_preds`, `strides` and `center_offset` must have one entry a level, ", levels);
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
  at::Tensor spread = at::empty({in.batch, uncertainty ? max_detections : 0, 4, 3}, options.dtype(at::kFloat));
  const PostprocessOutput out{boxes.mutable_data_ptr<float>(), scores.mutable_data_ptr<float>(),
                              labels.mutable_data_ptr<int64_t>(), count.mutable_data_ptr<int32_t>(),
                              uncertainty ? spread.mutable_data_ptr<float>() : nullptr};
#if defined(GFL_WITH_CUDA)
  if (first.is_cuda()) {
    TORCH_CHECK_NOT_IMPLEMENTED(cuda::postprocess_fits(in),
                                "gfl::postprocess on CUDA takes up to 2^32 pairs of location and class in an image");
    const at::Tensor workspace =
        at::empty({static_cast<int64_t>(cuda::postprocess_workspace_bytes(in))}, options.dtype(at::kByte));
    on_stream_of(first, [&](cudaStream_t stream) {
      return cuda::postprocess(in, out, workspace.mutable_data_ptr(), stream);
    });
    return {boxes, scores, labels, count, spread};
  }
#endif
  for_chunks(in.batch, 1, [&](int64_t begin, int64_t end) { cpu::postprocess(in, out, begin, end); });
  return {boxes, scores, labels, count, spread};
}

GFL_OPERATOR(postprocess, postprocess_forward)

}  // namespace gfl::binding
