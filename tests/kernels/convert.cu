// The conversions between 16-bit storage and the type of computation.
#include "common.cuh"

extern "C" __global__ void widen(const real* __restrict__ x, acc* __restrict__ y, long long n) {
    GRID_LOOP(i, n) y[i] = acc(x[i]);
}

extern "C" __global__ void narrow(const acc* __restrict__ x, real* __restrict__ y, long long n) {
    GRID_LOOP(i, n) y[i] = real(x[i]);
}
