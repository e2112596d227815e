#include "conv/epilogue_picture.cuh"
#include "conv/launch.cuh"

namespace magihuman {

void launch_conv_picture(const ConvPictureParams& p, Stream stream) {
    constexpr const char* kName = "conv_picture";
    const Arguments check(kName);
    conv::check_input(check, p.x, p.height, p.width, p.in_channels, p.length, p.first, p.count, p.w, p.bias,
                      p.num_sms);
    check.require((p.frames == nullptr) != (p.picture == nullptr), "frames", "either frames or picture",
                  p.frames != nullptr);
    if (p.frames != nullptr) check.require_pointer(p.frames, "frames", 2);
    if (p.picture != nullptr) check.require_pointer(p.picture, "picture", 4);
    const conv::Form form{3, 3, 3, -1, 1};
    const conv::Grid grid = conv::make_grid(p.height, p.width, p.length, p.first, p.x.frames, p.in_channels,
                                            conv::kPatchChannels, form);
    const conv::PictureEpilogue epilogue{p.bias, p.frames, p.picture, p.count};
    conv::launch_tile<conv::TileConfig<3, 16, 2, 8, 1, 4, 6>>(
        grid, p.count, p.x.data, p.w, p.in_channels, epilogue, kName, static_cast<int>(processors(p.num_sms)),
        stream);
}

}  // namespace magihuman
