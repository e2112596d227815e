// Host side of gated attention: the rules of the problem, the choice of the tile, the launch.
#include "attention/launch.cuh"

namespace magihuman {

void launch_gated_attention(const GatedAttentionParams& params, Stream stream) {
    attention::check_problem(params);
    switch (attention::chosen_tile(params)) {
        case 0:
            return attention::run_with_tile<attention::PairedTile>(params, stream);
        case 1:
            return attention::run_with_tile<attention::WideTile>(params, stream);
        default:
            return attention::run_with_tile<attention::SquareTile>(params, stream);
    }
}

}  // namespace magihuman
