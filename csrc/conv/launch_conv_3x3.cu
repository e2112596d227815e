#include "conv/launch.cuh"

namespace magihuman {

void launch_conv_3x3(const Conv3x3Params& params, Stream stream) {
    constexpr const char* kName = "conv_3x3";
    const Arguments check(kName);
    conv::check_problem(check, params.c);
    check.require(params.time_taps == 1 || params.time_taps == 3, "time_taps", "1 or 3", params.time_taps);
    conv::launch_form<3>(params.c, {params.time_taps, 3, 3, -1, 1}, {1, 0, 1}, kName, stream);
}

}  // namespace magihuman
