// Lanes: the images that a thread computes at a time, for kernels whose inner loops are over pixels, channels or classes. One
// image on a GPU and in emulation; a vector of them in the fast host target, where no plain loop around such loops vectorizes.
//
//   LANE_LOOP(n, batch) {
//       const lanes v = load<WHOLE>(x + n, batch - n);     // 0 in lanes beyond the batch
//       store<WHOLE>(y + n, factor * v, batch - n);        // which are not written
//   }
//
// WHOLE: whole_lanes(batch), asked once and outside: tests for the end of the batch cost up to a fifth of such a loop.
//
// `integers` go with them, one for each lane: what is counted for each image, and what comparisons give. So `a > b ? a : b`
// chooses lane by lane. Comparisons are joined by & and |, as && does not exist for vectors everywhere.
#pragma once
#include "common.cuh"

#ifdef MINIDL_FAST
#include <type_traits>

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
typedef acc lanes __attribute__((vector_size(VECTOR_BYTES)));
typedef lanes lanes_in_memory __attribute__((aligned(alignof(acc)), may_alias));  // where a batch begins anywhere
typedef float float_vector __attribute__((vector_size(VECTOR_BYTES)));
typedef decltype(lanes{} > lanes{}) integers;
typedef std::remove_reference_t<decltype(integers{}[0])> lane_integer;
#if defined(__x86_64__) && !defined(__AVX512F__)
#define FEW_REGISTERS  // 16 of them for vectors, where others have 32: a tile of sums must be smaller
#endif
#define LANES ((int)(sizeof(lanes) / sizeof(acc)))
#define LANE_LOOP(n, batch) for (int n = 0; n < (batch); n += LANES)

__device__ __forceinline__ bool whole_lanes(int batch) { return batch % LANES == 0; }

// Not inlined: sixteen tests and loads at each place would crowd out the loop, and they are for the last lanes of a batch.
template <class Stored, class Value>
__attribute__((noinline)) static void load_part(const Stored* source, int left, Value* values) {
    for (int i = 0; i < LANES; ++i) values[i] = i < left ? Value(source[i]) : Value(0);
}

template <class Stored, class Value>
__attribute__((noinline)) static void store_part(Stored* target, const Value* values, int left) {
    for (int i = 0; i < left; ++i) target[i] = Stored(values[i]);
}

// Integers are stored in fewer bits.
template <bool WHOLE, class Stored>
__device__ __forceinline__ integers load_integers(const Stored* source, int left) {
    typedef Stored Vector __attribute__((vector_size(LANES * sizeof(Stored)), aligned(alignof(Stored)), may_alias));
    if (WHOLE || left >= LANES) return __builtin_convertvector(*(const Vector*)source, integers);
    integers value;
    load_part(source, left, (lane_integer*)&value);
    return value;
}

__device__ __forceinline__ lanes as_lanes(integers values) { return __builtin_convertvector(values, lanes); }

template <bool WHOLE, class Stored>
__device__ __forceinline__ lanes load(const Stored* source, int left) {
    if (sizeof(Stored) == sizeof(acc) && (WHOLE || left >= LANES)) {
        lanes value = *(const lanes_in_memory*)source;
#ifdef __x86_64__
        asm("" : "+v"(value));  // into a register: GCC would rather load it again for each of up to four multiplications
#endif
        return value;
    }
    if constexpr (std::is_integral_v<Stored>) return as_lanes(load_integers<WHOLE>(source, left));
    acc values[LANES];
    if (!WHOLE && left < LANES) load_part(source, left, values);
    else SIMD for (int i = 0; i < LANES; ++i) values[i] = acc(source[i]);
    return *(const lanes_in_memory*)values;
}

template <bool WHOLE, class Stored>
__device__ __forceinline__ void store(Stored* target, lanes value, int left) {
    if (sizeof(Stored) == sizeof(acc) && (WHOLE || left >= LANES)) {
        *(lanes_in_memory*)target = value;
        return;
    }
    acc values[LANES];
    *(lanes_in_memory*)values = value;
    if (!WHOLE && left < LANES) store_part(target, values, left);
    else SIMD for (int i = 0; i < LANES; ++i) target[i] = Stored(values[i]);
}

// Without reading the line first, as a store does, and without keeping it in a cache. Others see it after the launch.
template <class Stored>
__device__ __forceinline__ void store_past_caches(Stored* target, lanes value) {
    if (sizeof(Stored) != sizeof(acc) || (size_t)target % sizeof(lanes)) return store<true>(target, value, LANES);
#ifdef __clang__
    __builtin_nontemporal_store(value, (lanes*)target);
#elif defined(__AVX512F__)
    __builtin_ia32_movntps512((float*)target, (float_vector)value);
#elif defined(__AVX__)
    __builtin_ia32_movntps256((float*)target, (float_vector)value);
#elif defined(__SSE__)
    __builtin_ia32_movntps((float*)target, (float_vector)value);
#else
    *(lanes*)target = value;
#endif
}

template <bool WHOLE, class Stored>
__device__ __forceinline__ void store_integers(Stored* target, integers value, int left) {  // in fewer bits
    typedef Stored Vector __attribute__((vector_size(LANES * sizeof(Stored)), aligned(alignof(Stored)), may_alias));
    if (WHOLE || left >= LANES) *(Vector*)target = __builtin_convertvector(value, Vector);
    else store_part(target, (const lane_integer*)&value, left);
}

// n, n + 1, ...
__device__ __forceinline__ integers numbers_from(int n) {
    integers numbers;
    UNROLL for (int i = 0; i < LANES; ++i) numbers[i] = n + i;
    return numbers;
}

__device__ __forceinline__ lanes log(lanes x) {
    for (int i = 0; i < LANES; ++i) x[i] = log(x[i]);
    return x;
}

// In float, within 1.2 units in the last place: exp(x) = 2^n * exp(r) with |r| <= ln(2) / 2, where Taylor's polynomial is exact
// to 6e-9. ln(2) is 355/512, whose products with n are exact, and a rest.
__device__ __forceinline__ lanes exp(lanes x) {
    if constexpr (sizeof(acc) == sizeof(double)) {
        for (int i = 0; i < LANES; ++i) x[i] = exp(x[i]);
        return x;
    } else {
        x = x < -104 ? lanes{} - 104 : x > 89 ? lanes{} + 89 : x;  // where the result is 0 and infinity; NaN stays
        const acc to_integer = 3 << 22;                            // floats of this size have no fraction
        const lanes n = x * acc(1.44269504) + to_integer - to_integer, r = x - n * acc(0.693359375) + n * acc(2.12194440e-4);
        constexpr acc inverse_factorials[] = {1. / 720, 1. / 120, 1. / 24, 1. / 6, 0.5, 1, 1};
        lanes sum = lanes{} + acc(1. / 5040);
        UNROLL for (acc coefficient : inverse_factorials) sum = sum * r + coefficient;
        const integers power = __builtin_convertvector(n, integers), half = power >> 1;  // 2^n alone may not be a float
        return sum * (lanes)((half + 127) << 23) * (lanes)((power - half + 127) << 23);
    }
}

// The lane of (a, b), one behind the other, that holds the first (HALF 0) or second half of what becomes lane `i`: sums of
// 2 * WIDTH lanes each become sums of WIDTH lanes, those of a before those of b.
template <int WIDTH, int HALF>
constexpr int folded_lane(int i) {
    return i / WIDTH * 2 * WIDTH + HALF * WIDTH + i % WIDTH;
}

template <int WIDTH, int HALF, size_t... I>
__device__ __forceinline__ lanes half_of_sums(lanes a, lanes b, std::index_sequence<I...>) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, folded_lane<WIDTH, HALF>(I)...);
#else
    return __builtin_shuffle(a, b, integers{folded_lane<WIDTH, HALF>(I)...});
#endif
}

// COUNT vectors -> their COUNT sums, each in LANES / COUNT lanes.
template <int COUNT>
__device__ __forceinline__ lanes fold(const lanes* values) {
    if constexpr (COUNT == 1) return *values;
    else {
        const lanes a = fold<COUNT / 2>(values), b = fold<COUNT / 2>(values + COUNT / 2);
        const std::make_index_sequence<LANES> all;
        return half_of_sums<LANES / COUNT, 0>(a, b, all) + half_of_sums<LANES / COUNT, 1>(a, b, all);
    }
}

// The sum of each of the vectors: additions of whole vectors, a tree, where one vector's own would be LANES scalars.
template <int COUNT>
__device__ __forceinline__ void sum_each(const lanes (&values)[COUNT], acc (&sums)[COUNT]) {
    lanes padded[(COUNT + LANES - 1) / LANES * LANES] = {};
    UNROLL for (int i = 0; i < COUNT; ++i) padded[i] = values[i];
    UNROLL for (int i = 0; i < COUNT; i += LANES) {
        const lanes totals = fold<LANES>(padded + i);
        UNROLL for (int j = 0; j < LANES; ++j)
            if (i + j < COUNT) sums[i + j] = totals[j];
    }
}

// Into the first cache, or only into the second.
template <int CACHE = 1, class Stored>
__device__ __forceinline__ void prefetch(const Stored* source, long long count = 1) {
    for (long long i = 0; i < count; i += 64 / sizeof(Stored)) __builtin_prefetch(source + i, 0, CACHE == 1 ? 3 : 2);
}

template <class Stored>
__device__ __forceinline__ void prefetch_to_write(Stored* target, long long count) {
    for (long long i = 0; i < count; i += 64 / sizeof(Stored)) __builtin_prefetch(target + i, 1);
}

// Bytes rows[lane][at[lane]] and those behind, COUNT of them, the first in the lowest bits.
#define MOST_BYTES 4
template <int COUNT>
__device__ __forceinline__ integers bytes_at(const unsigned char* const (&rows)[LANES], integers at) {
    int places[LANES];
    unsigned bytes[LANES] = {};
    store_integers<true>(places, at, LANES);
    for (int i = 0; i < LANES; ++i) memcpy(bytes + i, rows[i] + places[i], COUNT);
    return load_integers<true>(bytes, LANES);
}

#else

typedef acc lanes;
typedef int integers;
#define LANES 1
#define LANE_LOOP(n, batch) for (int n = threadIdx.x; n < (batch); n += (int)blockDim.x)

__device__ __forceinline__ bool whole_lanes(int) { return true; }

template <bool WHOLE, class Stored>
__device__ __forceinline__ lanes load(const Stored* source, int) {
    return acc(*source);
}

template <bool WHOLE, class Stored>
__device__ __forceinline__ void store(Stored* target, lanes value, int) {
    *target = Stored(value);
}

template <class Stored>
__device__ __forceinline__ void store_past_caches(Stored* target, lanes value) {
    *target = Stored(value);
}

template <bool WHOLE, class Stored>
__device__ __forceinline__ integers load_integers(const Stored* source, int) {
    return *source;
}

template <bool WHOLE, class Stored>
__device__ __forceinline__ void store_integers(Stored* target, integers value, int) {
    *target = value;
}

__device__ __forceinline__ integers numbers_from(int n) { return n; }

// Over the block's threads, for all of which this is the same: all must call it.
template <int COUNT>
__device__ __forceinline__ void sum_each(const lanes (&values)[COUNT], acc (&sums)[COUNT]) {
    UNROLL for (int i = 0; i < COUNT; ++i) sums[i] = block_sum(values[i]);
}

template <int CACHE = 1, class Stored>
__device__ __forceinline__ void prefetch(const Stored*, long long = 1) {}  // a GPU waits for memory in other threads

template <class Stored>
__device__ __forceinline__ void prefetch_to_write(Stored*, long long) {}

__device__ __forceinline__ lanes as_lanes(integers value) { return value; }

#define MOST_BYTES 1
template <int COUNT>
__device__ __forceinline__ integers bytes_at(const unsigned char* const (&rows)[LANES], integers at) {
    return rows[0][at];
}

#endif
