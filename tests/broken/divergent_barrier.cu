// y[i] = x[i] - x[0].
#include "common.cuh"

// A barrier that only the first thread reaches: the others wait at the next one.
extern "C" __global__ void broken_branch(const real* __restrict__ x, real* __restrict__ y, int n) {
    SHARED(real, first, 1);
    if (threadIdx.x == 0) {
        first[0] = x[0];
        __syncthreads();
    }
    __syncthreads();
    BLOCK_LOOP(i, 0, n) y[i] = x[i] - first[0];
}

// Threads without work leave before the barrier.
extern "C" __global__ void broken_return(const real* __restrict__ x, real* __restrict__ y, int n) {
    SHARED(real, first, 1);
    if ((int)threadIdx.x >= n) return;
    if (threadIdx.x == 0) first[0] = x[0];
    __syncthreads();
    BLOCK_LOOP(i, 0, n) y[i] = x[i] - first[0];
}

// A barrier in a loop that not all threads run equally often.
extern "C" __global__ void broken_loop(const real* __restrict__ x, real* __restrict__ y, int n) {
    SHARED(real, first, 1);
    if (threadIdx.x == 0) first[0] = x[0];
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        __syncthreads();
        y[i] = x[i] - first[0];
    }
}

extern "C" __global__ void fixed(const real* __restrict__ x, real* __restrict__ y, int n) {
    SHARED(real, first, 1);
    if (threadIdx.x == 0) first[0] = x[0];
    __syncthreads();
    BLOCK_LOOP(i, 0, n) y[i] = x[i] - first[0];
}
