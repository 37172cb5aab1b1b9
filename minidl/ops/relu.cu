// Rectifier.
//
//   y = max(x, 0), NaN stays NaN         dx = dy where y > 0, else 0 (at the kink, 0)
//
// Grid: the flat array, shared by all threads.
#include "common.cuh"

extern "C" __global__ void relu_forward(const real* __restrict__ x, real* __restrict__ y, long long n) {
    GRID_LOOP(i, n) {
        const acc value = acc(x[i]);
        y[i] = real(value < acc(0) ? acc(0) : value);
    }
}

extern "C" __global__ void relu_backward(const real* __restrict__ dy, const real* __restrict__ y, real* __restrict__ dx,
                                         long long n) {
    GRID_LOOP(i, n) dx[i] = real(acc(y[i]) > acc(0) ? acc(dy[i]) : acc(0));
}
