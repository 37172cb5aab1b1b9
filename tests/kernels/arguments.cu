// Kernels that show what a launch hands over.
#include "common.cuh"

extern "C" __global__ void scale(const real* __restrict__ x, real* __restrict__ y, long long n, acc factor) {
    GRID_LOOP(i, n) y[i] = real(acc(x[i]) * factor);
}

// y (1): the one of the scalars that is not 0.
extern "C" __global__ void scalars(double* y, float f, double d, int i, long long l, unsigned u, unsigned long long m,
                                   unsigned char c, unsigned short s, acc a) {
    GRID_LOOP(k, 1) y[k] = f + d + i + l + u + m + c + s + a;
}

// visits (at least as many as threads): each thread of each block counts itself. shape (3): grid x and y, threads.
extern "C" __global__ void visit(int* visits, int* shape) {
    const long long block = (long long)blockIdx.y * gridDim.x + blockIdx.x;
    visits[block * blockDim.x + threadIdx.x] += 1;
    if (block == 0 && threadIdx.x == 0) shape[0] = gridDim.x, shape[1] = gridDim.y, shape[2] = blockDim.x;
}
