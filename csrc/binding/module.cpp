// SPDX-License-Identifier: Apache-2.0
// The Python module gfl_ops._C: each compiled entry point under its own name, one line an operator. Loading it also
// registers the kernels with the dispatcher.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "../cpu/isa.h"
#include "ops.h"

// pybind11 makes lists into vectors; the operators take views of them.
using Numbers = std::vector<double>;
using Tensors = std::vector<at::Tensor>;

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace gfl::binding;
  m.def("cpu_isa", &gfl::cpu::isa_name, "The instruction set that the CPU kernels use on this processor.");
  m.def("atss_forward", [](const std::vector<int64_t>& level_sizes, const Numbers& strides,
                           const at::Tensor& gt_boxes, const at::Tensor& gt_labels, const OptionalTensor& valid_sizes,
                           int64_t topk, double anchor_scale, const Numbers& center_offset, bool legacy) {
    return atss_forward(level_sizes, strides, gt_boxes, gt_labels, valid_sizes, topk, anchor_scale, center_offset,
                        legacy);
  });
  m.def("box_to_distance_forward", &box_to_distance_forward);
  m.def("box_to_distance_backward", &box_to_distance_backward);
  m.def("decode_forward", &decode_forward);
  m.def("decode_backward", &decode_backward);
  m.def("dfl_forward", &dfl_forward);
  m.def("dfl_backward", &dfl_backward);
  m.def("dfl_integral_forward", &dfl_integral_forward);
  m.def("dfl_integral_backward", &dfl_integral_backward);
  m.def("dfl_two_bin_forward", &dfl_two_bin_forward);
  m.def("dfl_two_bin_backward", &dfl_two_bin_backward);
  m.def("distance_to_box_forward", &distance_to_box_forward);
  m.def("distance_to_box_backward", &distance_to_box_backward);
  m.def("focal_forward", &focal_forward);
  m.def("focal_backward", &focal_backward);
  m.def("gfl_loss_forward",
        [](const Tensors& cls_scores, const Tensors& reg_preds, const Numbers& strides, const at::Tensor& labels,
           const at::Tensor& matched, const at::Tensor& gt_boxes, const OptionalTensor& cls_norm,
           const OptionalTensor& box_norm, int64_t reg_max, const Numbers& loss_weights, double beta,
           const Numbers& center_offset, bool legacy) {
          return gfl_loss_forward(cls_scores, reg_preds, strides, labels, matched, gt_boxes, cls_norm, box_norm,
                                  reg_max, loss_weights, beta, center_offset, legacy);
        });
  m.def("gfl_loss_backward",
        [](const at::Tensor& grad_cls, const at::Tensor& grad_box, const at::Tensor& grad_dfl,
           const Tensors& cls_scores, const Tensors& reg_preds, const Numbers& strides, const at::Tensor& labels,
           const at::Tensor& matched, const at::Tensor& gt_boxes, const OptionalTensor& cls_norm,
           const OptionalTensor& box_norm, int64_t reg_max, const Numbers& loss_weights, double beta,
           const Numbers& center_offset, bool legacy, Needs2 needs) {
          return gfl_loss_backward(grad_cls, grad_box, grad_dfl, cls_scores, reg_preds, strides, labels, matched,
                                   gt_boxes, cls_norm, box_norm, reg_max, loss_weights, beta, center_offset, legacy,
                                   needs);
        });
  m.def("group_norm_relu_forward", [](const Tensors& inputs, const at::Tensor& weight, const at::Tensor& bias,
                                      int64_t num_groups, double eps, bool relu) {
    return group_norm_relu_forward(inputs, weight, bias, num_groups, eps, relu);
  });
  m.def("group_norm_relu_backward",
        [](const Tensors& grad_outputs, const at::Tensor& statistics, const Tensors& inputs, const at::Tensor& weight,
           const at::Tensor& bias, int64_t num_groups, double eps, bool relu, Needs3 needs) {
          return group_norm_relu_backward(grad_outputs, statistics, inputs, weight, bias, num_groups, eps, relu, needs);
        });
  m.def("integral_forward", &integral_forward);
  m.def("integral_backward", &integral_backward);
  m.def("iou_forward", &iou_forward);
  m.def("iou_backward", &iou_backward);
  m.def("ld_forward", &ld_forward);
  m.def("ld_backward", &ld_backward);
  m.def("postprocess_forward",
        [](const Tensors& cls_scores, const Tensors& reg_preds,
           const Numbers& strides, const at::Tensor& image_sizes, const OptionalTensor& scale_factors,
           int64_t reg_max, double score_threshold, int64_t nms_pre, double iou_threshold, int64_t max_detections,
           const Numbers& center_offset, bool anchor_topk, bool activated, bool legacy, bool uncertainty) {
          return postprocess_forward(cls_scores, reg_preds, strides, image_sizes, scale_factors, reg_max,
                                     score_threshold, nms_pre, iou_threshold, max_detections, center_offset,
                                     anchor_topk, activated, legacy, uncertainty);
        });
  m.def("multiclass_nms_forward", &multiclass_nms_forward);
  m.def("nms_forward", &nms_forward);
  m.def("qfl_forward", &qfl_forward);
  m.def("qfl_backward", &qfl_backward);
  m.def("soft_nms_forward", &soft_nms_forward);
  m.def("vfl_forward", &vfl_forward);
  m.def("vfl_backward", &vfl_backward);
}
