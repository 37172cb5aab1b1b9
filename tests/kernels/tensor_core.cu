// The vocabulary of tensor_core.cuh: one product of fragments.
#include "tensor_core.cuh"

// left (16, DEPTH), right (DEPTH, 16), its transpose (16, DEPTH) -> products (2, 16, 16): left @ right, the right factor read
// by rows of its transpose and, of 16-bit elements, by columns of itself. One warp.
extern "C" __global__ void multiply(const real* __restrict__ left, const real* __restrict__ right,
                                    const real* __restrict__ transposed, acc* __restrict__ products) {
    REQUIRE_THREADS(WARP);
    const int row = DEPTH + VECTOR, size = 16 * row;  // rows of 48 bytes: eight in a column lie in different banks
    TILES(tiles, 3 * size);
    const int lane = threadIdx.x;
    copy_async(tiles, lane / 2 * row + lane % 2 * VECTOR, left + lane * VECTOR, true);
    copy_async(tiles, size + lane / 2 * row + lane % 2 * VECTOR, transposed + lane * VECTOR, true);
    if (sizeof(real) == 2) copy_async(tiles, 2 * size + lane / 2 * row + lane % 2 * VECTOR, right + lane * VECTOR, true);
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    unsigned a[1][4], b[1][4];
    load_rows(a[0], tiles, lane % 16 * row + lane / 16 * VECTOR);
    for (int way = 0; way < (sizeof(real) == 2 ? 2 : 1); ++way) {
        if (way == 0) load_rows(b[0], tiles, size + (lane / 16 * 8 + lane % 8) * row + lane / 8 % 2 * VECTOR);
        else load_columns(b[0], tiles, 2 * size + lane % 16 * row + lane / 16 * VECTOR);
        float sums[1][1][8] = {};
        multiply_add(sums, a, b);
        for (int i = 0; i < 8; ++i)
            products[(way * 16 + lane / 4 + i / 2 % 2 * 8) * 16 + i / 4 * 8 + lane % 4 * 2 + i % 2] = sums[0][0][i];
    }
}
