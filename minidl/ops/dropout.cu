// Dropout: y = x * mask, dx = dy * mask, mask = 1 / (1 - p) with probability 1 - p, else 0.
// Srivastava et al., JMLR 2014; channel dropout (one decision per channel and image): Tompson et al., CVPR 2015.
//
// The mask is a pure function of (key, *step, layer, position) by Philox, so backward recomputes it: the same
// kernel serves both directions, and nothing is stored. A position is kept if its 32 random bits are >= p * 2^32.
#include "common.cuh"

// The elements 4 * group + (0 .. count-1), which share one call of the generator.
__device__ __forceinline__ void drop(const real* x, real* y, long long group, int count, unsigned long long key, unsigned now,
                                     unsigned layer, unsigned threshold, acc scale) {
    unsigned bits[] = {(unsigned)group, (unsigned)(group >> 32), now, layer};
    philox(key, bits);
    UNROLL for (int k = 0; k < 4; ++k) {
        if (k >= count) break;
        const acc value = acc(x[k]);
        y[k] = real((bits[k] >= threshold ? value : acc(0)) * scale);
    }
}

// Grid: the groups of four, shared by all threads.
extern "C" __global__ void dropout(const real* __restrict__ x, const long long* __restrict__ step, real* __restrict__ y,
                                   long long n, unsigned long long key, unsigned layer, unsigned threshold, acc scale) {
    const unsigned now = (unsigned)*step;
#ifndef MINIDL_FAST
    struct alignas(4 * sizeof(real)) Four {  // which a thread of a GPU reads and writes at once
        real values[4];
    };
    if (((size_t)x | (size_t)y) % sizeof(Four) == 0) {
        GRID_LOOP(group, n / 4) {
            Four four = ((const Four*)x)[group];
            drop(four.values, four.values, group, 4, key, now, layer, threshold, scale);
            ((Four*)y)[group] = four;
        }
    } else
#endif
    GRID_LOOP(group, n / 4) drop(x + 4 * group, y + 4 * group, group, 4, key, now, layer, threshold, scale);
    GRID_LOOP(rest, n % 4 ? 1 : 0) drop(x + n / 4 * 4, y + n / 4 * 4, n / 4, n % 4, key, now, layer, threshold, scale);
}

#define IMAGES 512  // whose decisions a block keeps, so that it goes through the pixels in the order of memory

// x (C, H*W, N). Grid: channels x stretches of `stretch` pixels; threads run along the batch.
extern "C" __global__ void dropout_channels(const real* __restrict__ x, const long long* __restrict__ step,
                                            real* __restrict__ y, int pixels, int stretch, int batch, unsigned long long key,
                                            unsigned layer, unsigned threshold, acc scale) {
    SHARED(int, kept, IMAGES);  // each thread reads what it has written: no barrier
    const unsigned c = blockIdx.x, now = (unsigned)*step;
    const int first_pixel = blockIdx.y * stretch, end = pixels - first_pixel < stretch ? pixels : first_pixel + stretch;
    for (int begin = 0; begin < batch; begin += IMAGES) {
        const int count = batch - begin < IMAGES ? batch - begin : IMAGES;
        BLOCK_LOOP(n, 0, count) {
            unsigned bits[] = {(unsigned)(begin + n), c, now, layer};
            philox(key, bits);
            kept[n] = bits[0] >= threshold;
        }
        for (int i = first_pixel; i < end; ++i) {
            const long long first = ((long long)c * pixels + i) * batch + begin;
            BLOCK_LOOP(n, 0, count) {
                const acc value = acc(x[first + n]);
                y[first + n] = real((kept[n] ? value : acc(0)) * scale);
            }
        }
    }
}
