// Philox4x32-10: 128 random bits as a pure function of key and counter, so that nothing has to be stored.
// Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once
#include "lanes.cuh"

// A word is the lower half of 64 bits, which hold its product with another; what is above it is of no meaning.
__device__ __forceinline__ unsigned long long product_of_words(unsigned long long a, unsigned b) {
    return (a & 0xFFFFFFFF) * b;
}

#ifdef MINIDL_FAST
typedef unsigned long long words __attribute__((vector_size(VECTOR_BYTES)));  // of several counters
#define COUNTERS ((int)(VECTOR_BYTES / 8))

__device__ __forceinline__ words product_of_words(words a, unsigned b) {
#if defined(__clang__) || !defined(__SSE2__) || defined(__AVX__) && !defined(__AVX2__)  // 32 bytes, of which none multiplies
    return (a & 0xFFFFFFFF) * b;
#else  // the instruction for it, which GCC does not find in that
    typedef int halves __attribute__((vector_size(VECTOR_BYTES)));
    typedef long long products __attribute__((vector_size(VECTOR_BYTES)));
    const halves factor = (halves)(words{} + b);
#if defined(__AVX512F__)
    return (words)__builtin_ia32_pmuludq512_mask((halves)a, factor, products{}, 0xFF);
#elif defined(__AVX2__)
    return (words)__builtin_ia32_pmuludq256((halves)a, factor);
#else
    return (words)__builtin_ia32_pmuludq128((halves)a, factor);
#endif
#endif
}
#endif

// Turns the four words of a counter into random bits, in place.
template <class Words>
__device__ __forceinline__ void philox(unsigned long long key, Words (&counter)[4]) {
    Words w0 = counter[0], w1 = counter[1], w2 = counter[2], w3 = counter[3];
    unsigned k0 = (unsigned)key, k1 = (unsigned)(key >> 32);
    UNROLL for (int round = 0; round < 10; ++round) {
        const Words p0 = product_of_words(w0, 0xD2511F53), p1 = product_of_words(w2, 0xCD9E8D57);
        w0 = (p1 >> 32) ^ w1 ^ k0;
        w1 = p1;
        w2 = (p0 >> 32) ^ w3 ^ k1;
        w3 = p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    counter[0] = w0, counter[1] = w1, counter[2] = w2, counter[3] = w3;
}

__device__ __forceinline__ void philox(unsigned long long key, unsigned (&counter)[4]) {
    unsigned long long words[] = {counter[0], counter[1], counter[2], counter[3]};
    philox(key, words);
    UNROLL for (int i = 0; i < 4; ++i) counter[i] = (unsigned)words[i];
}
