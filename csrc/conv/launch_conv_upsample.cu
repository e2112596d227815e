#include "conv/launch.cuh"

namespace magihuman {

void launch_conv_upsample(const ConvParams& params, Stream stream) {
    constexpr const char* kName = "conv_upsample";
    conv::check_problem(Arguments(kName), params);
    conv::launch_form<2>(params, {1, 2, 2, -1, 4}, {1, 0, 2}, kName, stream);
}

}  // namespace magihuman
