// Host side of every convolution: the rules of the problem, the choice of the tile, the launch.
#pragma once

#include <algorithm>
#include <string>

#include "api.h"
#include "common/arguments.h"
#include "common/modality.h"
#include "conv/conv.cuh"
#include "conv/epilogue_pixels.cuh"
#include "conv/tile_config.h"
#include "hopper/launch.h"

namespace magihuman::conv {

constexpr int kMostSide = 1 << 15, kMostFrames = 1 << 12, kMostChannels = 1 << 14;

inline void check_size(const Arguments& check, const char* name, int value, int most, int multiple = 1) {
    const std::string expected =
        (multiple > 1 ? "a multiple of " + std::to_string(multiple) + " from " : "") +
        std::to_string(multiple) + " to " + std::to_string(most);
    check.require(value >= multiple && value <= most && value % multiple == 0, name, expected.c_str(), value);
}

inline void check_frames(const Arguments& check, const char* name, const PixelFrames& frames) {
    check.require_pointer(frames.data, name, 16);
    check_size(check, name, frames.frames, kMostFrames);
}

// What all convolutions read.
inline void check_input(const Arguments& check, const PixelFrames& x, int height, int width, int in_channels,
                        int length, int first, int count, const void* w, const float* bias, int num_sms) {
    check_frames(check, "x", x);
    check_size(check, "height", height, kMostSide);
    check_size(check, "width", width, kMostSide);
    check_size(check, "in_channels", in_channels, kMostChannels, 8);
    check_size(check, "length", length, kMostFrames);
    check.require(first >= 0, "first", "0 or more", first);
    check.require(count >= 1 && count <= length - first, "count", "1 to the frames of the clip from first on",
                  count);
    check.require_pointer(w, "w", 16);
    check.require_pointer(bias, "bias", 8);
    check.require(conv_units(count, height, width, kUnitSide) < 1 << 26, "count",
                  "fewer than 2^26 units of 8 x 8 pixels", conv_units(count, height, width, kUnitSide));
    check.require(num_sms >= 0, "num_sms", "0 or more", num_sms);
}

inline void check_problem(const Arguments& check, const ConvParams& c) {
    check_input(check, c.x, c.height, c.width, c.in_channels, c.length, c.first, c.count, c.w, c.bias,
                c.num_sms);
    check_size(check, "channels", c.channels, kMostChannels, 8);
    check.require(c.activation >= 0 && c.activation <= 2, "activation", "0 to 2", c.activation);
    check.require(c.out.data != nullptr || c.normed.data != nullptr, "out", "out or normed", 0);
    if (c.shortcut.data != nullptr) check_frames(check, "shortcut", c.shortcut);
    if (c.out.data != nullptr) check_frames(check, "out", c.out);
    if (c.normed.data != nullptr) {
        check_frames(check, "normed", c.normed);
        check.require(c.eps > 0, "eps", "a positive number", static_cast<int64_t>(c.eps));
    }
    check.require(c.out_eps >= 0, "out_eps", "0 or more", static_cast<int64_t>(c.out_eps));
}

// The taps of a form: how many along each axis, the first one's offset, and how many convolutions of the same
// pixels there are.
struct Form {
    int taps_t, taps_y, taps_x, offset_space, phases;
};

inline Grid make_grid(int height, int width, int length, int first, int x_frames, int in_channels,
                      int channels, const Form& form) {
    Grid grid{};
    grid.height = height, grid.width = width, grid.length = length, grid.first = first;
    grid.x_frames = x_frames;
    grid.tiles_x = (width + kUnitSide - 1) / kUnitSide;
    grid.taps_t = form.taps_t, grid.taps_x = form.taps_x, grid.chunks = (in_channels + 63) / 64;
    grid.offset_t = -(form.taps_t / 2), grid.offset_y = grid.offset_x = form.offset_space;
    grid.phases = form.phases, grid.channels = channels;
    return grid;
}

template <typename Config, typename Epilogue>
void launch_tile(Grid grid, int count, const void* x, const void* w, int in_channels,
                 const Epilogue& epilogue, const char* name, int num_sms, Stream stream) {
    const auto size = [](int64_t n) { return static_cast<uint64_t>(n); };
    const uint64_t pixel = size(in_channels) * 2, line = pixel * size(grid.width);
    const TensorMapSpec pixels{x,
                               ElementType::kBf16,
                               4,
                               {size(in_channels), size(grid.width), size(grid.height), size(grid.x_frames)},
                               {pixel, line, line * size(grid.height)},
                               {64, kUnitSide, Config::kBoxRows, 1},
                               Swizzle::kBytes128};
    const int taps = grid.taps_t * Config::kTapsY * grid.taps_x;
    const TensorMapSpec weights{w,
                                ElementType::kBf16,
                                3,
                                {size(in_channels), size(taps), size(grid.phases) * size(grid.channels)},
                                {pixel, pixel * size(taps)},
                                {64, 1, Config::kBlockN / Config::kCluster},
                                Swizzle::kBytes128};
    constexpr int kGroup = Config::kBlockUnits * Config::kCluster;
    grid.unit_rows = Config::kUnitRows;
    grid.tiles_y = (grid.height + Config::kUnitRows - 1) / Config::kUnitRows;
    grid.units = count * grid.tiles_y * grid.tiles_x;
    grid.n_tiles = (grid.channels + Config::kBlockN - 1) / Config::kBlockN;
    grid.tiles = (grid.units + kGroup - 1) / kGroup * grid.phases * grid.n_tiles;
    const KernelParams<Epilogue> params{make_tensor_map(pixels, "x"), make_tensor_map(weights, "w"), grid,
                                        epilogue};
    const int workers = std::min(num_sms / Config::kCluster, grid.tiles);
    launch(conv_sm90<Config, Epilogue>,
           {name, dim3(static_cast<uint32_t>(workers * Config::kCluster)), Config::kThreads, Config::kCluster,
            Config::kSharedBytes, reinterpret_cast<cudaStream_t>(stream)},
           params);
}

// The compiled tiles of kConvTiles by vertical taps: as many stages as fit.
template <int kTapsY>
struct Tiles;
template <>
struct Tiles<3> {
    using Pair = TileConfig<3, 256, 1, 8, 2, 3, 4>;
    using Square = TileConfig<3, 128, 2, 8, 1, 2, 6>;
    using Tall = TileConfig<3, 64, 1, 32, 1, 2, 5>;
};
template <>
struct Tiles<2> {
    using Pair = TileConfig<2, 256, 1, 8, 2, 3, 4>;
    using Square = TileConfig<2, 128, 2, 8, 1, 3, 5>;
};
template <>
struct Tiles<1> {
    using Pair = TileConfig<1, 256, 1, 8, 2, 4, 4>;
    using Square = TileConfig<1, 128, 2, 8, 1, 4, 4>;
};

// Runs `c` in the form with kTapsY vertical taps; `scale`, `time_scale`, `drop` place its outputs.
template <int kTapsY>
void launch_form(const ConvParams& c, const Form& form, const Placement& place, const char* name,
                 Stream stream) {
    constexpr bool kTall = kTapsY == 3;
    const bool norm = c.normed.data != nullptr || c.out_eps > 0;
    const int num_sms = static_cast<int>(processors(c.num_sms));
    const auto verdicts =
        choose_conv_tile({c.count, c.height, c.width, c.channels, form.phases, kTapsY, norm, kTall, num_sms});
    const auto frames = [](const PixelFrames& f) { return Frames{static_cast<bf16*>(f.data), f.frames}; };
    const PixelEpilogue epilogue{c.bias,
                                 place,
                                 frames(c.shortcut),
                                 frames(c.out),
                                 frames(c.normed),
                                 c.out_eps,
                                 c.eps,
                                 static_cast<Activation>(c.activation)};
    const Grid grid =
        make_grid(c.height, c.width, c.length, c.first, c.x.frames, c.in_channels, c.channels, form);
    const auto run = [&]<typename Config>() {
        launch_tile<Config>(grid, c.count, c.x.data, c.w, c.in_channels, epilogue, name, num_sms, stream);
    };
    if constexpr (kTall) {
        if (verdicts[0].chosen) return run.template operator()<typename Tiles<kTapsY>::Tall>();
    }
    if (verdicts[1].chosen) return run.template operator()<typename Tiles<kTapsY>::Pair>();
    if (verdicts[2].chosen) return run.template operator()<typename Tiles<kTapsY>::Square>();
    std::string reasons;
    for (const ConvTileVerdict& verdict : verdicts) {
        reasons += std::string("; ") + verdict.tile->name + ": " + verdict.reason;
    }
    throw std::invalid_argument(std::string(name) + ": no tile fits" + reasons);
}

}  // namespace magihuman::conv
