// y[i] = x[i] * sum(x) + sum(x^2): two sums over the block, one right after the other.
#include "common.cuh"

// block_sum without its last barrier: a fast thread begins the next sum while a slow one still reads the last.
__device__ __forceinline__ acc hasty_sum(acc value) {
    SHARED(acc, partial, MAX_THREADS);
    partial[threadIdx.x] = value;
    __syncthreads();
    for (int width = blockDim.x; width > 1;) {
        const int half_width = (width + 1) / 2;
        if ((int)threadIdx.x + half_width < width) partial[threadIdx.x] += partial[threadIdx.x + half_width];
        __syncthreads();
        width = half_width;
    }
    return partial[0];
}

extern "C" __global__ void broken(const real* __restrict__ x, real* __restrict__ y, int n) {
    acc sum = 0, squares = 0;
    BLOCK_LOOP_SUM(i, 0, n, sum, squares) sum += x[i], squares += x[i] * x[i];
    sum = hasty_sum(sum);
    squares = hasty_sum(squares);
    BLOCK_LOOP(i, 0, n) y[i] = x[i] * sum + squares;
}

extern "C" __global__ void fixed(const real* __restrict__ x, real* __restrict__ y, int n) {
    acc sum = 0, squares = 0;
    BLOCK_LOOP_SUM(i, 0, n, sum, squares) sum += x[i], squares += x[i] * x[i];
    sum = block_sum(sum);
    squares = block_sum(squares);
    BLOCK_LOOP(i, 0, n) y[i] = x[i] * sum + squares;
}
