// y[i] = x[i - 1] + x[i], with x[-1] = 0: each thread takes its neighbour's number out of shared memory.
#include "common.cuh"

extern "C" __global__ void broken(const real* __restrict__ x, real* __restrict__ y, int n) {
    SHARED(real, tile, 100);
    BLOCK_LOOP(i, 0, n) tile[i] = x[i];
    BLOCK_LOOP(i, 0, n) y[i] = (i > 0 ? real(tile[i - 1]) : real(0)) + tile[i];
}

extern "C" __global__ void fixed(const real* __restrict__ x, real* __restrict__ y, int n) {
    SHARED(real, tile, 100);
    BLOCK_LOOP(i, 0, n) tile[i] = x[i];
    __syncthreads();
    BLOCK_LOOP(i, 0, n) y[i] = (i > 0 ? real(tile[i - 1]) : real(0)) + tile[i];
}
