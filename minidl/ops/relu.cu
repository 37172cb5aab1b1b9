// Rectifier.
//
//   y = max(x, 0), NaN stays NaN         dx = dy where y > 0, else 0 (at the kink, 0)
//
// Grid: the flat array, shared by all threads.
#include "rows.cuh"

extern "C" __global__ void relu_forward(const real* __restrict__ x, real* __restrict__ y, long long n) {
    map_over({y}, of_grid(n), [](auto& y, auto x) {
        const decltype(x) zero{};
        y[0] = x < zero ? zero : x;
    }, x);
}

extern "C" __global__ void relu_backward(const real* __restrict__ dy, const real* __restrict__ y, real* __restrict__ dx,
                                         long long n) {
    map_over({dx}, of_grid(n), [](auto& dx, auto dy, auto y) {
        const decltype(y) zero{};
        dx[0] = y > zero ? dy : zero;
    }, dy, y);
}
