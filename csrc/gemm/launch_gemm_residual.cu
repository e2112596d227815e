#include "gemm/epilogue_residual.cuh"
#include "gemm/launch.cuh"

namespace magihuman {

void launch_gemm_residual(const GemmResidualParams& params, Stream stream) {
    constexpr const char* kName = "gemm_residual";
    const Arguments check(kName);
    gemm::check_problem(check, params.g);
    gemm::require_matrix(check, params.x, "x", params.ldx, "ldx", params.g.n, 4);
    gemm::launch_product(params.g, params.g.n, gemm::ResidualEpilogue{params.x, params.ldx, params.g.n},
                         kName, stream);
}

}  // namespace magihuman
