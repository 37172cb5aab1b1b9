// The subset of CUDA C++ that minidl's kernels use, for a host compiler. See common.cuh for the four targets.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <utility>

#define __global__ __attribute__((visibility("hidden")))  // else a kernel named as a function of the C library would be that
#define __device__
#define __launch_bounds__(...)
// static: the loader merges inline functions of all its libraries, and so the arrays that SHARED makes in them.
#define __forceinline__ static inline __attribute__((always_inline))

struct dim3 {
    unsigned x, y;
};

// ---- 16-bit floating-point storage: round to nearest, ties to even, NaN stays NaN -----------------------------

inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

struct __nv_bfloat16 {
    uint16_t bits;
    __nv_bfloat16() = default;
    explicit __nv_bfloat16(float value) {
        const uint32_t b = bits_of(value);
        bits = value != value ? 0x7FFF : (b + 0x7FFF + ((b >> 16) & 1)) >> 16;
    }
    operator float() const { return float_of((uint32_t)bits << 16); }
};

struct __half {
    uint16_t bits;
    __half() = default;
    explicit __half(float value) {
        const uint32_t b = bits_of(value), sign = (b >> 16) & 0x8000, magnitude = b & 0x7FFFFFFF;
        if (magnitude > 0x7F800000) bits = 0x7FFF;                  // NaN
        else if (magnitude >= 0x477FF000) bits = sign | 0x7C00;     // rounds to 65536 or more: infinity
        else if (magnitude < 0x38800000)                            // subnormal: the addition rounds to 2^-24
            bits = sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f));
        else bits = sign | ((magnitude - 0x38000000 + 0x0FFF + ((magnitude >> 13) & 1)) >> 13);
    }
    operator float() const {
        const uint32_t sign = (uint32_t)(bits & 0x8000) << 16, magnitude = (uint32_t)(bits & 0x7FFF) << 13;
        if (magnitude >= 0x0F800000) return float_of(sign | (magnitude + 0x70000000));   // infinity, NaN
        return float_of(sign | bits_of(float_of(magnitude) * 0x1p112f));                 // exact, subnormals too
    }
};

// ---- a launch, as the loader hands it over ---------------------------------------------------------------------

struct Launch {
    unsigned grid_x, grid_y, threads;
};

#define SLOT_BYTES 8  // of an argument, whatever its type

template <class Parameter>
inline Parameter in_slot(const char* slot) {
    static_assert(sizeof(Parameter) <= SLOT_BYTES, "an argument has one slot");
    Parameter value;
    memcpy(&value, slot, sizeof value);
    return value;
}

template <class... Parameters, size_t... I>
inline void call(void (*kernel)(Parameters...), const char* slots, std::index_sequence<I...>) {
    kernel(in_slot<Parameters>(slots + SLOT_BYTES * I)...);
}

template <class... Parameters>
inline void call(void (*kernel)(Parameters...), const char* slots) {
    call(kernel, slots, std::index_sequence_for<Parameters...>());
}

// The loader appends EXPORT(name) for each kernel of a file. The return value is null, or what describes a fault.
#define EXPORT(kernel)                                                                                                \
    extern "C" const char* launch_##kernel(unsigned grid_x, unsigned grid_y, unsigned threads, const char* slots) {  \
        return run_grid({grid_x, grid_y, threads}, [=] { call(kernel, slots); });                                    \
    }

#ifdef MINIDL_FAST  // ---- one thread a block, blocks in parallel ----------------------------------------------------

#define SHARED(type, name, size) type name[size]
#define PRAGMA(text) _Pragma(#text)
#define SIMD PRAGMA(omp simd)
#define SIMD_SUM(...) PRAGMA(omp simd reduction(+ : __VA_ARGS__))
#define __syncthreads()

static constexpr dim3 threadIdx{0, 0}, blockDim{1, 1};
static thread_local dim3 blockIdx, gridDim;

// host_threads.cpp: run body(context, begin, end) for ranges of the blocks 0 .. blocks-1, on all cores, and wait for all.
typedef void (*Team)(void (*body)(void* context, long long begin, long long end), void* context, long long blocks);
static Team team;
extern "C" void set_team(Team of_process) {
    if (team != of_process) team = of_process;  // threads that load a library at the same time: one may be launching already
}

template <class Block>
const char* run_grid(const Launch& launch, const Block& block) {
    const auto run_blocks = [&](long long begin, long long end) {
        gridDim = {launch.grid_x, launch.grid_y};
        for (long long b = begin; b < end; ++b) {
            blockIdx = {(unsigned)(b % launch.grid_x), (unsigned)(b / launch.grid_x)};
            block();
        }
#ifdef __SSE__
        __builtin_ia32_sfence();  // what was stored past the caches is in memory before others go on
#endif
    };
    const long long blocks = (long long)launch.grid_x * launch.grid_y;
    if (blocks == 1) {  // waking a team costs more than most single blocks
        run_blocks(0, 1);
        return nullptr;
    }
    team([](void* context, long long begin, long long end) { (*(decltype(&run_blocks))context)(begin, end); },
         (void*)&run_blocks, blocks);
    return nullptr;
}

#else
#include "block_emulator.h"
#endif
