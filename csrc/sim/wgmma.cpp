// The tensor cores: products of a warpgroup, in order, finished some time before their wait.
//
// Each thread issues a product by itself; the product exists once all 128 have. Its accumulators then live in
// a tile of the warpgroup, and the threads' registers hold a marked NaN until a wait covers the last product
// on them. Registers that hold A must keep their values, and be alive, until then.
#include "sim/machine.h"
#include "sim/numeric.h"
#include "sim/tensor_core.h"

namespace magihuman::sim {

namespace {

// A signalling NaN: no arithmetic produces one, and any arithmetic on it gives other bits.
constexpr uint32_t kInFlight = 0x7fa0dead;
constexpr uint32_t kThreads = 128;

struct WgmmaDone final : AsyncOp {
    WgmmaDone() : AsyncOp(AsyncKind::kWgmma) {}
    Warpgroup* group;
    void complete() override;
};

void post_if_ready(Warpgroup& group) {
    if (group.event_posted || group.ops.empty() || group.ops.front().arrived < kThreads) return;
    group.event_posted = true;
    auto event = std::make_unique<WgmmaDone>();
    event->group = &group;
    machine->post(std::move(event));
}

void WgmmaDone::complete() {
    SharedMemory& memory = group->block->memory;
    WgmmaOp& op = group->ops.front();
    for (const auto* chunks : {&op.a_chunks, &op.b_chunks}) {
        memory.end_async_read(*chunks, op.reader);
    }
    multiply(op.form, memory.data(), op.a_chunks, op.b_chunks, op.a_registers,
             group->tiles[op.slot].values.data());
    group->ops.pop_front();
    ++group->first_op;
    group->event_posted = false;
    post_if_ready(*group);
    machine->wake_all(group->waiters);
}

// Registers of `thread` <-> its places in a tile.
template <typename Move>
void for_each_fragment(const Thread& thread, int n, Move move) {
    const int t = static_cast<int>(thread.linear % kThreads);
    for (int i = 0; i < n / 2; ++i) {
        const Place place = accumulator_place(t, i);
        move(i, place.row * n + place.column);
    }
}

LiveAccumulator* find_live(Thread& thread, const float* registers, int n) {
    for (LiveAccumulator& live : thread.live) {
        if (live.registers == registers && live.n == n) return &live;
        if (registers < live.registers + live.n / 2 && live.registers < registers + n / 2) {
            fail("register use in flight", "a WGMMA uses part of the accumulators of another one under way");
        }
    }
    return nullptr;
}

int free_tile(Warpgroup& group, int n) {
    size_t slot = 0;
    while (slot < group.tiles.size() && group.tiles[slot].users > 0) ++slot;
    if (slot == group.tiles.size()) group.tiles.emplace_back();
    group.tiles[slot].values.assign(64 * n, 0.0f);
    return static_cast<int>(slot);
}

// All 128 threads have issued the product: its operands are read from here on.
void start_reading(WgmmaOp& op, SharedMemory& memory) {
    if (!op.form.a_in_registers) op.a_chunks = operand_chunks(op.form, true, memory);
    op.b_chunks = operand_chunks(op.form, false, memory);
    for (const auto* chunks : {&op.a_chunks, &op.b_chunks}) {
        memory.begin_async_read(*chunks, op.reader);
    }
}

// Stable storage for "WGMMA by role x", one per role name.
const char* reader_of(const Thread& thread) {
    static std::vector<std::pair<std::string, std::unique_ptr<std::string>>> names;
    for (const auto& [role, name] : names)
        if (role == thread.role) return name->c_str();
    names.emplace_back(thread.role,
                       std::make_unique<std::string>(std::string("a WGMMA by role ") + thread.role));
    return names.back().second->c_str();
}

}  // namespace

void wgmma_fence() { current().wgmma_fenced = true; }

void wgmma(const WgmmaForm& form, float* accumulators, const uint32_t* a_registers) {
    Thread& thread = current();
    Warpgroup& group = *thread.warpgroup;
    if (!thread.wgmma_fenced) {
        fail("missing wgmma fence", "a WGMMA without wgmma_fence since the start or the last wgmma_wait");
    }
    if (form.n % 8 != 0 || form.n < 8 || form.n > 256) fail("wgmma shape", text("N = %d", form.n));

    const uint64_t ordinal = thread.wgmma_issued++;
    const size_t index = ordinal - group.first_op;
    LiveAccumulator* live = find_live(thread, accumulators, form.n);
    if (index == group.ops.size()) {
        const int slot = live != nullptr ? live->slot : free_tile(group, form.n);
        WgmmaOp& created = group.ops.emplace_back();
        created.form = form;
        created.slot = slot;
        created.reader = reader_of(thread);
        if (form.a_in_registers) created.a_registers.resize(kThreads * 4);
        ++counters.wgmmas;
    }
    WgmmaOp& op = group.ops[index];
    if (!(op.form == form) || (live != nullptr && live->slot != op.slot)) {
        fail("divergent warpgroup",
             "threads of one warpgroup issue different WGMMAs (shape, descriptors, accumulate"
             " or accumulators differ)");
    }
    AccumulatorTile& tile = group.tiles[op.slot];
    if (live == nullptr) {
        ++tile.users;
        for_each_fragment(thread, form.n, [&](int r, int at) {
            tile.values[at] = accumulators[r];
            std::memcpy(&accumulators[r], &kInFlight, sizeof(float));
        });
        thread.live.push_back({accumulators, form.n, op.slot, ordinal});
    } else {
        live->last_op = ordinal;
    }
    if (form.a_in_registers) {
        std::copy_n(a_registers, 4, &op.a_registers[thread.linear % kThreads * 4]);
        LiveOperand& operand = thread.live_operands.emplace_back();
        operand.registers = a_registers;
        std::copy_n(a_registers, 4, operand.values);
        operand.op = ordinal;
    }
    if (++op.arrived == kThreads) {
        start_reading(op, group.block->memory);
        post_if_ready(group);
    }
}

void wgmma_commit() { current().wgmma_groups.push_back(current().wgmma_issued); }

void wgmma_wait(int groups) {
    Thread& thread = current();
    Warpgroup& group = *thread.warpgroup;
    thread.wgmma_fenced = false;  // registers may be used from here on: the next product needs a new fence
    const size_t committed = thread.wgmma_groups.size();
    if (committed <= static_cast<size_t>(groups)) return;
    const uint64_t target = thread.wgmma_groups[committed - groups - 1];
    while (group.first_op < target) {
        group.waiters.push_back(&thread);
        machine->suspend({"wgmma_wait", nullptr, static_cast<uint32_t>(groups)});
    }
    thread.wgmma_waited = std::max(thread.wgmma_waited, target);
    std::erase_if(thread.live_operands, [&](const LiveOperand& operand) {
        if (operand.op >= target) return false;
        if (!std::equal(operand.values, operand.values + 4, operand.registers)) {
            fail("register use in flight", "A registers were changed between a WGMMA and its wait");
        }
        return true;
    });
    for (size_t i = 0; i < thread.live.size();) {
        const LiveAccumulator live = thread.live[i];
        if (live.last_op >= target) {
            ++i;
            continue;
        }
        AccumulatorTile& tile = group.tiles[live.slot];
        for_each_fragment(thread, live.n, [&](int r, int at) {
            if (bit_cast<uint32_t>(live.registers[r]) != kInFlight) {
                fail("register use in flight",
                     text("accumulator %d was written between a WGMMA and its wait", r));
            }
            live.registers[r] = tile.values[at];
        });
        --tile.users;
        thread.live[i] = thread.live.back();
        thread.live.pop_back();
    }
}

}  // namespace magihuman::sim
