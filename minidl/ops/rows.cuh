// Rows of memory, element by element, read and written as widely as the target can: on a GPU 16 bytes at a time, where the
// arrays are aligned so; in the fast host target in vectors.
//
//   acc sums[2];
//   sum_over(sums, begin, end, [=](auto& sums, auto x, auto dy) {        // the block's threads share the row's elements
//       sums[0] += dy;
//       sums[1] += dy * x;
//   }, x_row, dy_row);
//   map_over({y_row}, of_block(begin, end), [=](auto& results, auto x) { results[0] = 2 * x; }, x_row);
//   map_over({y}, of_grid(n), [=](auto& results, auto a, auto b) { results[0] = a + b; }, a, b);
//   copy_over(to, from, of_block(begin, end));                           // zeros where `from` is 0
//
// The function sees one position, or a vector of them: what it gets and what it gives are acc or lanes. All threads must call
// these. What is written may be what is read, position by position, but otherwise overlaps with nothing. Sources of map_over
// may be stored as other types than `real`, and be shared memory: `shared + begin`.
#pragma once
#include "lanes.cuh"

// The positions that the threads of a block, or of the grid, share.
template <class Index>
struct Positions {
    Index begin, end;
#ifdef MINIDL_FAST
    bool past_caches;
#else
    Index thread, threads;
#endif
};

#ifdef MINIDL_FAST

// Bytes of an array that is stored past the caches: an ordinary store first reads the line that it overwrites, a third of all
// that moves. Measured on two cores of Zen 4, arrays of 8 MB and more, in no cache: sums and ReLUs are 1.4 to 2 times as fast,
// batch norm 1.1 to 1.3; its backward, which reads all twice, would be slower, and pooling, too. From 4 MB on a chain of such
// ops gains; one alone may lose what the third cache would have kept. Training steps take as long either way.
#define PAST_CACHES (4LL << 20)

// whole: the elements of the array of which this is a part, if it may be stored past the caches.
__device__ __forceinline__ Positions<int> of_block(int begin, int end, long long whole = 0) {
    return {begin, end, whole * (long long)sizeof(real) >= PAST_CACHES};
}

__device__ __forceinline__ Positions<long long> of_grid(long long n) {
    return {share_begin(n), share_begin(n, 1), n * (long long)sizeof(real) >= PAST_CACHES};
}

#else

__device__ __forceinline__ Positions<int> of_block(int begin, int end, long long = 0) {
    return {begin, end, (int)threadIdx.x, (int)blockDim.x};
}

__device__ __forceinline__ Positions<long long> of_grid(long long n) {
    return {0, n, blockIdx.x * (long long)blockDim.x + threadIdx.x, gridDim.x * (long long)blockDim.x};
}

#define PIECE ((int)(16 / sizeof(real)))  // elements, of sources of any type

template <class Stored>
struct alignas(PIECE * sizeof(Stored)) Piece {
    Stored values[PIECE];
};

template <class Stored>
__device__ __forceinline__ bool begins_with_piece(const Stored* array) {
    return (size_t)array % sizeof(Piece<Stored>) == 0;
}

template <class Stored>
__device__ __forceinline__ const Piece<Stored>& piece_at(const Stored* source) {
    return *(const Piece<Stored>*)source;
}

#ifndef __CUDACC_RTC__
template <class Stored, int SIZE>
__device__ __forceinline__ bool begins_with_piece(emulator::Cursor<Stored, SIZE>) {
    return true;
}

template <class Stored, int SIZE>
__device__ __forceinline__ Piece<Stored> piece_at(emulator::Cursor<Stored, SIZE> source) {
    Piece<Stored> piece;
    for (int k = 0; k < PIECE; ++k) piece.values[k] = source[k];
    return piece;
}
#endif

#endif

template <int COUNT, class Add, class... Reals>
__device__ __forceinline__ void sum_over(acc (&sums)[COUNT], int begin, int end, Add add, const Reals*... rows) {
#ifdef MINIDL_FAST
    // A sum is a chain of additions, each waiting for the one before: several of them side by side, where BLOCK_LOOP_SUM has
    // one, half as fast as a cache could be read.
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
    const auto add_each = [&](auto... pieces) {
        UNROLL for (int k = 0; k < PIECE; ++k) add(terms, acc(pieces.values[k])...);
    };
    const int pieces = (begins_with_piece(rows + begin) && ...) ? (end - begin) / PIECE : 0;
    for (int p = threadIdx.x; p < pieces; p += blockDim.x) add_each(piece_at(rows + begin + p * PIECE)...);
    BLOCK_LOOP(i, begin + pieces * PIECE, end) add(terms, acc(rows[i])...);
    sum_each(terms, sums);
#endif
}

template <int COUNT, class Index, class Map, class... Sources>
__device__ __forceinline__ void map_over(real* const (&targets)[COUNT], Positions<Index> at, Map map, Sources... sources) {
    const auto map_one = [&](Index i) {
        acc results[COUNT];
        map(results, acc(sources[i])...);
        UNROLL for (int t = 0; t < COUNT; ++t) targets[t][i] = real(results[t]);
    };
#ifdef MINIDL_FAST
    Index i = at.begin;
    if (sizeof(real) == sizeof(acc)) {  // others do not become vectors by load() and store()
        if (at.past_caches)
            for (; i < at.end && (size_t)(targets[0] + i) % sizeof(lanes); ++i) map_one(i);
        for (; at.end - i >= LANES; i += LANES) {
            lanes results[COUNT];
            map(results, load<true>(sources + i, LANES)...);
            UNROLL for (int t = 0; t < COUNT; ++t)
                if (at.past_caches) store_past_caches(targets[t] + i, results[t]);
                else store<true>(targets[t] + i, results[t], LANES);
        }
    }
    SIMD for (Index j = i; j < at.end; ++j) map_one(j);
#else
    const auto map_each = [&](Index p, auto... pieces) {
        Piece<real> written[COUNT];
        UNROLL for (int k = 0; k < PIECE; ++k) {
            acc results[COUNT];
            map(results, acc(pieces.values[k])...);
            UNROLL for (int t = 0; t < COUNT; ++t) written[t].values[k] = real(results[t]);
        }
        UNROLL for (int t = 0; t < COUNT; ++t) ((Piece<real>*)(targets[t] + at.begin))[p] = written[t];
    };
    bool aligned = (begins_with_piece(sources + at.begin) && ...);
    UNROLL for (int t = 0; t < COUNT; ++t) aligned &= begins_with_piece(targets[t] + at.begin);
    const Index pieces = aligned ? (at.end - at.begin) / PIECE : 0;
    for (Index p = at.thread; p < pieces; p += at.threads) map_each(p, piece_at(sources + at.begin + p * PIECE)...);
    for (Index i = at.begin + pieces * PIECE + at.thread; i < at.end; i += at.threads) map_one(i);
#endif
}

__device__ __forceinline__ void copy_over(real* __restrict__ target, const real* __restrict__ source, Positions<int> at) {
    const auto zero = real(acc(0));
#ifdef MINIDL_FAST
    if (source) {
        SIMD for (int i = at.begin; i < at.end; ++i) target[i] = source[i];
    } else {
        SIMD for (int i = at.begin; i < at.end; ++i) target[i] = zero;
    }
#else
    const bool aligned = begins_with_piece(target + at.begin) && (!source || begins_with_piece(source + at.begin));
    const int pieces = aligned ? (at.end - at.begin) / PIECE : 0;
    for (int p = at.thread; p < pieces; p += at.threads)
        ((Piece<real>*)(target + at.begin))[p] = source ? piece_at(source + at.begin + p * PIECE) : Piece<real>{};
    for (int i = at.begin + pieces * PIECE + at.thread; i < at.end; i += at.threads) target[i] = source ? source[i] : zero;
#endif
}
