#include "core/parameter.h"

#include <algorithm>
#include <functional>
#include <numeric>

#include <ATen/ATen.h>

namespace safegrad {

int64_t Parameter::numel() const {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
}

void Parameter::add_product(size_t k, const at::Tensor& dy, const at::Tensor& x, double scale) {
  if (dy.size(0) == 0) return;
  at::Tensor& g = grads[k];
  at::addmm_out(g, g, dy.t(), x, fresh[k] ? 0.0 : 1.0, scale);
  fresh[k] = false;
}

void Parameter::add(size_t k, const at::Tensor& g) {
  if (fresh[k]) {
    grads[k].copy_(g);
  } else {
    grads[k].add_(g);
  }
  fresh[k] = false;
}

at::Tensor& Parameter::started(size_t k) {
  if (fresh[k]) grads[k].zero_();
  fresh[k] = false;
  return grads[k];
}

void Parameter::settle() {
  for (size_t k = 0; k < grads.size(); ++k) {
    if (grads[k].defined()) started(k);
  }
}

std::vector<std::string> block_names(const std::vector<Unit>& units) {
  std::vector<std::string> names;
  for (const Unit& unit : units) {
    for (const Parameter* p : unit.parameters) {
      if (std::find(names.begin(), names.end(), p->block) == names.end()) names.push_back(p->block);
    }
  }
  return names;
}

}  // namespace safegrad
