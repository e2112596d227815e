// One block's shared memory, and what is known about each 16 bytes (granule) of it.
//
// The memory begins as NaN (0xff bytes). A second copy follows every write that the simulator sees; where the
// two differ, someone wrote through a plain pointer, which no proxy rule can be checked for.
#pragma once

#include <cstdint>
#include <cstring>
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
    uint32_t offset_of(const void* pointer, size_t bytes, const char* what) const {
        const auto offset = static_cast<const uint8_t*>(pointer) - bytes_;
        if (offset < 0 || offset + static_cast<int64_t>(bytes) > size_) fail_outside(offset, bytes, what);
        return static_cast<uint32_t>(offset);
    }
    bool holds(const void* pointer) const;

    // The copy engine claims the destination at issue and releases it with the data, which `barrier`
    // announces.
    void begin_async_write(uint32_t offset, uint32_t bytes, const MBarrier& barrier);
    // One granule of the data.
    void async_write(uint32_t offset, const void* from) {
        std::memcpy(bytes_ + offset, from, 16);
        std::memcpy(mirror_.get() + offset, from, 16);
    }
    void end_async_write(uint32_t offset, uint32_t bytes);

    // A TMA store or a WGMMA reads the granules at `offsets` some time between begin and end. `reader` (a role
    // and an instruction) must outlive the read. The end fails if a plain pointer wrote while the read was
    // under way.
    void begin_async_read(const std::vector<uint32_t>& offsets, const char* reader);
    void end_async_read(const std::vector<uint32_t>& offsets, const char* reader);

    // Ordinary accesses of 2, 4, 8 or 16 bytes.
    void generic_write(uint32_t offset, const void* from, uint32_t bytes, const Thread& writer);
    void generic_read(uint32_t offset, void* to, uint32_t bytes) const;

  private:
    enum State : uint8_t { kUnwritten, kWritten, kArriving };
    static constexpr uint16_t kAsyncProxy = 0xffff;

    struct Granule {
        const char* reader_name = nullptr;  // the last of the readers
        const MBarrier* bringer = nullptr;  // where the last copy announced itself
        uint32_t bringer_phase = 0;         // and in which phase
        uint32_t writer_epoch = 0;          // the writer's count of proxy fences at that time
        uint16_t writer = kAsyncProxy;      // thread of the last generic write, or kAsyncProxy
        uint16_t readers = 0;
        State state = kUnwritten;
    };

    bool same(uint32_t offset, uint32_t bytes) const {
        return std::memcmp(bytes_ + offset, mirror_.get() + offset, bytes) == 0;
    }
    // Fails unless the granule holds data that someone has waited for.
    void check_arrived(uint32_t offset, uint32_t bytes, const char* reader) const;
    void check_unchanged(uint32_t offset, const char* reader) const;
    [[noreturn]] void fail_outside(int64_t offset, size_t bytes, const char* what) const;

    std::unique_ptr<uint8_t[]> storage_, mirror_;
    uint8_t* bytes_;
    uint32_t size_ = 0;
    std::vector<Granule> granules_;
};

}  // namespace magihuman::sim
