// What only tests need of attention, behind a C interface: both tiles with a planted bug or without, run by the simulator;
// the choice of tiles; and the schedule of key tiles.
#include <string>

#include "attention/launch.cuh"
#include "sim/tests/c_interface.h"

namespace magihuman {
namespace {

template <typename Config, attention::Bug kPlanted>
struct Broken : Config {
    static constexpr attention::Bug kBug = kPlanted;
};

template <typename Config>
void launch_broken(int bug, const GatedAttentionParams& p) {
    using attention::Bug;
    const auto run = [&]<Bug kPlanted>() { attention::run_with_tile<Broken<Config, kPlanted>>(p, nullptr); };
    switch (static_cast<Bug>(bug)) {
        case Bug::kNone:
            return run.template operator()<Bug::kNone>();
        case Bug::kNoKeyWait:
            return run.template operator()<Bug::kNoKeyWait>();
        case Bug::kNoValueWait:
            return run.template operator()<Bug::kNoValueWait>();
        case Bug::kNoQueryWait:
            return run.template operator()<Bug::kNoQueryWait>();
        case Bug::kEarlyRelease:
            return run.template operator()<Bug::kEarlyRelease>();
        case Bug::kEarlyQueries:
            return run.template operator()<Bug::kEarlyQueries>();
        case Bug::kEarlyWeights:
            return run.template operator()<Bug::kEarlyWeights>();
        case Bug::kNoMask:
            return run.template operator()<Bug::kNoMask>();
    }
    throw std::invalid_argument("no such bug");
}

}  // namespace

extern "C" {

void sim_register(const void* start, size_t bytes, const char* name) {
    sim::register_global(start, bytes, name);
}
void sim_clear() { sim::clear_globals(); }

int sim_broken_attention(int bug, int wide, const GatedAttentionParams* params, uint64_t seed, char* error) {
    return sim::guarded(error, [&] {
        sim::set_seed(seed);
        attention::check_problem(*params);
        wide ? launch_broken<attention::WideTile>(bug, *params)
             : launch_broken<attention::SquareTile>(bug, *params);
    });
}

int attention_shared_bytes(int wide) {
    return static_cast<int>(wide ? attention::WideTile::kSharedBytes : attention::SquareTile::kSharedBytes);
}

// One line per considered tile: "* name: reason" for the chosen one, "- name: reason" for the others.
void attention_tile_verdicts(int64_t queries, int64_t heads, int64_t keys, int num_sms, char* text) {
    std::string lines;
    for (const AttentionTileVerdict& v : choose_attention_tile({queries, heads, keys, num_sms})) {
        lines += std::string(v.chosen ? "* " : "- ") + v.tile->name + ": " + v.reason + "\n";
    }
    sim::write_text(text, lines);
}

// The schedule. tokens: video, rows, queries, frame, radius.
int attention_query_tiles(const int* tokens) {
    return attention::Schedule(attention::Tokens{tokens[0], tokens[1], tokens[2], tokens[3], tokens[4]})
        .tiles();
}

// Query tile `index`: first row, end of rows, number of key tiles.
void attention_query_tile(const int* tokens, int index, int block_n, int* found) {
    const attention::Tokens t{tokens[0], tokens[1], tokens[2], tokens[3], tokens[4]};
    const attention::QueryTile tile = attention::Schedule(t).tile(index);
    found[0] = tile.row;
    found[1] = tile.end;
    found[2] = tile.key_tiles(block_n);
}

// Key tile `j` of it: first key, whether it is masked, and the keys that `row` sees of it, begin and end.
void attention_key_tile(const int* tokens, int index, int block_n, int j, int row, int* found) {
    const attention::Tokens t{tokens[0], tokens[1], tokens[2], tokens[3], tokens[4]};
    const attention::QueryTile tile = attention::Schedule(t).tile(index);
    const attention::KeySpan seen = tile.visible(j, block_n, row, t);
    found[0] = tile.key_start(j, block_n);
    found[1] = tile.masked(j, block_n);
    found[2] = seen.begin;
    found[3] = seen.end;
}

}  // extern "C"

}  // namespace magihuman
