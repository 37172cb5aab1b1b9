// Sums over a part of a row. A sum is a chain of additions, each waiting for the one before: in the fast host target several
// chains of vectors run side by side, where BLOCK_LOOP_SUM has one, half as fast as a cache could be read.
//
//   acc sums[2];
//   sum_over(sums, begin, end, [=](auto& sums, auto x, auto dy) {
//       sums[0] += dy;
//       sums[1] += dy * x;
//   }, x_row, dy_row);
//
// The function adds the terms of one position, or of a vector of them: x and dy are acc or lanes. All threads of the block
// must call sum_over, and get all sums.
#pragma once
#include "lanes.cuh"

template <int COUNT, class Add, class... Reals>
__device__ __forceinline__ void sum_over(acc (&sums)[COUNT], int begin, int end, Add add, const Reals*... rows) {
#ifdef MINIDL_FAST
    const int CHAINS = 4 / COUNT;
    lanes chains[CHAINS][COUNT] = {};
    int i = begin;
    for (; end - i >= CHAINS * LANES; i += CHAINS * LANES)
        UNROLL for (int k = 0; k < CHAINS; ++k) add(chains[k], load<true>(rows + i + k * LANES, LANES)...);
    for (; i < end; i += LANES) {
        lanes terms[COUNT] = {};
        add(terms, load<false>(rows + i, end - i)...);
        for (int s = 0; s < COUNT; ++s) {
            for (int lane = end - i; lane < LANES; ++lane) terms[s][lane] = 0;
            chains[0][s] += terms[s];
        }
    }
    for (int k = 1; k < CHAINS; ++k)
        for (int s = 0; s < COUNT; ++s) chains[0][s] += chains[k][s];
    sum_each(chains[0], sums);
#else
    acc terms[COUNT] = {};
    BLOCK_LOOP(i, begin, end) add(terms, acc(rows[i])...);
    sum_each(terms, sums);
#endif
}
