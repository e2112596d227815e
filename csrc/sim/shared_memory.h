// One block's shared memory, and what is known about each 16 bytes (granule) of it.
//
// The memory begins as NaN (0xff bytes). A second copy follows every write that the simulator sees; where the
// two differ, someone wrote through a plain pointer, which no proxy rule can be checked for.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace magihuman::sim {

struct MBarrier;
struct Thread;

class SharedMemory {
  public:
    // Dynamic shared memory starts behind the kilobyte that the system keeps for itself.
    static constexpr uint32_t kWindowStart = 1024;
    static constexpr uint32_t kMaxBytes = 227 * 1024;

    SharedMemory();
    void reset(uint32_t bytes);

    uint8_t* data() const { return bytes_; }
    uint32_t size() const { return size_; }
    // Offset of a pointer into this memory; fails with `what` if any of its `bytes` bytes lie outside.
    uint32_t offset_of(const void* pointer, size_t bytes, const char* what) const;
    bool holds(const void* pointer) const;

    // The copy engine claims the destination at issue and releases it with the data, which `barrier`
    // announces.
    void begin_async_write(uint32_t offset, uint32_t bytes, const MBarrier& barrier);
    void async_write(uint32_t offset, const void* from, uint32_t bytes);
    void end_async_write(uint32_t offset, uint32_t bytes);

    // A TMA store or a WGMMA reads the granule at `offset` some time between begin and end. `reader` (a role
    // and an instruction) must outlive the read.
    void begin_async_read(uint32_t offset, const char* reader);
    void end_async_read(uint32_t offset) { --readers_[offset / 16]; }
    // Fails if a plain pointer wrote while the read was under way.
    void check_unchanged(uint32_t offset, const char* reader) const;

    void generic_write(uint32_t offset, const void* from, uint32_t bytes, const Thread& writer);
    void generic_read(uint32_t offset, void* to, uint32_t bytes) const;

  private:
    // Fails unless the granule holds data that someone has waited for.
    void check_arrived(uint32_t offset, uint32_t bytes, const char* reader) const;

    enum State : uint8_t { kUnwritten, kWritten, kArriving };
    static constexpr uint16_t kAsyncProxy = 0xffff;

    std::unique_ptr<uint8_t[]> storage_, mirror_;
    uint8_t* bytes_;
    uint32_t size_ = 0;
    std::vector<uint8_t> state_;
    std::vector<uint16_t> readers_;
    std::vector<const char*> reader_name_;
    std::vector<uint16_t> writer_;          // thread of the last generic write, or kAsyncProxy
    std::vector<uint32_t> writer_epoch_;    // its count of proxy fences at that time
    std::vector<const MBarrier*> bringer_;  // where the last copy announced itself
    std::vector<uint32_t> bringer_phase_;   // and in which phase
};

}  // namespace magihuman::sim
