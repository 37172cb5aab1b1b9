// The micro-tile of packed_gemm.cu, for every kernel that multiplies as it does.
#pragma once
#include "lanes.cuh"

#ifndef MINIDL_FAST  // on threads these kernels are only tested
#define ROWS 3
#define VECTORS 2
#define VECTOR_COLUMNS 8
#else
#define VECTOR_COLUMNS LANES
#define VECTORS 3
#ifdef FEW_REGISTERS
#define ROWS 4
#else
#define ROWS 8
#endif
#endif
#define PANEL (VECTORS * VECTOR_COLUMNS)

// sums[r][j] += w[k, r] * columns[k, j] over all k: w packed, COUNT vectors of columns, rows of which lie `pitch` apart,
// in elements, as everywhere here.
template <int COUNT>
__device__ __forceinline__ void tile_sums(const acc* __restrict__ w, const real* __restrict__ columns, long long pitch,
                                          int depth, lanes (&sums)[ROWS][COUNT]) {
    for (int k = 0; k < depth; ++k) {
        lanes values[COUNT];
        UNROLL for (int j = 0; j < COUNT; ++j) values[j] = load<true>(columns + k * pitch + j * VECTOR_COLUMNS, VECTOR_COLUMNS);
        UNROLL for (int r = 0; r < ROWS; ++r)
            UNROLL for (int j = 0; j < COUNT; ++j) sums[r][j] += w[k * ROWS + r] * values[j];
    }
}
