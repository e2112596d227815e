// CUTLASS's own collective matrix product as a baseline: d = a wT in bf16 with float32 accumulation, from the
// headers' CollectiveBuilder, with the library's choice of pipeline depth. Loaded by cutlass_baseline.py.
#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/util/packed_stride.hpp>

#include <cstddef>
#include <cstdint>

namespace {

using namespace cute;
using Bf16 = cutlass::bfloat16_t;
constexpr int kAlignment = 8;  // elements: 16 bytes

template <typename Tile, typename Cluster, typename MainloopSchedule, typename EpilogueSchedule>
struct Product {
    using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
        cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, cutlass::layout::RowMajor,
        kAlignment, Bf16, cutlass::layout::RowMajor, kAlignment, EpilogueSchedule>::CollectiveOp;
    using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Bf16, cutlass::layout::RowMajor, kAlignment,
        Bf16, cutlass::layout::ColumnMajor, kAlignment, float, Tile, Cluster,
        cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
            sizeof(typename Epilogue::SharedStorage))>,
        MainloopSchedule>::CollectiveOp;
    using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue>;
    using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

    static typename Gemm::Arguments arguments(const void* a, const void* w, void* d, int m, int n, int k) {
        using StrideD = typename Kernel::StrideD;
        const auto stride_d = cutlass::make_cute_packed_stride(StrideD{}, {m, n, 1});
        return {cutlass::gemm::GemmUniversalMode::kGemm,
                {m, n, k, 1},
                {static_cast<const Bf16*>(a),
                 cutlass::make_cute_packed_stride(typename Kernel::StrideA{}, {m, k, 1}),
                 static_cast<const Bf16*>(w),
                 cutlass::make_cute_packed_stride(typename Kernel::StrideB{}, {n, k, 1})},
                {{1.0f, 0.0f}, nullptr, {}, static_cast<Bf16*>(d), stride_d}};
    }

    static int run(const void* a, const void* w, void* d, int m, int n, int k, void* stream) {
        const auto problem = arguments(a, w, d, m, n, k);
        // These schedules need no workspace; one that did would be an error, not an allocation.
        if (Gemm::get_workspace_size(problem) != 0) return -1;
        Gemm gemm;
        cutlass::Status status = gemm.can_implement(problem);
        if (status == cutlass::Status::kSuccess) status = gemm.initialize(problem, nullptr);
        if (status == cutlass::Status::kSuccess) status = gemm.run(static_cast<cudaStream_t>(stream));
        return static_cast<int>(status);
    }
};

using Cooperative =
    Product<Shape<_128, _256, _64>, Shape<_2, _1, _1>, cutlass::gemm::KernelTmaWarpSpecializedCooperative,
            cutlass::epilogue::TmaWarpSpecializedCooperative>;
using Pingpong =
    Product<Shape<_64, _256, _64>, Shape<_2, _1, _1>, cutlass::gemm::KernelTmaWarpSpecializedPingpong,
            cutlass::epilogue::TmaWarpSpecialized>;

}  // namespace

// Row-major a [m, k], w [n, k], d [m, n], all packed. 0: launched; else a cutlass::Status, or -1.
extern "C" int cutlass_cooperative(const void* a, const void* w, void* d, int m, int n, int k, void* stream) {
    return Cooperative::run(a, w, d, m, n, k, stream);
}
extern "C" int cutlass_pingpong(const void* a, const void* w, void* d, int m, int n, int k, void* stream) {
    return Pingpong::run(a, w, d, m, n, k, stream);
}
