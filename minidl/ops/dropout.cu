// Dropout: y = x * mask, dx = dy * mask, mask = 1 / (1 - p) with probability 1 - p, else 0.
// Srivastava et al., JMLR 2014; channel dropout (one decision per channel and image): Tompson et al., CVPR 2015.
//
// The mask is a pure function of (key, *step, layer, position) by Philox, so backward recomputes it: the same
// kernel serves both directions, and nothing is stored. What has 16 random bits >= p * 2^16 is kept.
#include "philox.cuh"
#include "rows.cuh"

#define CALL 8     // decisions from one call of Philox
#define TILE 4096  // decisions for which a block draws at a time

// The random bits of `count` decisions, from that with the number CALL * call on. Philox computes while memory has nothing to do:
// what is read next, or 0, is fetched meanwhile.
template <class Bits>
__device__ __forceinline__ void draw(Bits& random, int count, unsigned long long call, unsigned long long key, unsigned step,
                                     unsigned layer, const real* next) {
#ifdef MINIDL_FAST
    words numbers;
    for (int i = 0; i < COUNTERS; ++i) numbers[i] = call + i;
    for (int k = 0; k * CALL < count; k += COUNTERS, numbers += COUNTERS) {
        if (next) prefetch(next + k * CALL, COUNTERS * CALL);
        words counter[] = {numbers, numbers >> 32, words{} + step, words{} + layer};
        philox(key, counter);
        const words word = words{} + 0xFFFFFFFF;
        const words pairs[] = {(counter[0] & word) | counter[1] << 32, (counter[2] & word) | counter[3] << 32};
        UNROLL for (int i = 0; i < 2 * COUNTERS; ++i)
            memcpy(random + CALL * k + 4 * i, (const unsigned long long*)(pairs + i % 2) + i / 2, 8);
    }
#else
    BLOCK_LOOP(k, 0, (count + CALL - 1) / CALL) {
        unsigned counter[] = {(unsigned)(call + k), (unsigned)((call + k) >> 32), step, layer};
        philox(key, counter);
        UNROLL for (int i = 0; i < CALL; ++i) random[CALL * k + i] = (unsigned short)(counter[i / 2] >> 16 * (i % 2));
    }
    __syncthreads();
#endif
}

template <class Bits>
__device__ __forceinline__ void drop(const real* x, real* y, Positions<int> at, Bits random, acc threshold, acc scale) {
    map_over({y}, at, [=](auto& y, auto x, auto random) { y[0] = (random >= threshold ? x : decltype(x){}) * scale; }, x, random);
}

// Grid: the tiles, shared by all blocks.
extern "C" __global__ void dropout(const real* __restrict__ x, const long long* __restrict__ step, real* __restrict__ y,
                                   long long n, unsigned long long key, unsigned layer, acc threshold, acc scale) {
    SHARED(unsigned short, random, TILE);
    for (long long first = blockIdx.x * (long long)TILE; first < n; first += gridDim.x * (long long)TILE) {
        const int count = n - first < TILE ? n - first : TILE;
        draw(random, count, first / CALL, key, (unsigned)*step, layer, x + first);
        drop(x + first, y + first, of_block(0, count, n), random + 0, threshold, scale);
        __syncthreads();
    }
}

// x (C, H*W, N). Grid: channels x stretches of `stretch` pixels.
extern "C" __global__ void dropout_channels(const real* __restrict__ x, const long long* __restrict__ step,
                                            real* __restrict__ y, int pixels, int stretch, int batch, unsigned long long key,
                                            unsigned layer, acc threshold, acc scale) {
    SHARED(unsigned short, random, TILE);
    const unsigned c = blockIdx.x;
    const int first_pixel = blockIdx.y * stretch, end = pixels - first_pixel < stretch ? pixels : first_pixel + stretch;
    for (int begin = 0; begin < batch; begin += TILE) {
        const int count = batch - begin < TILE ? batch - begin : TILE;
        draw(random, count, (unsigned long long)c << 32 | (unsigned)(begin / CALL), key, (unsigned)*step, layer, 0);
        for (int i = first_pixel; i < end; ++i) {
            const long long first = ((long long)c * pixels + i) * batch + begin;
            drop(x + first, y + first, of_block(0, count), random + 0, threshold, scale);
        }
        __syncthreads();
    }
}
