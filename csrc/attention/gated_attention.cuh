// o[m, h] = sigmoid(gate[m, h]) softmax(q[m, h] . k[:, g] / sqrt(128)) v[:, g],  g = h / (query heads per kv head)
//   q  bf16 [M, Hq, 128]     k, v  bf16 [M, Hkv, 128]     gate  float32 [M, Hq]     o  bf16 [M, Hq, 128]
// Every row sees every row, or video rows see a window of frames (schedule.h). Softmax and sums in float32.
//
// Persistent blocks of three warpgroups, alone or in pairs that share keys and values (schedule.h); a block's part of a
// unit of work is one tile of 128 queries of one head:
//   producer   one thread copies the queries, then key and value tiles in the order in which they are used:
//              k0, k1, v0, k2, v1, .., running ahead into the next unit
//   consumer   two warpgroups, 64 queries each. Scores s = q kT, running softmax, o += p v with p from registers
// Two overlaps hide the softmax behind the tensor cores, both as FlashAttention-3 has them:
//   within a warpgroup   the scores of key tile j are multiplied beside p v of tile j - 1
//   between the two      they issue their products in turn (a pair of named barriers): while one multiplies, the
//                        other takes exponentials
//
// Shared memory: queries [2 consumers][2 halves of the head][64][128 B]; a ring of kSlots key or value tiles
// [2 halves of the head][BLOCK_N][128 B]; all under the 128-byte swizzle; barriers. A value tile is read transposed
// (MN-major), so it arrives like a key tile.
#pragma once

#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED  // products of 176 columns
#include "attention/softmax.cuh"
#include "common/modality.h"
#include "hopper/memory.h"
#include "hopper/sync.h"
#include "hopper/tma.h"
#include "hopper/wgmma.h"

namespace magihuman::attention {

// Mistakes that tests plant to see the simulator find them.
enum class Bug {
    kNone,
    kNoKeyWait,      // scores do not wait for their keys
    kNoValueWait,    // p v does not wait for its values
    kNoQueryWait,    // scores do not wait for their queries
    kNoPeerRelease,  // slots are freed in the warpgroup's own block only
    kNoDrain,        // a block ends while its peer may still free its slots
    kEarlyRelease,   // a value tile is freed while products read it
    kEarlyQueries,   // the next unit's queries may overwrite these while products read them
    kEarlyWeights,   // p is overwritten while products read it
    kNoMask          // keys before a span are not masked
};

constexpr int kHead = 128;
constexpr uint32_t kRowBytes = 128;  // half of a head: the swizzle span

// A compiled tile; at most 227 KB.
template <int kTileN, int kRingSlots, int kBlocks>
struct TileConfig {
    static constexpr int kBlockN = kTileN, kSlots = kRingSlots, kCluster = kBlocks;
    static constexpr int kConsumers = 2, kThreads = 128 * (1 + kConsumers);
    static constexpr uint32_t kQueryBoxBytes = 64 * kRowBytes, kQueryBytes = 2 * kQueryBoxBytes;
    static constexpr uint32_t kSlotBoxBytes = kTileN * kRowBytes, kSlotBytes = 2 * kSlotBoxBytes;
    static constexpr uint32_t kRing = kConsumers * kQueryBytes;
    static constexpr uint32_t kBarriers = kRing + kRingSlots * kSlotBytes;
    static constexpr uint32_t kSharedBytes = kBarriers + 2 * (kRingSlots + kConsumers) * sizeof(Barrier);
    static_assert(kSharedBytes <= 227 * 1024 && kSlotBoxBytes % 1024 == 0 && kTileN % 16 == 0);
    static constexpr uint32_t kProducerRegisters = 40, kConsumerRegisters = 232;
    static_assert(128 * (kProducerRegisters + kConsumers * kConsumerRegisters) <= 65536);
    static constexpr Bug kBug = Bug::kNone;
};

struct KernelParams {
    TensorMap q, k, v;
    const float* gate;
    bf16* out;
    const int* modality_offsets;
    int m, num_q_heads, num_kv_heads;
    int tokens_per_frame, frame_window;
    bool text_queries;
};

HOPPER_INLINE Tokens tokens_of(const KernelParams& p) {
    const ModalityRanges ranges = load_ranges(p.modality_offsets, p.m);
    return {ranges.first_audio, ranges.rows, p.text_queries ? ranges.rows : ranges.first_text,
            p.tokens_per_frame, p.frame_window};
}

// The unit that this block's cluster takes in one round. Every other round is dealt out backwards: units grow shorter
// along the list, and whoever had the longest of one round gets the shortest of the next.
template <typename Config>
HOPPER_INLINE int dealt(int round) {
    const int clusters = static_cast<int>(gridDim.x) / Config::kCluster;
    const int cluster = static_cast<int>(blockIdx.x) / Config::kCluster;
    return round * clusters + (round % 2 == 0 ? cluster : clusters - 1 - cluster);
}

// The block's shared memory, and this thread's place in the ring.
template <typename Config>
class Shared {
  public:
    HOPPER_INLINE explicit Shared(uint8_t* base)
        : base_(base), barriers_(reinterpret_cast<Barrier*>(base + Config::kBarriers)) {}

    HOPPER_INLINE void initialise() {
        for (int i = 0; i < Config::kSlots; ++i) {
            mbarrier_init(full(i), 1, "full_barrier", i);
            mbarrier_init(empty(i), Config::kConsumers * Config::kCluster, "empty_barrier", i);
        }
        for (int i = 0; i < Config::kConsumers; ++i) {
            mbarrier_init(queries_full(i), 1, "queries_full_barrier", i);
            mbarrier_init(queries_empty(i), 1, "queries_empty_barrier", i);
        }
        fence_mbarrier_init();
    }

    HOPPER_INLINE Barrier* full(int slot) const { return barriers_ + slot; }
    HOPPER_INLINE Barrier* empty(int slot) const { return barriers_ + Config::kSlots + slot; }
    HOPPER_INLINE Barrier* queries_full(int consumer) const {
        return barriers_ + 2 * Config::kSlots + consumer;
    }
    HOPPER_INLINE Barrier* queries_empty(int consumer) const {
        return barriers_ + 2 * Config::kSlots + Config::kConsumers + consumer;
    }
    HOPPER_INLINE uint8_t* queries(int consumer) const { return base_ + consumer * Config::kQueryBytes; }
    HOPPER_INLINE uint8_t* tile(int slot) const { return base_ + Config::kRing + slot * Config::kSlotBytes; }

    HOPPER_INLINE void advance() {
        if (++slot == Config::kSlots) {
            slot = 0;
            phase ^= 1;
        }
    }

    int slot = 0;
    uint32_t phase = 0, query_phase = 0;

  private:
    uint8_t* base_;
    Barrier* barriers_;
};

// --- producer ---------------------------------------------------------------------------------------------

// A key or value tile. In a unit whose blocks need the same ones each fetches one half of the head, for both: so a slot
// is free only once the consumers of both blocks say so.
template <typename Config>
HOPPER_INLINE void load_tile(Shared<Config>& shared, const TensorMap* map, const Assignment& unit, int row,
                             int rank) {
    constexpr uint16_t kBoth = 3;
    const int slot = shared.slot;
    mbarrier_wait(shared.empty(slot), shared.phase ^ 1);
    mbarrier_arrive_expect_tx(shared.full(slot), Config::kSlotBytes);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        uint8_t* to = shared.tile(slot) + half * Config::kSlotBoxBytes;
        const int column = half * (kHead / 2);
        if (Config::kCluster == 1 || !unit.shared) {
            tma_load(to, map, shared.full(slot), CacheHint::kNormal, column, unit.kv_head, row);
        } else if (half == rank) {
            tma_load_multicast(to, map, shared.full(slot), kBoth, CacheHint::kNormal, column, unit.kv_head,
                               row);
        }
    }
    shared.advance();
}

template <typename Config>
HOPPER_INLINE void load_queries(Shared<Config>& shared, const TensorMap* map, const Assignment& unit,
                                int consumer) {
    Barrier* full = shared.queries_full(consumer);
    mbarrier_wait(shared.queries_empty(consumer), shared.query_phase ^ 1);
    mbarrier_arrive_expect_tx(full, Config::kQueryBytes);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        tma_load(shared.queries(consumer) + half * Config::kQueryBoxBytes, map, full, CacheHint::kEvictFirst,
                 half * (kHead / 2), unit.q_head, unit.tile.row + consumer * 64);
    }
}

// One thread: everything that one unit reads.
template <typename Config>
HOPPER_INLINE void produce(const KernelParams& p, Shared<Config>& shared, const Assignment& unit, int rank) {
    const int tiles = unit.tile.key_tiles(Config::kBlockN);
    // The first warpgroup's queries and keys first: the second one may still need its old queries.
    load_queries(shared, &p.q, unit, 0);
    load_tile(shared, &p.k, unit, unit.tile.key_start(0, Config::kBlockN), rank);
    load_queries(shared, &p.q, unit, 1);
    for (int j = 0; j < tiles; ++j) {
        if (j + 1 < tiles) load_tile(shared, &p.k, unit, unit.tile.key_start(j + 1, Config::kBlockN), rank);
        load_tile(shared, &p.v, unit, unit.tile.key_start(j, Config::kBlockN), rank);
    }
    shared.query_phase ^= 1;
}

// The same thread, after its last unit: every slot is free, so no peer will arrive at this block's barriers any more,
// and none has a copy under way to its slots, for those were awaited before they were freed. The block may end.
template <typename Config>
HOPPER_INLINE void drain(Shared<Config>& shared) {
    for (int i = 0; i < Config::kSlots; ++i) {
        mbarrier_wait(shared.empty(shared.slot), shared.phase ^ 1);
        shared.advance();
    }
}

// --- consumer ---------------------------------------------------------------------------------------------

// s = q kT of one key tile.
template <typename Config>
HOPPER_INLINE void multiply_keys(float (&s)[Config::kBlockN / 2], const uint8_t* queries,
                                 const uint8_t* keys) {
    const uint64_t a = k_major_descriptor<Swizzle::kBytes128>(queries);
    const uint64_t b = k_major_descriptor<Swizzle::kBytes128>(keys);
#pragma unroll
    for (uint32_t step = 0; step < kHead / 16; ++step) {
        const uint32_t half = step / 4, within = step % 4 * 32;
        wgmma_bf16<Config::kBlockN>(s, advance(a, half * Config::kQueryBoxBytes + within),
                                    advance(b, half * Config::kSlotBoxBytes + within), step > 0);
    }
    wgmma_commit();
}

// o += p v of one value tile.
template <typename Config>
HOPPER_INLINE void multiply_values(float (&o)[kHead / 2], const uint32_t (&p)[Config::kBlockN / 16][4],
                                   const uint8_t* values) {
    const uint64_t b = mn_major_descriptor<Swizzle::kBytes128>(values, Config::kSlotBoxBytes);
#pragma unroll
    for (uint32_t step = 0; step < Config::kBlockN / 16; ++step) {
        wgmma_bf16<kHead, Major::kMN>(o, p[step], advance(b, step * 16 * kRowBytes), true);
    }
    wgmma_commit();
}

// Outputs of this warp's 16 rows to global memory. A quad of lanes holds 8 columns of a row, 4 bytes a lane: four
// such blocks are transposed within the quad, so that each lane stores 16 bytes and the quad whole sectors. Shared
// memory for a copy by the engine would be the queries', which the next unit waits for.
HOPPER_INLINE void store(const KernelParams& p, const float (&o)[kHead / 2], const float (&factor)[2],
                         const Assignment& unit, int row) {
    const uint32_t lane = lane_id(), quad_lane = lane % 4;
    const bool odd = quad_lane % 2 != 0, upper = quad_lane >= 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int at = row + 8 * half;
        bf16* to = p.out + (int64_t{at} * p.num_q_heads + unit.q_head) * kHead + quad_lane * 8;
#pragma unroll
        for (int group = 0; group < kHead / 32; ++group) {
            uint32_t w[4];  // this lane's columns of blocks 0..3
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float* v = o + 4 * (4 * group + i) + 2 * half;
                w[i] = pack_bf16x2(v[0] * factor[half], v[1] * factor[half]);
            }
            // Even lanes keep blocks 0 and 2 and get the partner's words of them; odd ones 1 and 3.
            const uint32_t from01 = shuffle_xor(odd ? w[0] : w[1], 1),
                           from23 = shuffle_xor(odd ? w[2] : w[3], 1);
            const uint32_t a0 = odd ? from01 : w[0], a1 = odd ? w[1] : from01;
            const uint32_t b0 = odd ? from23 : w[2], b1 = odd ? w[3] : from23;
            // Lower lanes keep block 0 or 1, upper ones 2 or 3.
            const uint32_t c0 = shuffle_xor(upper ? a0 : b0, 2), c1 = shuffle_xor(upper ? a1 : b1, 2);
            const uint4 line = upper ? make_uint4(c0, c1, b0, b1) : make_uint4(a0, a1, c0, c1);
            if (at < unit.tile.end) store_global(reinterpret_cast<uint4*>(to + group * 32), line);
        }
    }
}

// The warpgroup's turn to issue products, and the other's.
template <typename Config>
HOPPER_INLINE void take_turn(int consumer) {
    named_barrier_sync(1 + consumer, 128 * Config::kConsumers);
}
template <typename Config>
HOPPER_INLINE void give_turn(int consumer) {
    named_barrier_arrive(1 + (consumer ^ 1), 128 * Config::kConsumers);
}

// One unit by one warpgroup.
template <typename Config>
HOPPER_INLINE void attend(const KernelParams& p, Shared<Config>& shared, const Assignment& unit,
                          const Tokens& tokens, int consumer) {
    constexpr int kN = Config::kBlockN;
    const int tiles = unit.tile.key_tiles(kN);
    const int row = unit.tile.row + consumer * 64 + static_cast<int>(threadIdx.x) % 128 / 32 * 16 +
                    static_cast<int>(lane_id()) / 4;
    const bool leader = threadIdx.x % 128 == 0;
    const uint8_t* queries = shared.queries(consumer);
    float s[kN / 2], o[kHead / 2], rescale[2];
    uint32_t weights[kN / 16][4];
    Softmax softmax;
#pragma unroll
    for (float& value : o) value = 0;

    const auto wait_full = [&](bool skip) {
        if (!skip) mbarrier_wait(shared.full(shared.slot), shared.phase);
    };
    const auto release = [&](int slot) {
        if constexpr (Config::kCluster == 1 || Config::kBug == Bug::kNoPeerRelease) {
            if (leader) mbarrier_arrive(shared.empty(slot));
        } else {
            if (threadIdx.x % 128 < Config::kCluster) {
                mbarrier_arrive_cluster(shared.empty(slot), threadIdx.x % 128);
            }
        }
    };
    const auto release_queries = [&] {
        if (leader) mbarrier_arrive(shared.queries_empty(consumer));
    };
    const auto scores_to_weights = [&](int j) {
        if (Config::kBug != Bug::kNoMask && unit.tile.masked(j, kN)) mask<kN>(s, unit.tile, j, row, tokens);
        softmax.update(s, rescale);
    };

    // Ends the products of the last value tile that was multiplied, if any. Called at the top of the loop, not at its
    // end: within one block of straight code ptxas moves the wait up, in front of the exponentials.
    int value_slot = -1;
    const auto finish_values = [&] {
        wgmma_wait<0>();
        wgmma_results(o);
        if (Config::kBug != Bug::kEarlyRelease && value_slot >= 0) release(value_slot);
        pack_weights<kN>(weights, s);
#pragma unroll
        for (int i = 0; i < kHead / 2; ++i) o[i] *= rescale[i / 2 % 2];
    };

    // The first key tile.
    if (Config::kBug != Bug::kNoQueryWait) mbarrier_wait(shared.queries_full(consumer), shared.query_phase);
    wait_full(Config::kBug == Bug::kNoKeyWait);
    wgmma_fence();
    multiply_keys<Config>(s, queries, shared.tile(shared.slot));
    wgmma_wait<0>();
    wgmma_results(s);
    release(shared.slot);
    shared.advance();
    scores_to_weights(0);

    for (int j = 1; j < tiles; ++j) {
        finish_values();
        const int key_slot = shared.slot;
        wait_full(Config::kBug == Bug::kNoKeyWait);
        take_turn<Config>(consumer);
        wgmma_fence();
        multiply_keys<Config>(s, queries, shared.tile(key_slot));
        shared.advance();
        value_slot = shared.slot;
        wait_full(Config::kBug == Bug::kNoValueWait);
        wgmma_fence();  // again: the outputs are rescaled beside the scores' product
        multiply_values<Config>(o, weights, shared.tile(value_slot));
        shared.advance();
        give_turn<Config>(consumer);
        if (Config::kBug == Bug::kEarlyQueries && j == tiles - 1) release_queries();
        wgmma_wait<1>();
        wgmma_results(s);
        release(key_slot);
        if (Config::kBug == Bug::kEarlyRelease) release(value_slot);
        scores_to_weights(j);
        if (Config::kBug == Bug::kEarlyWeights) pack_weights<kN>(weights, s);
    }
    finish_values();

    // The queries have served; the last values.
    if (Config::kBug != Bug::kEarlyQueries || tiles == 1) release_queries();
    shared.query_phase ^= 1;
    float gate[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int at = min(row + 8 * half, unit.tile.end - 1);
        gate[half] = load_global_constant(p.gate + int64_t{at} * p.num_q_heads + unit.q_head);
    }
    wait_full(Config::kBug == Bug::kNoValueWait);
    wgmma_fence();
    multiply_values<Config>(o, weights, shared.tile(shared.slot));
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) factor[half] = sigmoid(gate[half]) / softmax.total(half);
    wgmma_wait<0>();
    wgmma_results(o);
    release(shared.slot);
    shared.advance();
    store(p, o, factor, unit, row);
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    gated_attention_sm90(const __grid_constant__ KernelParams p) {
    constexpr bool kPaired = Config::kCluster > 1;
    Shared<Config> shared(dynamic_shared_memory());
    const uint32_t warp = warp_id();
    const int rank = kPaired ? static_cast<int>(cluster_rank()) : 0;
    if (warp == 0 && elect_one()) {
        role("setup");
        tma_prefetch_map(&p.q);
        tma_prefetch_map(&p.k);
        tma_prefetch_map(&p.v);
        shared.initialise();
    }
    if constexpr (kPaired) cluster_arrive_relaxed();
    const Tokens tokens = tokens_of(p);  // here, so that the barrier hides the latency
    if constexpr (kPaired) {
        cluster_wait();
    } else {
        block_sync();
    }

    const Schedule<Config::kCluster> schedule(tokens, p.num_q_heads, p.num_kv_heads);
    const int units = schedule.units();
    if (warp < 4) {
        role("producer");
        registers_release<Config::kProducerRegisters>();
        if (warp == 0 && elect_one()) {
            for (int round = 0; dealt<Config>(round) < units; ++round) {
                produce(p, shared, schedule.get(dealt<Config>(round), rank), rank);
            }
            if (kPaired && Config::kBug != Bug::kNoDrain) drain(shared);
        }
        warp_sync();
    } else {
        role("consumer");
        registers_claim<Config::kConsumerRegisters>();
        const int consumer = static_cast<int>(warp) / 4 - 1;
        // The first warpgroup begins.
        if (consumer == 1) give_turn<Config>(consumer);
        for (int round = 0; dealt<Config>(round) < units; ++round) {
            attend(p, shared, schedule.get(dealt<Config>(round), rank), tokens, consumer);
        }
    }
}

}  // namespace magihuman::attention
