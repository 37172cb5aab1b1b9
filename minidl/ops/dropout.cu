// Dropout: y = x * mask, dx = dy * mask, mask = 1 / (1 - p) with probability 1 - p, else 0.
// Srivastava et al., JMLR 2014; channel dropout (one decision per channel and image): Tompson et al., CVPR 2015.
//
// The mask is a pure function of (key, *step, layer, position) by Philox, so backward recomputes it: the same
// kernel serves both directions, and nothing is stored. A position is kept if its 32 random bits are >= p * 2^32.
#include "common.cuh"

// Elements 4i .. 4i+3 share one call of the generator. Grid: the groups of four, shared by all threads.
extern "C" __global__ void dropout(const real* __restrict__ x, const long long* __restrict__ step, real* __restrict__ y,
                                   long long n, unsigned long long key, unsigned layer, unsigned threshold, acc scale) {
    const unsigned now = (unsigned)*step;
    GRID_LOOP(group, (n + 3) / 4) {
        const Random4 random = philox(key, (unsigned)group, (unsigned)(group >> 32), now, layer);
        for (int k = 0; k < 4; ++k) {
            const long long i = 4 * group + k;
            if (i < n) y[i] = real(random.bits[k] >= threshold ? acc(x[i]) * scale : acc(0));
        }
    }
}

// x (C, H*W, N). Grid: one block per channel; threads run along the batch.
extern "C" __global__ void dropout_channels(const real* __restrict__ x, const long long* __restrict__ step,
                                            real* __restrict__ y, int pixels, int batch, unsigned long long key,
                                            unsigned layer, unsigned threshold, acc scale) {
    const unsigned c = blockIdx.x, now = (unsigned)*step;
    const long long start = (long long)c * pixels * batch;
    BLOCK_LOOP(n, 0, batch) {
        const bool kept = philox(key, n, c, now, layer).bits[0] >= threshold;
        for (int i = 0; i < pixels; ++i) {
            const long long at = start + (long long)i * batch + n;
            y[at] = real(kept ? acc(x[at]) * scale : acc(0));
        }
    }
}
