// SPDX-License-Identifier: Apache-2.0
// The Python module gfl_ops._C: each compiled entry point under its own name, one line an operator. Loading it also
// registers the kernels with the dispatcher.
#include "../cpu/isa.h"
#include "direct.h"
#include "ops.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace gfl::binding;
  m.def("cpu_isa", &gfl::cpu::isa_name, "The instruction set that the CPU kernels use on this processor.");
  Entries entries(m);
  entries.add("atss_forward", &atss_forward);
  entries.add("box_to_distance_forward", &box_to_distance_forward);
  entries.add("box_to_distance_backward", &box_to_distance_backward);
  entries.add("decode_forward", &decode_forward);
  entries.add("decode_backward", &decode_backward);
  entries.add("dfl_forward", &dfl_forward);
  entries.add("dfl_backward", &dfl_backward);
  entries.add("dfl_integral_forward", &dfl_integral_forward);
  entries.add("dfl_integral_backward", &dfl_integral_backward);
  entries.add("dfl_two_bin_forward", &dfl_two_bin_forward);
  entries.add("dfl_two_bin_backward", &dfl_two_bin_backward);
  entries.add("dfl_keep", &dfl_keep);
  entries.add("dfl_settle", &dfl_settle);
  entries.add("distance_to_box_forward", &distance_to_box_forward);
  entries.add("distance_to_box_backward", &distance_to_box_backward);
  entries.add("focal_forward", &focal_forward);
  entries.add("focal_backward", &focal_backward);
  entries.add("gfl_loss_forward", &gfl_loss_forward);
  entries.add("gfl_loss_backward", &gfl_loss_backward);
  entries.add("group_norm_relu_forward", &group_norm_relu_forward);
  entries.add("group_norm_relu_backward", &group_norm_relu_backward);
  entries.add("integral_forward", &integral_forward);
  entries.add("integral_backward", &integral_backward);
  entries.add("iou_forward", &iou_forward);
  entries.add("iou_backward", &iou_backward);
  entries.add("ld_forward", &ld_forward);
  entries.add("ld_backward", &ld_backward);
  entries.add("multiclass_nms_forward", &multiclass_nms_forward);
  entries.add("nms_forward", &nms_forward);
  entries.add("postprocess_forward", &postprocess_forward);
  entries.add("qfl_forward", &qfl_forward);
  entries.add("qfl_backward", &qfl_backward);
  entries.add("score_loss_forward", &score_loss_forward);
  entries.add("score_loss_recorded", &score_loss_recorded, true);
  entries.add("score_loss_settle", &score_loss_settle);
  entries.add("soft_nms_forward", &soft_nms_forward);
  entries.add("vfl_forward", &vfl_forward);
  entries.add("vfl_backward", &vfl_backward);
}
