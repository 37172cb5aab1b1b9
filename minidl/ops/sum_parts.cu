// total[i] = sum over p of parts[p, i], in the order of the parts.
//
// Grid: the elements, shared by all threads.
#include "common.cuh"

extern "C" __global__ void sum_parts(const acc* __restrict__ parts, acc* __restrict__ total, int count, long long n) {
    GRID_LOOP(i, n) {
        acc sum = 0;
        for (int p = 0; p < count; ++p) sum += parts[p * n + i];
        total[i] = sum;
    }
}
