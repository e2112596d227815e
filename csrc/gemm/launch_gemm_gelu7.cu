#include "gemm/epilogue_bf16.cuh"
#include "gemm/launch.cuh"

namespace magihuman {

void launch_gemm_gelu7(const GemmGelu7Params& params, Stream stream) {
    constexpr const char* kName = "gemm_gelu7";
    const Arguments check(kName);
    gemm::check_problem(check, params.g);
    gemm::require_matrix(check, params.d, "d", params.ldd, "ldd", params.g.n, 8);
    gemm::launch_product(
        params.g, params.g.n,
        gemm::Bf16Epilogue<gemm::Gelu7>{static_cast<bf16*>(params.d), params.ldd, params.g.n}, kName, stream);
}

}  // namespace magihuman
