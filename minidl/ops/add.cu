// The sum where two branches meet: y = a + b. Its gradient is dy for both. y may be a or b.
// Grid: the flat array, shared by all threads.
#include "common.cuh"

extern "C" __global__ void add(const real* a, const real* b, real* y, long long n) {
    GRID_LOOP(i, n) y[i] = real(acc(a[i]) + acc(b[i]));
}
