// The vocabulary in which every kernel of minidl is written. One text, four targets:
//
//   GPU (NVRTC)        a block is its threads
//   host, fast         a block is one thread: loops are unit-stride and vectorize, barriers vanish
//   host, emulate      a block is all its threads, as fibers, with real barriers and watched shared memory
//   host, sanitize     the same under AddressSanitizer and UndefinedBehaviorSanitizer
//
// Two types, set by the loader: `real` is how tensors are stored (float, double, half, bfloat16), `acc` how
// they are computed with (float; double for double). Convert on load, acc(x[i]), and on store, real(v).
//
// The one rule: any number of threads in a block is right. Work is dealt out by the loops below, never by
// `if (threadIdx.x < n)`, and no kernel may rely on that number. The exception, tensor_core.cuh: what warps do together takes
// whole blocks of a fixed size. Where a kernel needs a certain grid, the comments above it say so, most after the word `Grid:`.
//
// Indices: rows and whole tensors are counted in `long long`, positions within a row in `int`.
#pragma once

#ifdef __CUDACC_RTC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define NAN __int_as_float(0x7FFFFFFF)  // NVRTC has no <math.h>
#define SHARED(type, name, size) __shared__ alignas(16) type name[size]
#define SIMD
#define SIMD_SUM(...)
#else
#include "cuda_on_host.h"
#endif

#define OPTIONAL  // an array that a kernel may do without: 0 where the launcher is given None

#if defined(__CUDACC_RTC__) || defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif

// In a loop: what depends on this value is computed there, each time. Else compilers compute all of it before the loop, for
// which some GPUs have not registers enough.
#ifdef __CUDACC_RTC__
__device__ __forceinline__ void compute_in_loop(int& value) { asm volatile("" : "+r"(value)); }
__device__ __forceinline__ void compute_in_loop(long long& value) { asm volatile("" : "+l"(value)); }
#else
template <class T>
__device__ __forceinline__ void compute_in_loop(T&) {}
#endif

typedef REAL real;
typedef ACC acc;

#define MAX_THREADS 1024  // of one block: CUDA's own limit

// The grid's threads share the elements 0..n-1 of a flat array. Iterations must be independent of each other.
#ifdef MINIDL_FAST
#define GRID_LOOP(i, n) SIMD for (long long i = share_begin(n); i < share_begin(n, 1); ++i)
__device__ __forceinline__ long long share_begin(long long n, int next = 0) {
    return n * ((long long)blockIdx.x + next) / gridDim.x;
}
#else
#define GRID_LOOP(i, n)                                                               \
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < (n);     \
         i += gridDim.x * (long long)blockDim.x)
#endif

// The block's threads share the positions begin..end-1 of a row. The iterations must be independent of each
// other, except for the sums named in BLOCK_LOOP_SUM, which may be added up in any order.
#define BLOCK_LOOP(i, begin, end) SIMD for (int i = (begin) + (int)threadIdx.x; i < (end); i += (int)blockDim.x)
#define BLOCK_LOOP_SUM(i, begin, end, ...) \
    SIMD_SUM(__VA_ARGS__) for (int i = (begin) + (int)threadIdx.x; i < (end); i += (int)blockDim.x)

// The sum over the block's threads, returned to all of them. All must call it. The order of additions depends
// on the number of threads alone, so results repeat bit for bit.
__device__ __forceinline__ acc block_sum(acc value) {
    SHARED(acc, partial, MAX_THREADS);
    partial[threadIdx.x] = value;
    __syncthreads();
    for (int width = blockDim.x; width > 1;) {
        const int half_width = (width + 1) / 2;  // of an odd width, the middle one waits
        if ((int)threadIdx.x + half_width < width) partial[threadIdx.x] += partial[threadIdx.x + half_width];
        __syncthreads();
        width = half_width;
    }
    const acc sum = partial[0];
    __syncthreads();  // nobody may start the next block_sum before all have read partial[0]
    return sum;
}
