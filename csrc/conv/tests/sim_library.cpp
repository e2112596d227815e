// What only tests need of the convolutions, behind a C interface: kernels with a planted bug, run by the simulator,
// and the choice of tiles.
#include <string>

#include "api.h"
#include "conv/launch.cuh"
#include "sim/tests/c_interface.h"

namespace magihuman {
namespace {

template <typename Config, conv::Bug kPlanted>
struct Broken : Config {
    static constexpr conv::Bug kBug = kPlanted;
};

template <typename Config>
void launch_broken(int bug, const Conv3x3Params& p) {
    const ConvParams& c = p.c;
    const auto frames = [](const PixelFrames& f) {
        return conv::Frames{static_cast<bf16*>(f.data), f.frames};
    };
    const conv::PixelEpilogue epilogue{c.bias,
                                       {1, 0, 1},
                                       frames(c.shortcut),
                                       frames(c.out),
                                       frames(c.normed),
                                       c.out_eps,
                                       c.eps,
                                       static_cast<conv::Activation>(c.activation)};
    const conv::Grid grid = conv::make_grid(c.height, c.width, c.length, c.first, c.x.frames, c.in_channels,
                                            c.channels, {p.time_taps, 3, 3, -1, 1});
    const auto run = [&]<conv::Bug kPlanted>() {
        conv::launch_tile<Broken<Config, kPlanted>>(grid, c.count, c.x.data, c.w, c.in_channels, epilogue,
                                                    "conv_3x3", c.num_sms, nullptr);
    };
    switch (static_cast<conv::Bug>(bug)) {
        case conv::Bug::kNone:
            return run.template operator()<conv::Bug::kNone>();
        case conv::Bug::kNoWeightWait:
            return run.template operator()<conv::Bug::kNoWeightWait>();
        case conv::Bug::kEarlyPixelRelease:
            return run.template operator()<conv::Bug::kEarlyPixelRelease>();
        case conv::Bug::kEarlyWeightRelease:
            return run.template operator()<conv::Bug::kEarlyWeightRelease>();
        case conv::Bug::kNoPeerRelease:
            return run.template operator()<conv::Bug::kNoPeerRelease>();
        case conv::Bug::kNoDrain:
            return run.template operator()<conv::Bug::kNoDrain>();
        case conv::Bug::kNoTurnWait:
            return run.template operator()<conv::Bug::kNoTurnWait>();
        case conv::Bug::kNoClamp:
            return run.template operator()<conv::Bug::kNoClamp>();
        case conv::Bug::kStoresBeyondEdge:
            return run.template operator()<conv::Bug::kStoresBeyondEdge>();
    }
    throw std::invalid_argument("no such bug");
}

}  // namespace

extern "C" {

void sim_register(const void* start, size_t bytes, const char* name) {
    sim::register_global(start, bytes, name);
}
void sim_clear() { sim::clear_globals(); }

// 0 or 1 with the message in `error`, which has room for 2048 characters. `tile`: index into kConvTiles.
int sim_broken_conv(int bug, int tile, const Conv3x3Params* params, uint64_t seed, char* error) {
    return sim::guarded(error, [&] {
        sim::set_seed(seed);
        if (tile == 0) launch_broken<conv::Tiles<3>::Tall>(bug, *params);
        if (tile == 1) launch_broken<conv::Tiles<3>::Pair>(bug, *params);
        if (tile == 2) launch_broken<conv::Tiles<3>::Square>(bug, *params);
    });
}

int conv_shared_bytes(int taps_y, int tile) {
    const auto of = [tile]<typename Tiles>() -> uint32_t {
        if (tile == 1) return Tiles::Pair::kSharedBytes;
        return Tiles::Square::kSharedBytes;
    };
    if (taps_y == 3 && tile == 0) return static_cast<int>(conv::Tiles<3>::Tall::kSharedBytes);
    return static_cast<int>(taps_y == 3   ? of.template operator()<conv::Tiles<3>>()
                            : taps_y == 2 ? of.template operator()<conv::Tiles<2>>()
                                          : of.template operator()<conv::Tiles<1>>());
}

// One line per compiled tile: "* name: reason" for the chosen one, "- name: reason" for the others.
void conv_tile_verdicts(int frames, int height, int width, int channels, int phases, int taps_y, int norm,
                        int num_sms, char* text) {
    std::string lines;
    for (const ConvTileVerdict& verdict : choose_conv_tile(
             {frames, height, width, channels, phases, taps_y, norm != 0, taps_y == 3, num_sms})) {
        lines +=
            std::string(verdict.chosen ? "* " : "- ") + verdict.tile->name + ": " + verdict.reason + "\n";
    }
    sim::write_text(text, lines);
}

}  // extern "C"

}  // namespace magihuman
