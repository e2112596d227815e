// Tensor maps: how the copy engine sees a tensor in global memory. Made by launchers, on the host, from one
// plain description that is checked the same way for the device and for the simulator.
#pragma once

#include <stdexcept>
#include <string>

#include "hopper/device.h"

#if !defined(MAGIHUMAN_SIM)
#include <cuda.h>
#endif

namespace magihuman {

enum class ElementType : uint32_t { kBf16, kFp16, kFloat32 };

__host__ __device__ constexpr uint32_t element_bytes(ElementType type) {
    return type == ElementType::kFloat32 ? 4 : 2;
}

// How much of L2 a miss fills. 256 bytes suit rows that neighbouring boxes go on reading.
enum class L2Promotion : uint32_t { kNone, kBytes64, kBytes128, kBytes256 };

// Dimension 0 is the innermost (contiguous) one. strides[i] is the distance in bytes between neighbours along
// dimension i + 1. Box elements outside `dims`, negative coordinates too, read as zero and are never stored.
struct TensorMapSpec {
    const void* base;
    ElementType type;
    uint32_t rank;  // 1..5
    uint64_t dims[5];
    uint64_t strides[4];
    uint32_t box[5];
    Swizzle swizzle;
    L2Promotion promotion = L2Promotion::kBytes256;

    constexpr uint32_t box_bytes() const {
        uint32_t bytes = element_bytes(type);
        for (uint32_t i = 0; i < rank; ++i) bytes *= box[i];
        return bytes;
    }
};

#if defined(MAGIHUMAN_SIM)
struct alignas(128) TensorMap {
    TensorMapSpec spec;
    uint32_t magic;  // tells a map from uninitialised memory
};
constexpr uint32_t kTensorMapMagic = 0x7e4504a9;
#else
struct alignas(128) TensorMap {
    CUtensorMap driver_map;
};
#endif

// Row-major matrix [rows, columns], `pitch` bytes from row to row, read in boxes of [box_rows, box_columns].
inline TensorMapSpec matrix_map_spec(const void* base, ElementType type, uint64_t rows, uint64_t columns,
                                     uint64_t pitch, uint32_t box_rows, uint32_t box_columns,
                                     Swizzle swizzle) {
    return {base, type, 2, {columns, rows}, {pitch}, {box_columns, box_rows}, swizzle};
}

// The driver's rules (cuTensorMapEncodeTiled, interleave NONE), and one of ours: with a swizzle the inner box
// row fills the span exactly, because nothing documents where shorter rows would lie.
inline void check_tensor_map_spec(const TensorMapSpec& spec, const char* name) {
    const auto require = [name](bool holds, const std::string& rule, uint64_t got) {
        if (!holds) {
            throw std::invalid_argument("tensor map " + std::string(name) + ": " + rule + ", got " +
                                        std::to_string(got));
        }
    };
    require(spec.rank >= 1 && spec.rank <= 5, "rank must be 1..5", spec.rank);
    const auto address = reinterpret_cast<uintptr_t>(spec.base);
    require(address != 0 && address % 16 == 0, "misaligned base: must be a multiple of 16 bytes", address);
    for (uint32_t i = 0; i < spec.rank; ++i) {
        const std::string axis = " of dimension " + std::to_string(i);
        require(spec.dims[i] >= 1 && spec.dims[i] <= 1ull << 32, "size" + axis + " must be 1..2^32",
                spec.dims[i]);
        require(spec.box[i] >= 1 && spec.box[i] <= 256, "box" + axis + " must be 1..256", spec.box[i]);
        if (i + 1 < spec.rank) {
            require(spec.strides[i] % 16 == 0 && spec.strides[i] < 1ull << 40,
                    "misaligned stride: bytes between neighbours" + axis +
                        " + 1 must be a multiple of 16 below 2^40",
                    spec.strides[i]);
        }
    }
    const uint32_t inner = spec.box[0] * element_bytes(spec.type);
    require(inner % 16 == 0, "inner box row must be a multiple of 16 bytes", inner);
    if (spec.swizzle != Swizzle::kNone) {
        require(inner == swizzle_span(spec.swizzle),
                "inner box row must fill the swizzle span of " + std::to_string(swizzle_span(spec.swizzle)) +
                    " bytes",
                inner);
    }
}

#if defined(MAGIHUMAN_SIM)

inline TensorMap make_tensor_map(const TensorMapSpec& spec, const char* name) {
    check_tensor_map_spec(spec, name);
    uint64_t extent = spec.dims[0] * element_bytes(spec.type);
    for (uint32_t i = 1; i < spec.rank && i < 5; ++i) extent += (spec.dims[i] - 1) * spec.strides[i - 1];
    sim::check_global(spec.base, extent, name);
    return {spec, kTensorMapMagic};
}

#else

// A function of the driver's, found at run time: the library must load on machines that have none.
template <typename Function>
Function driver_function(const char* name) {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion(name, &entry, 12000, cudaEnableDefault, &found);
    if (error != cudaSuccess || found != cudaDriverEntryPointSuccess || entry == nullptr) {
        throw std::runtime_error("the CUDA driver offers no " + std::string(name) +
                                 " (12.0 or newer is needed)");
    }
    return reinterpret_cast<Function>(entry);
}

// The driver's functions work in the thread's context, and a thread whose first act this is has none: tensors and
// streams may come from other threads. The runtime then binds the current device's. A context that is there stays,
// whoever made it. Nothing is allocated or awaited.
inline void bind_context() {
    static const auto current = driver_function<CUresult (*)(CUcontext*)>("cuCtxGetCurrent");
    CUcontext context = nullptr;
    if (current(&context) == CUDA_SUCCESS && context != nullptr) return;
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaSetDevice(device);
    if (error != cudaSuccess) {
        throw std::runtime_error(std::string("no CUDA device to launch on: ") + cudaGetErrorString(error));
    }
}

inline TensorMap make_tensor_map(const TensorMapSpec& spec, const char* name) {
    check_tensor_map_spec(spec, name);
    bind_context();
    using Encode =
        CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                     const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                     CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
    static const auto encode = driver_function<Encode>("cuTensorMapEncodeTiled");
    constexpr CUtensorMapDataType kTypes[] = {
        CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, CU_TENSOR_MAP_DATA_TYPE_FLOAT32};
    constexpr CUtensorMapSwizzle kSwizzles[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_32B,
                                                CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_128B};
    constexpr CUtensorMapL2promotion kPromotions[] = {
        CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_64B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B};
    const cuuint32_t element_strides[5] = {1, 1, 1, 1, 1};
    cuuint64_t dims[5], strides[4];
    for (int i = 0; i < 5; ++i) dims[i] = spec.dims[i];
    for (int i = 0; i < 4; ++i) strides[i] = spec.strides[i];
    TensorMap map;
    const CUresult result =
        encode(&map.driver_map, kTypes[static_cast<uint32_t>(spec.type)], spec.rank,
               const_cast<void*>(spec.base), dims, strides, spec.box, element_strides,
               CU_TENSOR_MAP_INTERLEAVE_NONE, kSwizzles[static_cast<uint32_t>(spec.swizzle)],
               kPromotions[static_cast<uint32_t>(spec.promotion)], CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) {
        throw std::runtime_error("tensor map " + std::string(name) +
                                 ": the driver refused it with CUresult " +
                                 std::to_string(static_cast<int>(result)));
    }
    return map;
}

#endif

}  // namespace magihuman
