// y[i] = x[i + 1] - x[i], and 0 for the last.
#include "common.cuh"

// Reads x[n].
extern "C" __global__ void broken_global(const real* __restrict__ x, real* __restrict__ y, int n) {
    BLOCK_LOOP(i, 0, n) y[i] = x[i + 1] - x[i];
}

// Reads tile[100].
extern "C" __global__ void broken_shared(const real* __restrict__ x, real* __restrict__ y, int n) {
    SHARED(real, tile, 100);
    BLOCK_LOOP(i, 0, n) tile[i] = x[i];
    __syncthreads();
    BLOCK_LOOP(i, 0, n) y[i] = tile[i + 1] - tile[i];
}

extern "C" __global__ void fixed(const real* __restrict__ x, real* __restrict__ y, int n) {
    SHARED(real, tile, 100);
    BLOCK_LOOP(i, 0, n) tile[i] = x[i];
    __syncthreads();
    BLOCK_LOOP(i, 0, n) y[i] = i + 1 < n ? tile[i + 1] - tile[i] : real(0);
}
