// SPDX-License-Identifier: Apache-2.0
// The compiled entry points, as the dispatcher and the Python module see them: the arguments of each schema in order.
#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

namespace gfl::binding {

using OptionalTensor = std::optional<at::Tensor>;
using Needs2 = std::array<bool, 2>;
using Needs3 = std::array<bool, 3>;

std::tuple<at::Tensor, at::Tensor, at::Tensor> atss_forward(at::IntArrayRef level_sizes, at::ArrayRef<double> strides,
                                                            const at::Tensor& gt_boxes, const at::Tensor& gt_labels,
                                                            const OptionalTensor& valid_sizes, int64_t topk,
                                                            double anchor_scale, at::ArrayRef<double> center_offset,
                                                            bool legacy);

at::Tensor box_to_distance_forward(const at::Tensor& points, const at::Tensor& boxes,
                                   std::optional<double> max_distance, double eps);
std::tuple<at::Tensor, at::Tensor> box_to_distance_backward(const at::Tensor& grad_distance, const at::Tensor& points,
                                                            const at::Tensor& boxes, std::optional<double> max_distance,
                                                            double eps, Needs2 needs);

at::Tensor decode_forward(const at::Tensor& pred, const at::Tensor& points, const at::Tensor& stride, int64_t reg_max,
                          const OptionalTensor& max_shape);
std::tuple<at::Tensor, at::Tensor> decode_backward(const at::Tensor& grad_boxes, const at::Tensor& pred,
                                                   const at::Tensor& points, const at::Tensor& stride, int64_t reg_max,
                                                   const OptionalTensor& max_shape, Needs2 needs);

at::Tensor dfl_forward(const at::Tensor& pred, const at::Tensor& target, bool ignore_out_of_range);
std::tuple<at::Tensor, at::Tensor> dfl_backward(const at::Tensor& grad_loss, const at::Tensor& pred,
                                                const at::Tensor& target, bool ignore_out_of_range, Needs2 needs);

std::tuple<at::Tensor, at::Tensor> dfl_integral_forward(const at::Tensor& pred, const at::Tensor& target,
                                                        bool ignore_out_of_range);
std::tuple<at::Tensor, at::Tensor> dfl_integral_backward(const at::Tensor& grad_loss, const at::Tensor& grad_distance,
                                                         const at::Tensor& pred, const at::Tensor& target,
                                                         bool ignore_out_of_range, Needs2 needs);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> dfl_keep(const at::Tensor& pred, const at::Tensor& target,
                                                                    bool ignore_out_of_range, bool with_distance,
                                                                    const OptionalTensor& weight,
                                                                    const OptionalTensor& norm, double factor,
                                                                    bool reduced);
void dfl_settle(at::Tensor kept, const at::Tensor& sums, const at::Tensor& grad_loss,
                const OptionalTensor& grad_distance, const at::Tensor& pred, const at::Tensor& target,
                bool ignore_out_of_range, const OptionalTensor& weight, const OptionalTensor& norm, double factor,
                bool reduced);
at::Tensor dfl_two_bin_forward(const at::Tensor& pred, const at::Tensor& left, const at::Tensor& weight_left,
                               const at::Tensor& weight_right);
std::tuple<at::Tensor, at::Tensor, at::Tensor> dfl_two_bin_backward(const at::Tensor& grad_loss, const at::Tensor& pred,
                                                                    const at::Tensor& left,
                                                                    const at::Tensor& weight_left,
                                                                    const at::Tensor& weight_right, Needs3 needs);

at::Tensor distance_to_box_forward(const at::Tensor& points, const at::Tensor& distance,
                                   const OptionalTensor& max_shape);
std::tuple<at::Tensor, at::Tensor> distance_to_box_backward(const at::Tensor& grad_boxes, const at::Tensor& points,
                                                            const at::Tensor& distance, const OptionalTensor& max_shape,
                                                            Needs2 needs);

at::Tensor focal_forward(const at::Tensor& pred, const at::Tensor& target, double alpha, double gamma, bool activated);
std::tuple<at::Tensor, at::Tensor> focal_backward(const at::Tensor& grad_loss, const at::Tensor& pred,
                                                  const at::Tensor& target, double alpha, double gamma,
                                                  bool activated, Needs2 needs);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> gfl_loss_forward(
    at::TensorList cls_scores, at::TensorList reg_preds, at::ArrayRef<double> strides, const at::Tensor& labels,
    const at::Tensor& matched, const at::Tensor& gt_boxes, const OptionalTensor& cls_norm,
    const OptionalTensor& box_norm, int64_t reg_max, at::ArrayRef<double> loss_weights, double beta,
    at::ArrayRef<double> center_offset, bool legacy);
std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> gfl_loss_backward(
    const at::Tensor& grad_cls, const at::Tensor& grad_box, const at::Tensor& grad_dfl, at::TensorList cls_scores,
    at::TensorList reg_preds, at::ArrayRef<double> strides, const at::Tensor& labels, const at::Tensor& matched,
    const at::Tensor& gt_boxes, const OptionalTensor& cls_norm, const OptionalTensor& box_norm, int64_t reg_max,
    at::ArrayRef<double> loss_weights, double beta, at::ArrayRef<double> center_offset, bool legacy, Needs2 needs);

std::tuple<std::vector<at::Tensor>, at::Tensor> group_norm_relu_forward(at::TensorList inputs, const at::Tensor& weight,
                                                                        const at::Tensor& bias, int64_t num_groups,
                                                                        double eps, bool relu);
std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor> group_norm_relu_backward(
    at::TensorList grad_outputs, const at::Tensor& statistics, at::TensorList inputs, const at::Tensor& weight,
    const at::Tensor& bias, int64_t num_groups, double eps, bool relu, Needs3 needs);

at::Tensor integral_forward(const at::Tensor& pred, int64_t reg_max);
at::Tensor integral_backward(const at::Tensor& grad_distance, const at::Tensor& pred, int64_t reg_max,
                             std::array<bool, 1> needs);

at::Tensor iou_forward(const at::Tensor& pred, const at::Tensor& target, int64_t kind, double eps);
std::tuple<at::Tensor, at::Tensor> iou_backward(const at::Tensor& grad_loss, const at::Tensor& pred,
                                                const at::Tensor& target, int64_t kind, double eps, Needs2 needs);

at::Tensor ld_forward(const at::Tensor& pred, const at::Tensor& teacher, double temperature);
at::Tensor ld_backward(const at::Tensor& grad_loss, const at::Tensor& pred, const at::Tensor& teacher,
                       double temperature, std::array<bool, 1> needs);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> postprocess_forward(
    at::TensorList cls_scores, at::TensorList reg_preds, at::ArrayRef<double> strides, const at::Tensor& image_sizes,
    const OptionalTensor& scale_factors, int64_t reg_max, double score_threshold, int64_t nms_pre, double iou_threshold,
    int64_t max_detections, at::ArrayRef<double> center_offset, bool anchor_topk, bool activated, bool legacy,
    bool uncertainty);

std::tuple<at::Tensor, at::Tensor, at::Tensor> multiclass_nms_forward(const at::Tensor& boxes, const at::Tensor& scores,
                                                                      double score_threshold, double iou_threshold,
                                                                      int64_t max_detections);

at::Tensor nms_forward(const at::Tensor& boxes, const at::Tensor& scores, const OptionalTensor& idxs,
                       double iou_threshold, bool legacy);

at::Tensor qfl_forward(const at::Tensor& pred, const OptionalTensor& label, const at::Tensor& target, double beta,
                       bool activated);
std::tuple<at::Tensor, at::Tensor> qfl_backward(const at::Tensor& grad_loss, const at::Tensor& pred,
                                                const OptionalTensor& label, const at::Tensor& target, double beta,
                                                bool activated, Needs2 needs);

std::tuple<at::Tensor, at::Tensor> score_loss_forward(const at::Tensor& pred, const OptionalTensor& label,
                                                      const at::Tensor& target, const OptionalTensor& weight,
                                                      const OptionalTensor& norm, double factor, int64_t kind,
                                                      double alpha, double exponent, bool activated, bool store);

// The loss with its gradient recorded; no operator, but what the losses call instead of score_loss_forward.
at::Tensor score_loss_recorded(const at::Tensor& pred, const OptionalTensor& label, const at::Tensor& target,
                               const OptionalTensor& weight, const OptionalTensor& norm, double factor, int64_t kind,
                               double alpha, double exponent, bool activated);

void score_loss_settle(at::Tensor grad, const at::Tensor& grad_loss, const at::Tensor& pred,
                       const OptionalTensor& label, const at::Tensor& target, const OptionalTensor& weight,
                       const OptionalTensor& norm, double factor, int64_t kind, double alpha, double exponent,
                       bool activated);

std::tuple<at::Tensor, at::Tensor> soft_nms_forward(const at::Tensor& boxes, const at::Tensor& scores,
                                                    const OptionalTensor& idxs, double iou_threshold, double sigma,
                                                    double min_score, bool gaussian);

at::Tensor vfl_forward(const at::Tensor& pred, const at::Tensor& target, double alpha, double gamma, bool iou_weighted,
                       bool activated);
std::tuple<at::Tensor, at::Tensor> vfl_backward(const at::Tensor& grad_loss, const at::Tensor& pred,
                                                const at::Tensor& target, double alpha, double gamma,
                                                bool iou_weighted, bool activated, Needs2 needs);

}  // namespace gfl::binding
