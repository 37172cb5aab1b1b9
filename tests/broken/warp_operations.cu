// 128 numbers through shared memory: asynchronous copies bring 16 bytes a thread, and the warp reads them as four matrices.
// x (128) -> y (128), the same. For float32, by one warp.
#include "tensor_core.cuh"

#define ROW ((int)threadIdx.x * VECTOR)

template <class Tiles>
__device__ __forceinline__ void store_rows(Tiles& tiles, real* y) {
    unsigned words[4];
    load_rows(words, tiles, ROW);
    for (int i = 0; i < 4; ++i) y[i * WARP + threadIdx.x] = real(float_of_word(words[i]));
}

extern "C" __global__ void fixed(const real* __restrict__ x, real* __restrict__ y, int n) {
    TILES(tiles, 128);
    copy_async(tiles, ROW, x + ROW, true);
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    store_rows(tiles, y);
    __syncthreads();
    copy_async(tiles, ROW, x, false);
}

extern "C" __global__ void broken_branch(const real* __restrict__ x, real* __restrict__ y, int n) {
    TILES(tiles, 128);
    copy_async(tiles, ROW, x + ROW, true);
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    if (threadIdx.x < 16) store_rows(tiles, y);
}

extern "C" __global__ void broken_barrier(const real* __restrict__ x, real* __restrict__ y, int n) {
    TILES(tiles, 128);
    copy_async(tiles, ROW, x + ROW, true);
    commit_copies();
    wait_for_copies<0>();
    store_rows(tiles, y);
}

extern "C" __global__ void broken_wait(const real* __restrict__ x, real* __restrict__ y, int n) {
    TILES(tiles, 128);
    copy_async(tiles, ROW, x + ROW, true);
    commit_copies();
    wait_for_copies<1>();
    __syncthreads();
    store_rows(tiles, y);
}

extern "C" __global__ void broken_commit(const real* __restrict__ x, real* __restrict__ y, int n) {
    TILES(tiles, 128);
    copy_async(tiles, ROW, x + ROW, true);
    wait_for_copies<0>();
    __syncthreads();
    store_rows(tiles, y);
}

extern "C" __global__ void broken_overwriting(const real* __restrict__ x, real* __restrict__ y, int n) {
    TILES(tiles, 128);
    copy_async(tiles, ROW, x + ROW, true);
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    store_rows(tiles, y);
    copy_async(tiles, ROW, x, false);
}

extern "C" __global__ void broken_alignment(const real* __restrict__ x, real* __restrict__ y, int n) {
    TILES(tiles, 132);
    copy_async(tiles, ROW + 1, x + ROW, true);
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    store_rows(tiles, y);
}

extern "C" __global__ void broken_banks(const real* __restrict__ x, real* __restrict__ y, int n) {
    TILES(tiles, 32 * 8);
    copy_async(tiles, 2 * ROW, x + ROW, true);
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    unsigned words[4];
    load_rows(words, tiles, 2 * ROW);
}

extern "C" __global__ void broken_banks_of_words(const real* __restrict__ x, real* __restrict__ y, int n) {
    TILES(tiles, 128);
    copy_async(tiles, ROW, x + ROW, true);
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    unsigned words[4];
    load_words(words, tiles, {ROW, ROW, ROW, ROW});
}
