// The simulated machine: one cluster at a time, its blocks, warps and threads, and everything asynchronous
// that is under way. Only csrc/sim includes this.
//
// Threads are fibres. They run until they wait; the scheduler then picks, at random by the seed, another warp
// that can run or an asynchronous operation to complete. One operating-system thread runs it all.
#pragma once

#include <deque>
#include <memory>

#include "hopper/device.h"
#include "sim/fibre.h"
#include "sim/instructions.h"
#include "sim/shared_memory.h"

namespace magihuman::sim {

struct Block;
struct Warp;
struct Warpgroup;
struct Thread;

struct MBarrier {
    uint32_t offset = 0;
    uint32_t count = 0;
    uint32_t pending = 0;      // arrivals that the current phase still needs
    int64_t transactions = 0;  // bytes announced minus bytes arrived in the current phase
    uint32_t phase = 0;        // phases ended so far
    uint32_t seen = 0;         // phases that some wait has seen ended
    uint32_t last_data = 0;    // 1 + the last ended phase that brought data
    uint32_t bytes_in_phase = 0;
    bool fenced = false;     // by fence_mbarrier_init: for the copy engine and other blocks
    bool published = false;  // so, or by a barrier of the block: for the block's other threads
    const Thread* initialiser = nullptr;
    std::string name;
    std::vector<Thread*> waiters;
};

struct NamedBarrier {
    uint32_t threads = 0;  // as the first arrival says; 0 between uses
    uint32_t arrived = 0;
    std::vector<Thread*> waiters;
};

// One product in flight. Ordinals count a warpgroup's products from 0.
struct WgmmaOp {
    WgmmaForm form;
    int slot;                                  // its accumulator tile
    uint32_t arrived = 0;                      // threads that have issued it
    const char* reader;                        // who, for messages
    std::vector<uint32_t> a_chunks, b_chunks;  // shared offsets of the 16-byte pieces
    std::vector<uint32_t> a_registers;         // [128][4]
};

struct AccumulatorTile {
    int users = 0;              // threads whose registers it stands for
    std::vector<float> values;  // [64][n]
};

struct Warpgroup {
    Block* block = nullptr;
    std::deque<WgmmaOp> ops;
    uint64_t first_op = 0;  // ordinal of ops.front(): all before are done
    bool event_posted = false;
    std::vector<AccumulatorTile> tiles;
    std::vector<Thread*> waiters;
    uint32_t max_registers = 0;
};

struct Warp {
    Block* block = nullptr;
    Thread* lanes = nullptr;  // 32 of them
    uint32_t ready = 0;       // bit i: lane i can run
    uint32_t ended = 0;       // bit i: lane i has ended
    double weight = 1;
    // The collective under way: who has come, what they gave; results by parity of the generation.
    const char* operation = nullptr;
    uint32_t arrived = 0;
    uint32_t generation = 0;
    uint64_t given[32], result[2][32];
};

// Accumulator registers of one thread that products under way may write.
struct LiveAccumulator {
    float* registers;
    int n;
    int slot;
    uint64_t last_op;
};

// Registers of one thread that a product under way reads as its A.
struct LiveOperand {
    const uint32_t* registers;
    uint32_t values[4];
    uint64_t op;
};

struct BulkGroup {
    int reads = 0, writes = 0;  // stores that have yet to read shared / write global memory
};

struct Waiting {
    const char* what = nullptr;  // null: running or ready
    const MBarrier* barrier = nullptr;
    uint32_t number = 0;  // parity, barrier id or group count
};

struct Thread {
    FibreContext fibre;
    Waiting waiting;
    Block* block = nullptr;
    Warp* warp = nullptr;
    Warpgroup* warpgroup = nullptr;
    const char* role = "-";
    dim3 index;
    uint32_t linear = 0;  // in the block
    bool done = false;
    uint32_t proxy_fences = 0;
    bool unpublished = false;  // has initialised mbarriers that only itself may use so far
    // WGMMA: products issued, the ordinal behind each committed group, and what they may still write.
    bool wgmma_fenced = false;
    uint64_t wgmma_issued = 0;
    std::vector<uint64_t> wgmma_groups;
    uint64_t wgmma_waited = 0;
    std::vector<LiveAccumulator> live;
    std::vector<LiveOperand> live_operands;
    // TMA stores: all groups so far, the last one open.
    std::vector<BulkGroup> bulk{1};
    size_t bulk_reads_waited = 0;
    uint64_t cluster_target = 0;

    uint32_t lane() const { return linear % 32; }
};

struct Block {
    explicit Block(SharedMemory& memory) : memory(memory) {}

    dim3 index;
    uint32_t rank = 0;  // in the cluster
    uint32_t running = 0;
    SharedMemory& memory;
    std::deque<MBarrier> barriers;
    std::vector<int16_t> barrier_at;  // by shared offset / 8; -1: none
    NamedBarrier named[16];
    std::vector<Warpgroup> warpgroups;
    std::vector<Warp> warps;
    std::vector<Thread> threads;

    // The barrier at an offset of this block's memory; fails if nobody initialised one there.
    MBarrier& barrier(uint32_t offset);
};

// Something under way that the scheduler may complete at any time.
enum class AsyncKind { kLoad, kStore, kWgmma };
struct AsyncOp {
    explicit AsyncOp(AsyncKind kind) : kind(kind) {}
    virtual ~AsyncOp() = default;
    virtual void complete() = 0;
    AsyncKind kind;
};

class Machine {
  public:
    Machine(const GridConfig& config, const std::function<void()>& body, uint64_t seed);
    void run();

    const GridConfig& config;
    const std::function<void()>& body;
    Thread* current = nullptr;
    std::vector<std::unique_ptr<Block>> blocks;  // of the running cluster
    uint64_t cluster_arrivals = 0;               // ever; the barrier opens at multiples of all threads
    std::vector<Thread*> cluster_waiters;
    uint32_t elected_lane = 0;

    uint64_t random() {
        rng_ ^= rng_ << 13;
        rng_ ^= rng_ >> 7;
        rng_ ^= rng_ << 17;
        return rng_ * 0x2545f4914f6cdd1d;
    }
    bool chance(double probability) { return random() * 0x1p-64 < probability; }

    void post(std::unique_ptr<AsyncOp> op);
    // The running thread waits: returns after someone called wake for it.
    void suspend(const Waiting& waiting);
    // The running thread lets others go first, now and then.
    void maybe_yield() {
        if (!chance(0.06)) return;
        wake(current);
        suspend({});
    }
    void wake(Thread* thread) { wake_lanes(thread->warp, 1u << thread->lane()); }
    // A warp that is running right now re-enters the list as well: its `ready` was taken at the start.
    void wake_lanes(Warp* warp, uint32_t lanes) {
        if (warp->ready == 0) ready_.push_back(warp);
        warp->ready |= lanes;
    }
    void wake_all(std::vector<Thread*>& waiters);
    [[noreturn]] void fail(const char* kind, const std::string& what);
    [[noreturn]] void finish_thread();

  private:
    void start_cluster(dim3 origin);
    void run_cluster();
    void run_warp(Warp* warp);
    Thread* next_lane();
    void leave(Thread* thread);
    void complete_one();
    void check_exit(Thread& thread);
    void check_cluster_end();
    [[noreturn]] void report_deadlock();

    FibreContext scheduler_;
    std::vector<Warp*> ready_;
    // Of the warp that runs: lanes whose turn is to come, and in which direction.
    Warp* running_ = nullptr;
    uint32_t todo_ = 0;
    bool upwards_ = true;
    // Under way; the late ones complete only when nothing else can happen.
    std::vector<std::unique_ptr<AsyncOp>> in_flight_, late_;
    uint64_t rng_;
    double async_share_ = 0.5;  // how often an operation completes although threads could run
    double late_share_[3];      // how many operations of each kind are late
    bool failed_ = false;
    std::string failure_kind_, failure_;
};

extern Machine* machine;  // null outside a launch
[[noreturn]] void fail(const char* kind, const std::string& what);
[[noreturn]] void fail_outside();
// The running thread.
inline Thread& current() {
    if (machine == nullptr || machine->current == nullptr) fail_outside();
    return *machine->current;
}

std::string barrier_name(const MBarrier& barrier);
void mbarrier_complete_bytes(Block& block, uint32_t offset, uint32_t bytes, uint32_t phase,
                             const std::string& who);

template <typename... Args>
std::string text(const char* format, Args... args) {
    char buffer[512];
    std::snprintf(buffer, sizeof(buffer), format, args...);
    return buffer;
}

extern Counters counters;

}  // namespace magihuman::sim
