// The vocabulary of common.cuh, word by word.
#include "philox.cuh"

// words (n, 4): the generator's output under each of the keys (n), at each of the counters (n, 4).
extern "C" __global__ void random_words(const unsigned long long* __restrict__ keys, const unsigned* __restrict__ counters,
                                        unsigned* __restrict__ words, int n) {
    GRID_LOOP(i, n) {
        const unsigned* c = counters + 4 * i;
        unsigned random[] = {c[0], c[1], c[2], c[3]};
        philox(keys[i], random);
        for (int k = 0; k < 4; ++k) words[4 * i + k] = random[k];
    }
}

// x (rows, n) -> sums (rows, 2): of each row and of its squares. Grid: one block per row.
extern "C" __global__ void row_sums(const acc* __restrict__ x, acc* __restrict__ sums, int n) {
    const acc* row = x + (long long)blockIdx.x * n;
    acc sum = 0, squares = 0;
    BLOCK_LOOP_SUM(i, 0, n, sum, squares) sum += row[i], squares += row[i] * row[i];
    sum = block_sum(sum);
    squares = block_sum(squares);
    if (threadIdx.x == 0) sums[2 * blockIdx.x] = sum, sums[2 * blockIdx.x + 1] = squares;
}

// last (count): how often a GRID_LOOP over n comes to each of the last `count` elements.
extern "C" __global__ void count_last(int* last, long long n, int count) {
    GRID_LOOP(i, n) {
        if (i >= n - count) last[i - (n - count)] += 1;
    }
}

extern "C" __global__ void plus(const real* __restrict__ x, OPTIONAL const real* __restrict__ z, real* __restrict__ y, int n) {
    BLOCK_LOOP(i, 0, n) y[i] = real(acc(x[i]) + (z ? acc(z[i]) : acc(0)));
}
