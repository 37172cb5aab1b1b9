// What lanes.cuh computes that is no plain arithmetic.
#include "lanes.cuh"

extern "C" __global__ void exponentials(const acc* __restrict__ x, acc* __restrict__ y, int n) {
    LANE_LOOP(i, n) store<false>(y + i, exp(load<false>(x + i, n - i)), n - i);
}

extern "C" __global__ void logarithms(const acc* __restrict__ x, acc* __restrict__ y, int n) {
    LANE_LOOP(i, n) store<false>(y + i, log(load<false>(x + i, n - i)), n - i);
}
