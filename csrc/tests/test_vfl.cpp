// SPDX-License-Identifier: Apache-2.0
// Varifocal loss against its formula, element by element.
#include "gfl/vfl.h"

#include "element_loss.h"

using namespace gfl;
using namespace gfl::testing;

namespace {

struct Kernel {
  double alpha, gamma;
  bool iou_weighted;

  // Below 0 by more than the step of a difference: the loss changes its form there.
  static double negative() { return -0.001; }

  void forward(const void* pred, DType dtype, const void* target, int64_t count, bool activated, void* loss) const {
    const VflInput in{pred, dtype, target, count, alpha, gamma, iou_weighted, activated};
#if defined(GFL_TEST_CUDA)
    CHECK_CUDA(cuda::vfl_forward(in, loss, nullptr));
#else
    cpu::vfl_forward(in, loss, count / 2, count);
    cpu::vfl_forward(in, loss, 0, count / 2);
#endif
  }

  void backward(const void* pred, DType dtype, const void* target, int64_t count, bool activated, const void* grad,
                int64_t stride, void* grad_pred, void* grad_target) const {
    const VflInput in{pred, dtype, target, count, alpha, gamma, iou_weighted, activated};
#if defined(GFL_TEST_CUDA)
    CHECK_CUDA(cuda::vfl_backward(in, grad, stride, grad_pred, grad_target, nullptr));
#else
    cpu::vfl_backward(in, grad, stride, grad_pred, grad_target, count / 2, count);
    cpu::vfl_backward(in, grad, stride, grad_pred, grad_target, 0, count / 2);
#endif
  }
};

}  // namespace

int main() {
  Generator draw(20200831);
  for (const Kernel kernel : {Kernel{0.75, 2, true}, Kernel{0.4, 1.5, true}, Kernel{0.75, 2, false}}) {
    const auto formula = [kernel](long double x, long double t, bool activated) {
      const Bce b = bce(x, t, activated);
      if (t > 0) return kernel.iou_weighted ? t * b.value : b.value;
      return kernel.alpha * std::pow(std::fabs(b.p - t), static_cast<long double>(kernel.gamma)) * b.value;
    };
    check_element_loss(kernel, formula, draw);
  }
  return result("vfl");
}
