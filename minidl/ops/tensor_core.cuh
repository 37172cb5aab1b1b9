// The vocabulary of kernels for tensor cores (GPUs from sm_80 on): a warp multiplies small matrices that lie in shared memory,
// where asynchronous copies have brought them. Such kernels are for the GPU and, in tests, for the emulator; the CPU's fast
// target, of one thread a block, has none of it. They are the exception to "any number of threads is right": each needs
// its own, and says so, REQUIRE_THREADS(n).
//
//   TILES(tiles, n)                             n elements `real` of shared memory
//   copy_async(tiles, to, source, exists)       16 bytes, VECTOR elements, aligned; zeros where they do not exist
//   commit_copies(); wait_for_copies<n>();      the copies since the last commit are a group; all but the last n are there
//   load_rows, load_columns, load_words         shared memory -> fragments of factors, in registers
//   multiply_add(sums, left, right)             sums (16*M, 16*N) += left (16*M, DEPTH) @ right (DEPTH, 16*N)
//
// All but the copies are operations of a whole warp. What it reads at once must lie in different banks: 8 rows of 16 bytes, or
// 32 words. That is a rule here, though only for speed: the emulator holds kernels to it.
//
// Factors are bfloat16, half or TF32, float32 rounded to 10 bits of mantissa; sums are float32. A fragment, 16 of M or N by
// DEPTH of the sum's index, is four words a lane, one of each of four matrices of 8 rows of 16 bytes. With g = lane / 4 and
// t = lane % 4,
//
//   words 0..3 of a left factor    word t of row g of: rows 0-7, rows 8-15, and both again for the second half of DEPTH
//   words 0, 1 of a right factor   word t of column g of: columns 0-7, both halves of DEPTH
//   words 2, 3 of a right factor   columns 8-15 likewise
//   sums 0..7                      (g, 2t) (g, 2t+1) (g+8, 2t) (g+8, 2t+1), and the same of columns 8-15
//
// From: PTX ISA, "Matrix Fragments for mma.m16n8k8" (.tf32) and "mma.m16n8k16" (.f16, .bf16), "ldmatrix", "cp.async".
#pragma once
#include "common.cuh"

#ifdef MINIDL_FAST
#error "tensor cores need whole warps, and a block of the fast host target is one thread"
#endif

#define WARP 32
#define VECTOR ((int)(16 / sizeof(real)))
#define DEPTH (2 * VECTOR)  // 8 of TF32, 16 of half and bfloat16

#ifdef __CUDACC_RTC__  // ---- GPU -------------------------------------------------------------------------------------------

#define TILES(name, size) __shared__ __align__(16) real name[size]
#define REQUIRE_THREADS(n) \
    if (blockDim.x != (n)) __trap()

#if __CUDA_ARCH__ >= 800
#define PTX(...) asm volatile(__VA_ARGS__)
#else
#define PTX(...) __trap()  // no launcher comes here
#endif

__device__ __forceinline__ unsigned shared_address(const real* place) { return (unsigned)__cvta_generic_to_shared(place); }

__device__ __forceinline__ void copy_async(real* tiles, int to, const real* source, bool exists) {
    // The last operand says how many bytes are read; the others become zeros. Through L1 (.ca): neighbouring pixels see
    // nearly the same windows, and a block reads them one after another.
    PTX("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(tiles + to)), "l"(source), "r"(exists ? 16 : 0)
        : "memory");
}

__device__ __forceinline__ void commit_copies() { PTX("cp.async.commit_group;" ::: "memory"); }

template <int UNDER_WAY>
__device__ __forceinline__ void wait_for_copies() {
    PTX("cp.async.wait_group %0;" ::"n"(UNDER_WAY) : "memory");
}

// Four matrices of 8 rows of 16 bytes; lane i says where row i % 8 of matrix i / 8 begins. Word t of row g of each.
__device__ __forceinline__ void load_rows(unsigned (&words)[4], const real* tiles, int row) {
    PTX("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
        : "r"(shared_address(tiles + row))
        : "memory");
}

// The same of matrices of 16-bit elements, transposed: elements 2t and 2t+1 of column g.
__device__ __forceinline__ void load_columns(unsigned (&words)[4], const real* tiles, int row) {
    PTX("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
        : "r"(shared_address(tiles + row))
        : "memory");
}

// A word from each of four places.
__device__ __forceinline__ void load_words(unsigned (&words)[4], const real* tiles, const int (&places)[4]) {
    UNROLL for (int i = 0; i < 4; ++i) words[i] = *(const unsigned*)(tiles + places[i]);
}

__device__ __forceinline__ float float_of_word(unsigned word) { return __uint_as_float(word); }

__device__ __forceinline__ unsigned round_to_tf32(float value) {
    unsigned word = 0;
    PTX("cvt.rna.tf32.f32 %0, %1;" : "=r"(word) : "f"(value));
    return word;
}

// By the type of the factors, its last argument.
#define PRODUCT(type, instruction)                                                                                      \
    __device__ __forceinline__ void multiply_add_8(float* sums, const unsigned* left, const unsigned* right, type) {    \
        PTX("mma.sync.aligned." instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"          \
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                                                \
            : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));                    \
    }
PRODUCT(float, "m16n8k8.row.col.f32.tf32.tf32.f32")
PRODUCT(__half, "m16n8k16.row.col.f32.f16.f16.f32")
PRODUCT(__nv_bfloat16, "m16n8k16.row.col.f32.bf16.bf16.f32")
__device__ __forceinline__ void multiply_add_8(float*, const unsigned*, const unsigned*, double) { __trap(); }

template <int M, int N>
__device__ __forceinline__ void multiply_add(float (&sums)[M][N][8], const unsigned (&left)[M][4],
                                             const unsigned (&right)[N][4]) {
    UNROLL for (int m = 0; m < M; ++m)
        UNROLL for (int n = 0; n < N; ++n) {
            multiply_add_8(sums[m][n], left[m], right[n], real());
            multiply_add_8(sums[m][n] + 4, left[m], right[n] + 2, real());
        }
}

#else  // ---- emulator ---------------------------------------------------------------------------------------------------

#define TILES(name, size) SHARED(real, name, size)
#define REQUIRE_THREADS(n) \
    if (blockDim.x != (n)) emulator::fault("needs blocks of %d threads, has one of %d", n, (int)blockDim.x)

#define PER_WORD ((int)(sizeof(unsigned) / sizeof(real)))

template <class Tiles>
static inline void copy_async(Tiles& tiles, int to, const real* source, bool exists) {
    if (to % VECTOR || (uintptr_t)source % 16)
        emulator::fault("thread %d copies 16 bytes that are not aligned, to element %d", (int)threadIdx.x, to);
    tiles.copy_async(to, exists ? source : nullptr, VECTOR);
}

static inline void commit_copies() { emulator::commit_copies(); }

template <int UNDER_WAY>
static inline void wait_for_copies() {
    emulator::wait_for_copies(UNDER_WAY);
}

// By one lane for all: `places` of elements, read at once in `bytes` each.
static inline void check_banks(const int* places, int count, int bytes) {
    if (threadIdx.x % WARP) return;
    for (int i = 0; i < count; ++i) {
        const int unit = places[i] * (int)sizeof(real) / bytes;
        if (places[i] * (int)sizeof(real) % bytes)
            emulator::fault("a warp reads %d bytes that are not aligned, at element %d", bytes, places[i]);
        for (int j = 0; j < i; ++j)
            if (places[i] != places[j] && (unit - places[j] * (int)sizeof(real) / bytes) % (128 / bytes) == 0)
                emulator::fault("a warp reads elements %d and %d at once, from the same banks", places[j], places[i]);
    }
}

template <class Tiles>
static inline unsigned word_at(Tiles& tiles, int place) {
    real elements[PER_WORD];
    for (int i = 0; i < PER_WORD; ++i) elements[i] = tiles[place + i];
    unsigned word;
    memcpy(&word, elements, sizeof word);
    return word;
}

template <class Tiles>
static inline void load_rows(unsigned (&words)[4], Tiles& tiles, int row) {
    const int* rows = emulator::exchange(row, __FILE__, __LINE__);
    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    for (int matrix = 0; matrix < 4; ++matrix) {
        check_banks(rows + 8 * matrix, 8, 16);
        words[matrix] = word_at(tiles, rows[8 * matrix + g] + t * PER_WORD);
    }
}

template <class Tiles>
static inline void load_columns(unsigned (&words)[4], Tiles& tiles, int row) {
    const int* rows = emulator::exchange(row, __FILE__, __LINE__);
    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    for (int matrix = 0; matrix < 4; ++matrix) {
        check_banks(rows + 8 * matrix, 8, 16);
        real elements[2];
        for (int i = 0; i < 2; ++i) elements[i] = tiles[rows[8 * matrix + 2 * t + i] + g];
        memcpy(&words[matrix], elements, sizeof elements);
    }
}

template <class Tiles>
static inline void load_words(unsigned (&words)[4], Tiles& tiles, const int (&places)[4]) {
    struct Places {
        int of[4];
    } mine;
    memcpy(mine.of, places, sizeof places);
    const Places* of_lane = emulator::exchange(mine, __FILE__, __LINE__);
    for (int i = 0; i < 4; ++i) {
        int of_warp[WARP];
        for (int lane = 0; lane < WARP; ++lane) of_warp[lane] = of_lane[lane].of[i];
        check_banks(of_warp, WARP, 4);
        words[i] = word_at(tiles, places[i]);
    }
}

static inline float float_of_word(unsigned word) { return float_of(word); }

static inline unsigned round_to_tf32(float value) {  // to nearest, ties away from zero
    const bool finite = value - value == 0;
    return finite ? (bits_of(value) + 0x1000) & 0xFFFFE000 : bits_of(value);
}

// The factors in a word; tensor cores see no more of a float32 than TF32.
static inline void factors_of(float* factors, unsigned word) {
    if (sizeof(real) == 4) {
        factors[0] = float_of(word & 0xFFFFE000);
        return;
    }
    real elements[PER_WORD];
    memcpy(elements, &word, sizeof word);
    for (int i = 0; i < PER_WORD; ++i) factors[i] = elements[i];
}

template <int M, int N>
static inline void multiply_add(float (&sums)[M][N][8], const unsigned (&left)[M][4], const unsigned (&right)[N][4]) {
    struct Factors {
        float left[M][4][PER_WORD], right[N][4][PER_WORD];
    } mine;
    for (int word = 0; word < 4; ++word) {
        for (int m = 0; m < M; ++m) factors_of(mine.left[m][word], left[m][word]);
        for (int n = 0; n < N; ++n) factors_of(mine.right[n][word], right[n][word]);
    }
    const Factors* of_lane = emulator::exchange(mine, __FILE__, __LINE__);
    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n)
            for (int i = 0; i < 8; ++i) {
                const int row_half = i / 2 % 2, column_half = i / 4, column = 2 * t + i % 2;
                float sum = 0;
                for (int k_half = 0; k_half < 2; ++k_half)
                    for (int lane = 0; lane < 4; ++lane)
                        for (int k = 0; k < PER_WORD; ++k)
                            sum += of_lane[4 * g + lane].left[m][row_half + 2 * k_half][k] *
                                   of_lane[4 * column + lane].right[n][2 * column_half + k_half][k];
                sums[m][n][i] += sum;
            }
}

#endif

// A factor as the tensor cores should read it: of float32, the nearest TF32; they themselves would cut it off.
__device__ __forceinline__ unsigned round_factors(unsigned word) {
    return sizeof(real) == 4 ? round_to_tf32(float_of_word(word)) : word;
}

__device__ __forceinline__ real to_factor(real value) {
    return sizeof(real) == 4 ? real(float_of_word(round_to_tf32(float(value)))) : value;
}

// Two neighbours, read and written at once, aligned to both.
struct alignas(2 * sizeof(real)) Pair {
    real first, second;
};

__device__ __forceinline__ Pair load_pair(const real* source) { return *(const Pair*)source; }

__device__ __forceinline__ void store_pair(real* target, float first, float second) {
    *(Pair*)target = {real(first), real(second)};
}
