// What csrc/hopper calls when it is compiled for the simulator: one function per instruction, and the
// settings that tests use. The machine behind them is in machine.h.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "sim/cuda_language.h"

namespace magihuman {
struct Barrier;
struct TensorMap;
}  // namespace magihuman

namespace magihuman::sim {

// --- what tests set and see -------------------------------------------------------------------------------

// A rule of the machine was broken. what() = "<kind>: kernel .., block .., role ..: <what happened>".
struct Error : std::runtime_error {
    Error(std::string kind, const std::string& message)
        : std::runtime_error(kind + ": " + message), kind(std::move(kind)) {}
    std::string kind;
};

// Chooses the schedule of the next launches: the same seed gives the same order of events.
void set_seed(uint64_t seed);
void set_multiprocessor_count(uint32_t count);
uint32_t multiprocessor_count();

// Once any buffer is registered, tensor maps and load/store_global must stay inside registered buffers.
void register_global(const void* start, size_t bytes, const char* name);
void clear_globals();
void check_global(const void* address, size_t bytes, const char* what);

// Counts since the last call: for tests that state how much work a schedule did.
struct Counters {
    uint64_t switches, tma_loads, tma_stores, wgmmas;
};
Counters take_counters();

// --- launching --------------------------------------------------------------------------------------------

struct GridConfig {
    const char* kernel_name;
    dim3 grid;
    uint32_t threads;
    uint32_t cluster;
    uint32_t shared_bytes;
};
void run_grid(const GridConfig& config, const std::function<void()>& thread_body);

// --- instructions -----------------------------------------------------------------------------------------

uint8_t* dynamic_shared_memory();
uint32_t shared_address(const void* pointer);
void role(const char* name);

void mbarrier_init(Barrier* barrier, uint32_t count, const char* name, int index);
void fence_mbarrier_init();
void mbarrier_arrive(Barrier* barrier);
void mbarrier_arrive_cluster(Barrier* barrier, uint32_t block_rank);
void mbarrier_arrive_expect_tx(Barrier* barrier, uint32_t bytes);
bool mbarrier_try_wait(Barrier* barrier, uint32_t parity);
void mbarrier_wait(Barrier* barrier, uint32_t parity);

void block_sync();
void named_barrier_sync(uint32_t id, uint32_t threads);
void named_barrier_arrive(uint32_t id, uint32_t threads);
void fence_proxy_async();
uint32_t cluster_rank();
uint32_t cluster_size();
void cluster_arrive_relaxed();
void cluster_wait();
bool elect_one();
void set_max_registers(uint32_t count, bool claim);

void warp_sync();
// All lanes give a word and get everybody's.
const uint64_t* warp_exchange(const char* operation, uint64_t word);
uint32_t ballot(bool predicate);
void stmatrix(void* row, const uint32_t (&registers)[4], bool transposed);
void ldmatrix(const void* row, uint32_t (&registers)[4], bool transposed);

template <typename T>
T shuffle(T value, uint32_t source) {
    static_assert(sizeof(T) <= 8);
    uint64_t word = 0;
    std::memcpy(&word, &value, sizeof(T));
    word = warp_exchange("shuffle", word)[source];
    std::memcpy(&value, &word, sizeof(T));
    return value;
}

void tma_check_map(const TensorMap* map);
void tma_load(void* destination, const TensorMap* map, Barrier* barrier, uint32_t block_mask,
              const int* coordinates, int rank);
void tma_store(const TensorMap* map, const void* source, const int* coordinates, int rank);
void tma_store_commit();
void tma_store_wait(uint32_t groups, bool only_reads);

struct WgmmaForm {
    int n;
    bool a_mn_major, b_mn_major, accumulate, a_in_registers;
    uint64_t a, b;  // descriptors
    bool operator==(const WgmmaForm&) const = default;
};
void wgmma_fence();
void wgmma(const WgmmaForm& form, float* accumulators, const uint32_t* a_registers);
void wgmma_commit();
void wgmma_wait(int groups);

void check_global_access(const void* address, size_t bytes);
void load_shared_bytes(const void* address, void* to, size_t bytes);
void store_shared_bytes(void* address, const void* from, size_t bytes);

template <typename T>
T load_global(const T* address) {
    check_global_access(address, sizeof(T));
    T value;
    std::memcpy(&value, address, sizeof(T));
    return value;
}

template <typename T>
void store_global(T* address, T value) {
    check_global_access(address, sizeof(T));
    std::memcpy(address, &value, sizeof(T));
}

template <typename T>
T load_shared(const void* address) {
    T value;
    load_shared_bytes(address, &value, sizeof(T));
    return value;
}

template <typename T>
void store_shared(void* address, T value) {
    store_shared_bytes(address, &value, sizeof(T));
}

}  // namespace magihuman::sim
