// y[i] = x[i] + sum(x). Both broken kernels are right for blocks of 32 threads only.
#include "common.cuh"

// Deals out the work as if there were 32 threads: no fault, but a wrong sum.
extern "C" __global__ void broken_stride(const real* __restrict__ x, real* __restrict__ y, int n) {
    acc sum = 0;
    for (int i = threadIdx.x; i < n; i += 32) sum += x[i];
    sum = block_sum(sum);
    BLOCK_LOOP(i, 0, n) y[i] = x[i] + sum;
}

// Adds up the partial sums of 32 threads, whether or not they are there.
extern "C" __global__ void broken_tree(const real* __restrict__ x, real* __restrict__ y, int n) {
    SHARED(acc, partial, 32);
    acc sum = 0;
    BLOCK_LOOP_SUM(i, 0, n, sum) sum += x[i];
    partial[threadIdx.x] = sum;
    __syncthreads();
    for (int width = 16; width > 0; width /= 2) {
        if ((int)threadIdx.x < width) partial[threadIdx.x] += partial[threadIdx.x + width];
        __syncthreads();
    }
    BLOCK_LOOP(i, 0, n) y[i] = x[i] + partial[0];
}

extern "C" __global__ void fixed(const real* __restrict__ x, real* __restrict__ y, int n) {
    acc sum = 0;
    BLOCK_LOOP_SUM(i, 0, n, sum) sum += x[i];
    sum = block_sum(sum);
    BLOCK_LOOP(i, 0, n) y[i] = x[i] + sum;
}
