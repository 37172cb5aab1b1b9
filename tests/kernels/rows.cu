// The vocabulary of rows.cuh.
#include "rows.cuh"

// sums (2): of x, and of x * z.
extern "C" __global__ void sum_of_row(const real* __restrict__ x, const real* __restrict__ z, acc* __restrict__ sums, int begin,
                                      int end) {
    acc both[2];
    sum_over(both, begin, end, [](auto& sums, auto x, auto z) {
        sums[0] += x;
        sums[1] += x * z;
    }, x, z);
    if (threadIdx.x == 0) sums[0] = both[0], sums[1] = both[1];
}

extern "C" __global__ void map_of_row(const real* __restrict__ x, const real* __restrict__ z, real* __restrict__ sum,
                                      real* __restrict__ product, int begin, int end, long long whole) {
    map_over({sum, product}, of_block(begin, end, whole), [](auto& results, auto x, auto z) {
        results[0] = x + z;
        results[1] = x * z;
    }, x, z);
}

extern "C" __global__ void map_of_all(const real* x, const real* z, real* sum, long long n) {
    map_over({sum}, of_grid(n), [](auto& results, auto x, auto z) { results[0] = x + z; }, x, z);
}

extern "C" __global__ void copy_of_row(const real* __restrict__ x, real* __restrict__ y, int begin, int end,
                                       int zeros) {
    copy_over(y, zeros ? 0 : x, of_block(begin, end));
}
