#include "gemm/epilogue_swiglu7.cuh"
#include "gemm/launch.cuh"

namespace magihuman {

void launch_gemm_swiglu7(const GemmSwiglu7Params& params, Stream stream) {
    constexpr const char* kName = "gemm_swiglu7";
    const Arguments check(kName);
    gemm::check_problem(check, params.g);
    const int width = params.g.n / 2;
    check.require(params.g.n % 2 == 0, "n", "an even number: gate and linear rows in turn", params.g.n);
    check.require(params.d_cols >= width && params.d_cols < 1 << 28, "d_cols", "n / 2 to 2^28",
                  params.d_cols);
    gemm::require_matrix(check, params.d, "d", params.ldd, "ldd", params.d_cols, 8);
    gemm::launch_product(
        params.g, 2 * params.d_cols,
        gemm::Swiglu7Epilogue{static_cast<bf16*>(params.d), params.ldd, width, params.d_cols}, kName, stream);
}

}  // namespace magihuman
