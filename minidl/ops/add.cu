// The sum where two branches meet: y = a + b. Its gradient is dy for both. Grid: the flat array, shared by all threads.
#include "common.cuh"

extern "C" __global__ void add(const real* __restrict__ a, const real* __restrict__ b, real* __restrict__ y, long long n) {
    GRID_LOOP(i, n) y[i] = real(acc(a[i]) + acc(b[i]));
}
