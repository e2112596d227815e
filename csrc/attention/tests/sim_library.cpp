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
        case Bug::kNoPeerRelease:
            return run.template operator()<Bug::kNoPeerRelease>();
        case Bug::kNoDrain:
            return run.template operator()<Bug::kNoDrain>();
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

attention::Tokens tokens(const int* problem) {
    return {problem[0], problem[1], problem[2], problem[3], problem[4]};
}

template <typename Body>
auto with_schedule(const int* problem, const Body& body) {
    if (problem[7] == 2) return body(attention::Schedule<2>(tokens(problem), problem[5], problem[6]));
    return body(attention::Schedule<1>(tokens(problem), problem[5], problem[6]));
}

attention::Assignment assignment(const int* problem, int unit, int rank) {
    return with_schedule(problem, [&](const auto& schedule) { return schedule.get(unit, rank); });
}

}  // namespace

extern "C" {

void sim_register(const void* start, size_t bytes, const char* name) {
    sim::register_global(start, bytes, name);
}
void sim_clear() { sim::clear_globals(); }

int sim_broken_attention(int bug, const GatedAttentionParams* params, uint64_t seed, char* error) {
    return sim::guarded(error, [&] {
        sim::set_seed(seed);
        attention::check_problem(*params);
        switch (attention::chosen_tile(*params)) {
            case 0:
                return launch_broken<attention::PairedTile>(bug, *params);
            case 1:
                return launch_broken<attention::WideTile>(bug, *params);
            default:
                return launch_broken<attention::SquareTile>(bug, *params);
        }
    });
}

int attention_shared_bytes(int tile) {
    constexpr uint32_t kBytes[] = {attention::PairedTile::kSharedBytes, attention::WideTile::kSharedBytes,
                                   attention::SquareTile::kSharedBytes};
    return static_cast<int>(kBytes[tile]);
}

// One line per considered tile: "* name: reason" for the chosen one, "- name: reason" for the others.
void attention_tile_verdicts(int64_t queries, int64_t heads, int64_t keys, int num_sms, char* text) {
    std::string lines;
    for (const AttentionTileVerdict& v : choose_attention_tile({queries, heads, keys, num_sms})) {
        lines += std::string(v.chosen ? "* " : "- ") + v.tile->name + ": " + v.reason + "\n";
    }
    sim::write_text(text, lines);
}

// The schedule. problem: video rows, rows, rows computed, rows of a frame, radius; query and kv heads; blocks of a
// cluster; keys of a tile.
int attention_units(const int* problem) {
    return with_schedule(problem, [](const auto& schedule) { return schedule.units(); });
}

// A block's part of one unit: first row, end of rows, number of key tiles, query head, kv head, whether shared.
void attention_assignment(const int* problem, int unit, int rank, int* found) {
    const attention::Assignment a = assignment(problem, unit, rank);
    found[0] = a.tile.row;
    found[1] = a.tile.end;
    found[2] = a.tile.key_tiles(problem[8]);
    found[3] = a.q_head;
    found[4] = a.kv_head;
    found[5] = a.shared;
}

// Of `count` key tiles of it, the first ones: first key, whether it is masked, and the keys that `row` sees of it,
// begin and end.
void attention_key_tiles(const int* problem, int unit, int rank, int count, int row, int* found) {
    const attention::QueryTile tile = assignment(problem, unit, rank).tile;
    for (int j = 0; j < count; ++j, found += 4) {
        const attention::KeySpan seen = tile.visible(j, problem[8], row, tokens(problem));
        found[0] = tile.key_start(j, problem[8]);
        found[1] = tile.masked(j, problem[8]);
        found[2] = seen.begin;
        found[3] = seen.end;
    }
}

}  // extern "C"

}  // namespace magihuman
