// y[i] = x[i] + sum(x), each thread's part of the sum gathered in shared memory.
#include "common.cuh"

// Adds to what nobody set to 0.
extern "C" __global__ void broken(const real* __restrict__ x, real* __restrict__ y, int n) {
    SHARED(acc, mine, MAX_THREADS);
    for (int i = threadIdx.x; i < n; i += blockDim.x) mine[threadIdx.x] += x[i];
    const acc sum = block_sum(mine[threadIdx.x]);
    BLOCK_LOOP(i, 0, n) y[i] = x[i] + sum;
}

extern "C" __global__ void fixed(const real* __restrict__ x, real* __restrict__ y, int n) {
    SHARED(acc, mine, MAX_THREADS);
    mine[threadIdx.x] = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) mine[threadIdx.x] += x[i];
    const acc sum = block_sum(mine[threadIdx.x]);
    BLOCK_LOOP(i, 0, n) y[i] = x[i] + sum;
}
