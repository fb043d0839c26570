#include "linear/weight_form.h"

namespace mlx_server {

namespace mx = mlx::core;

std::optional<WeightForm> weight_form(const mx::array& weight, const std::optional<mx::array>& scales,
                                      const std::optional<mx::array>& biases, int group_size, int bits,
                                      const std::string& mode, int k) {
  if (k == 0 || k % 32 != 0) {
    return std::nullopt;
  }
  if (!scales) {
    return weight.dtype() == mx::float32 ? std::optional<WeightForm>({0, 32, false}) : std::nullopt;
  }
  if (mode == "affine") {
    const bool has_kernel = bits > 1 && bits != 7 && (group_size == 32 || group_size == 64 || group_size == 128) &&
                            scales->dtype() == mx::float32 && biases->dtype() == mx::float32;
    return has_kernel ? std::optional<WeightForm>({group_size, bits, false}) : std::nullopt;
  }
  const bool has_kernel = (mode == "mxfp4" && bits == 4 && group_size == 32) ||
                          (mode == "mxfp8" && bits == 8 && group_size == 32) ||
                          (mode == "nvfp4" && bits == 4 && group_size == 16);
  return has_kernel ? std::optional<WeightForm>({group_size, bits, true}) : std::nullopt;
}

LinearWeights linear_weights(const WeightForm& form, const std::vector<mx::array>& inputs, std::size_t& next,
                             std::int64_t n, std::int64_t k) {
  LinearWeights w{.weight = inputs[next++].data<std::uint8_t>(),
                  .scales = nullptr,
                  .biases = nullptr,
                  .n = n,
                  .k = k,
                  .group_size = form.group_size,
                  .bits = form.bits};
  if (form.is_float) {
    w.scale_codes = inputs[next++].data<std::uint8_t>();
  } else if (!w.is_plain()) {
    w.scales = inputs[next++].data<float>();
    w.biases = inputs[next++].data<float>();
  }
  return w;
}

}  // namespace mlx_server
