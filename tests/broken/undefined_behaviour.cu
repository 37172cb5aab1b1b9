// y[i] = x[i] * 2^26, for x up to 99: more than an int holds.
#include "common.cuh"

extern "C" __global__ void broken_overflow(const real* __restrict__ x, real* __restrict__ y, int n) {
    const int factor = 1 << 26;
    BLOCK_LOOP(i, 0, n) y[i] = real((int)x[i] * factor);
}

extern "C" __global__ void broken_shift(const real* __restrict__ x, real* __restrict__ y, int n) {
    BLOCK_LOOP(i, 0, n) y[i] = real((int)x[i] << 26);
}

extern "C" __global__ void fixed(const real* __restrict__ x, real* __restrict__ y, int n) {
    const long long factor = 1 << 26;
    BLOCK_LOOP(i, 0, n) y[i] = real((int)x[i] * factor);
}
