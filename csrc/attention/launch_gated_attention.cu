// Host side of gated attention: the rules of the problem, the choice of the tile, the launch.
#include "attention/launch.cuh"

namespace magihuman {

void launch_gated_attention(const GatedAttentionParams& params, Stream stream) {
    attention::check_problem(params);
    const auto verdicts = attention::verdicts_for(params);
    if (verdicts[0].chosen) {
        attention::run_with_tile<attention::WideTile>(params, stream);
    } else {
        attention::run_with_tile<attention::SquareTile>(params, stream);
    }
}

}  // namespace magihuman
