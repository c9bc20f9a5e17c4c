// SPDX-License-Identifier: Apache-2.0
// Focal loss against its formula, element by element.
#include "gfl/focal.h"

#include "element_loss.h"

using namespace gfl;
using namespace gfl::testing;

namespace {

struct Kernel {
  double alpha, gamma;

  // Above 0 by more than the step of a difference: below it the modulating factor has no power.
  static double negative() { return 0.001; }

  void forward(const void* pred, DType dtype, const void* target, int64_t count, bool activated, void* loss) const {
    const FocalInput in{pred, dtype, target, count, alpha, gamma, activated};
#if defined(GFL_TEST_CUDA)
    CHECK_CUDA(cuda::focal_forward(in, loss, nullptr));
#else
    cpu::focal_forward(in, loss, count / 2, count);
    cpu::focal_forward(in, loss, 0, count / 2);
#endif
  }

  void backward(const void* pred, DType dtype, const void* target, int64_t count, bool activated, const void* grad,
                int64_t stride, void* grad_pred, void* grad_target) const {
    const FocalInput in{pred, dtype, target, count, alpha, gamma, activated};
#if defined(GFL_TEST_CUDA)
    CHECK_CUDA(cuda::focal_backward(in, grad, stride, grad_pred, grad_target, nullptr));
#else
    cpu::focal_backward(in, grad, stride, grad_pred, grad_target, count / 2, count);
    cpu::focal_backward(in, grad, stride, grad_pred, grad_target, 0, count / 2);
#endif
  }
};

}  // namespace

int main() {
  Generator draw(20170807);
  for (const Kernel kernel : {Kernel{0.25, 2}, Kernel{0.6, 1.5}, Kernel{-1, 3}}) {
    const auto formula = [kernel](long double x, long double t, bool activated) {
      const Bce b = bce(x, t, activated);
      const long double hit = b.p * t + (1 - b.p) * (1 - t);
      const long double balance = kernel.alpha < 0 ? 1 : kernel.alpha * t + (1 - kernel.alpha) * (1 - t);
      return balance * std::pow(1 - hit, static_cast<long double>(kernel.gamma)) * b.value;
    };
    check_element_loss(kernel, formula, draw);
  }
  return result("focal");
}
