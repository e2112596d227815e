// The convolutions without vertical taps: boxes of 8 x 8 pixels, as many as products.
#include "conv/launch.cuh"

namespace magihuman {

void launch_conv_1x1(const ConvParams& params, Stream stream) {
    constexpr const char* kName = "conv_1x1";
    conv::check_problem(Arguments(kName), params);
    conv::launch_form<1>(params, {1, 1, 1, 0, 1}, {1, 0, 1}, kName, stream);
}

void launch_conv_time(const ConvTimeParams& params, Stream stream) {
    constexpr const char* kName = "conv_time";
    const Arguments check(kName);
    conv::check_problem(check, params.c);
    check.require(params.drop == 0 || params.drop == 1, "drop", "0 or 1", params.drop);
    conv::launch_form<1>(params.c, {3, 1, 1, 0, 2}, {2, params.drop, 1}, kName, stream);
}

}  // namespace magihuman
