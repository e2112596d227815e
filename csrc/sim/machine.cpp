#include "sim/machine.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <mutex>
#include <utility>

namespace magihuman::sim {

Machine* machine = nullptr;
Counters counters{};

namespace {

uint64_t next_seed = 0;
uint32_t processors = 3;  // a number that divides few tile counts
std::mutex one_launch_at_a_time;

struct GlobalBuffer {
    size_t bytes;
    std::string name;
};
std::map<uintptr_t, GlobalBuffer> globals;

uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return x ^ x >> 31;
}

void thread_entry() {
    machine->body();
    machine->finish_thread();
}

}  // namespace

void set_seed(uint64_t seed) { next_seed = seed; }
void set_multiprocessor_count(uint32_t count) { processors = count; }
uint32_t multiprocessor_count() { return processors; }
Counters take_counters() { return std::exchange(counters, Counters{}); }

void register_global(const void* start, size_t bytes, const char* name) {
    globals[reinterpret_cast<uintptr_t>(start)] = {bytes, name};
}
void clear_globals() { globals.clear(); }

void check_global(const void* address, size_t bytes, const char* what) {
    if (globals.empty()) return;
    const auto start = reinterpret_cast<uintptr_t>(address);
    auto after = globals.upper_bound(start);
    if (after != globals.begin()) {
        const auto& [base, buffer] = *std::prev(after);
        if (start + bytes <= base + buffer.bytes) return;
        if (start < base + buffer.bytes + 65536) {
            fail("out of bounds", text("%s: %zu bytes at offset %zu of global buffer %s, which has %zu", what,
                                       bytes, size_t(start - base), buffer.name.c_str(), buffer.bytes));
        }
    }
    fail("out of bounds", text("%s: %zu bytes at %p, in no registered global buffer", what, bytes, address));
}

void check_global_access(const void* address, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
        fail("misaligned", text("global access of %zu bytes at %p", bytes, address));
    }
    check_global(address, bytes, "global access");
}

void fail_outside() { throw std::logic_error("device code called outside a launch"); }

void fail(const char* kind, const std::string& what) {
    if (machine == nullptr) throw Error(kind, what);
    machine->fail(kind, what);
}

const dim3& thread_index() { return machine->current->index; }
const dim3& block_index() { return machine->current->block->index; }
const dim3& grid_size() { return machine->config.grid; }
const dim3& block_size() {
    static dim3 size;
    size = dim3(machine->config.threads);
    return size;
}
void role(const char* name) { current().role = name; }

void run_grid(const GridConfig& config, const std::function<void()>& body) {
    const std::lock_guard lock(one_launch_at_a_time);
    const auto require = [&](bool holds, const char* rule) {
        if (!holds) throw Error("launch refused", std::string(config.kernel_name) + ": " + rule);
    };
    require(config.threads >= 32 && config.threads <= 1024 && config.threads % 32 == 0,
            "threads per block must be a multiple of 32 up to 1024");
    require(config.cluster >= 1 && config.cluster <= 16 && config.grid.x % config.cluster == 0,
            "the cluster must divide grid.x and have at most 16 blocks");
    require(config.shared_bytes <= SharedMemory::kMaxBytes, "a block has at most 227 KB of shared memory");
    require(config.grid.x > 0 && config.grid.y > 0 && config.grid.z > 0, "the grid must not be empty");
    Machine instance(config, body, next_seed++);
    machine = &instance;
    try {
        instance.run();
    } catch (...) {
        machine = nullptr;
        throw;
    }
    machine = nullptr;
}

Machine::Machine(const GridConfig& config, const std::function<void()>& body, uint64_t seed)
    : config(config), body(body), rng_(mix(seed)) {
    // Four kinds of weather: an even mix; everything late (finds missing waits); everything early (finds
    // overwriting); and a mix in which some warps hardly ever get to run.
    constexpr double kShares[] = {0.5, 0.0, 1.0, 0.1};
    async_share_ = kShares[seed % 4];
    // And in three of four launches one kind of operation is far slower than all others.
    for (int kind = 0; kind < 3; ++kind) late_share_[kind] = seed / 4 % 4 == kind + 1u ? 0.95 : 0.05;
    elected_lane = static_cast<uint32_t>(random() % 32);
}

void Machine::run() {
    std::vector<dim3> origins;
    for (uint32_t z = 0; z < config.grid.z; ++z)
        for (uint32_t y = 0; y < config.grid.y; ++y)
            for (uint32_t x = 0; x < config.grid.x; x += config.cluster) origins.emplace_back(x, y, z);
    for (size_t i = origins.size(); i > 1; --i) std::swap(origins[i - 1], origins[random() % i]);
    for (const dim3& origin : origins) {
        start_cluster(origin);
        run_cluster();
        check_cluster_end();
    }
}

void Machine::start_cluster(dim3 origin) {
    // Memories are large and kept; all else starts afresh.
    static std::vector<std::unique_ptr<SharedMemory>> memories;
    ready_.clear();
    in_flight_.clear();
    late_.clear();
    blocks.clear();
    cluster_arrivals = 0;
    cluster_waiters.clear();
    for (uint32_t rank = 0; rank < config.cluster; ++rank) {
        if (memories.size() <= rank) memories.push_back(std::make_unique<SharedMemory>());
        auto block = std::make_unique<Block>(*memories[rank]);
        block->memory.reset(config.shared_bytes);
        block->index = dim3(origin.x + rank, origin.y, origin.z);
        block->rank = rank;
        block->running = config.threads;
        block->barrier_at.assign(config.shared_bytes / 8 + 1, -1);
        block->warpgroups.resize((config.threads + 127) / 128);
        block->warps.resize(config.threads / 32);
        block->threads.resize(config.threads);
        for (Warpgroup& group : block->warpgroups) group.block = block.get();
        for (uint32_t i = 0; i < config.threads; ++i) {
            Thread& thread = block->threads[i];
            thread.index = dim3(i, 0, 0);
            thread.linear = i;
            thread.block = block.get();
            thread.warp = &block->warps[i / 32];
            thread.warpgroup = &block->warpgroups[i / 128];
            const size_t fibre = rank * config.threads + i;
            // Stacks at one distance would all fall into the same few cache sets: stagger their tops.
            fibre_prepare(thread.fibre, fibre_stack(fibre), kFibreStackBytes - fibre % 29 * 192,
                          thread_entry);
        }
        for (size_t i = 0; i < block->warps.size(); ++i) {
            Warp& warp = block->warps[i];
            warp.block = block.get();
            warp.lanes = &block->threads[i * 32];
            warp.ready = 0xffffffff;
            warp.weight = chance(0.5) ? 1 : 0.05;
            ready_.push_back(&warp);
        }
        blocks.push_back(std::move(block));
    }
}

void Machine::run_cluster() {
    while (!ready_.empty() || !in_flight_.empty() || !late_.empty()) {
        if (ready_.empty() || (!in_flight_.empty() && chance(async_share_))) {
            complete_one();
            continue;
        }
        size_t pick = random() % ready_.size();
        if (async_share_ == 0.1) {  // the unfair kind
            for (int tries = 0; tries < 8 && !chance(ready_[pick]->weight); ++tries)
                pick = random() % ready_.size();
        }
        Warp* warp = ready_[pick];
        ready_[pick] = ready_.back();
        ready_.pop_back();
        run_warp(warp);
    }
    for (const auto& block : blocks)
        if (block->running > 0) report_deadlock();
}

void Machine::run_warp(Warp* warp) {
    running_ = warp;
    todo_ = std::exchange(warp->ready, 0);
    // Lanes in either direction: code that leans on lane 0 being first has a missing warp_sync.
    upwards_ = chance(0.5);
    current = next_lane();
    fibre_switch(scheduler_, current->fibre);
    current = nullptr;
    if (failed_) throw Error(failure_kind_, failure_);
}

Thread* Machine::next_lane() {
    const int lane = upwards_ ? __builtin_ctz(todo_) : 31 - __builtin_clz(todo_);
    todo_ &= ~(1u << lane);
    Thread* thread = &running_->lanes[lane];
    thread->waiting.what = nullptr;
    ++counters.switches;
    return thread;
}

// To the warp's next lane, without the detour by the scheduler, or back to that.
void Machine::leave(Thread* thread) {
    if (todo_ == 0) {
        fibre_switch(thread->fibre, scheduler_);
    } else {
        current = next_lane();
        fibre_switch(thread->fibre, current->fibre);
    }
}

void Machine::post(std::unique_ptr<AsyncOp> op) {
    (chance(late_share_[static_cast<int>(op->kind)]) ? late_ : in_flight_).push_back(std::move(op));
}

void Machine::complete_one() {
    auto& from = in_flight_.empty() ? late_ : in_flight_;
    const size_t pick = random() % from.size();
    const std::unique_ptr<AsyncOp> op = std::move(from[pick]);
    from[pick] = std::move(from.back());
    from.pop_back();
    op->complete();
}

void Machine::suspend(const Waiting& waiting) {
    current->waiting = waiting;
    leave(current);
}

void Machine::wake_all(std::vector<Thread*>& waiters) {
    for (Thread* thread : waiters) wake(thread);
    waiters.clear();
}

void Machine::fail(const char* kind, const std::string& what) {
    std::string where = std::string("kernel ") + config.kernel_name;
    if (current != nullptr) {
        const dim3& b = current->block->index;
        where +=
            text(", block (%u, %u, %u), role %s, thread %u", b.x, b.y, b.z, current->role, current->linear);
    }
    where += ": " + what;
    if (current == nullptr) throw Error(kind, where);
    // No exception may cross fibres: the scheduler throws it. This fibre is never resumed.
    failed_ = true;
    failure_kind_ = kind;
    failure_ = where;
    fibre_switch(current->fibre, scheduler_);
    __builtin_unreachable();
}

void Machine::finish_thread() {
    check_exit(*current);
    current->done = true;
    current->warp->ended |= 1u << current->lane();
    --current->block->running;
    leave(current);
    __builtin_unreachable();
}

void Machine::check_exit(Thread& thread) {
    if (thread.warp->arrived != 0) {
        fail("divergent warp",
             text("lane %u ends while others wait at %s", thread.lane(), thread.warp->operation));
    }
    if (thread.wgmma_waited != thread.wgmma_issued) {
        fail("un-waited work",
             text("the thread ends with %llu WGMMA products it never waited for",
                  static_cast<unsigned long long>(thread.wgmma_issued - thread.wgmma_waited)));
    }
    const bool uncommitted = thread.bulk.back().reads + thread.bulk.back().writes > 0;
    if (uncommitted || thread.bulk_reads_waited + 1 < thread.bulk.size()) {
        fail("un-waited work",
             "the thread ends while its TMA stores may still read shared memory"
             " (commit, then tma_store_wait_read<0> or tma_store_wait<0>)");
    }
}

void Machine::check_cluster_end() {
    for (const auto& block : blocks) {
        uint32_t registers = 0;
        for (const Warpgroup& group : block->warpgroups) registers += group.max_registers * 128;
        if (registers > 65536) {
            fail("registers", text("the roles claim %u registers; a multiprocessor has 65536", registers));
        }
        for (const MBarrier& barrier : block->barriers) {
            if (barrier.transactions != 0) {
                fail("transaction-count mismatch",
                     barrier_name(barrier) + text(" ends with %lld bytes announced and not"
                                                  " arrived",
                                                  (long long)barrier.transactions));
            }
            if (barrier.last_data > barrier.seen) {
                fail("un-waited work", text("data of phase %u arrived on %s, and nobody waited for it",
                                            barrier.last_data - 1, barrier_name(barrier).c_str()));
            }
        }
    }
}

void Machine::report_deadlock() {
    std::map<std::string, int> groups;
    const char* kind = "deadlock";
    for (const auto& block : blocks) {
        for (const Thread& thread : block->threads) {
            if (thread.done) continue;
            const Waiting& w = thread.waiting;
            std::string line = text("block (%u, %u, %u), role %s waits at %s", block->index.x, block->index.y,
                                    block->index.z, thread.role, w.what);
            if (w.barrier != nullptr) {
                const MBarrier& b = *w.barrier;
                line += text(" %s for parity %u: phase %u lacks %u of %u arrivals and %lld bytes",
                             barrier_name(b).c_str(), w.number, b.phase, b.pending, b.count,
                             (long long)b.transactions);
                if (b.pending == 0 && b.transactions != 0) kind = "transaction-count mismatch";
            } else {
                line += text(" %u", w.number);
            }
            ++groups[line];
        }
    }
    std::string report = "all threads wait and nothing is under way;";
    for (const auto& [line, threads] : groups) report += text("\n  %d threads: %s", threads, line.c_str());
    fail(kind, report);
}

}  // namespace magihuman::sim
