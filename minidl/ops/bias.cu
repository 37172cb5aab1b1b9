// A bias per row: y[o, i] += bias[o]; dbias[o] = sum over i of dy[o, i].
//
// Grid: tiles of a row x rows. The sums are those of tiles, (tiles, rows); sum_parts.cu adds up the tiles.
#include "rows.cuh"

// Adds to the columns begin .. begin + count - 1.
extern "C" __global__ void bias_add(real* y, const acc* __restrict__ bias, int row, int begin, int count, int tile) {
    const int tile_begin = begin + blockIdx.x * tile;
    const int tile_end = begin + count - tile_begin < tile ? begin + count : tile_begin + tile;
    const acc value = bias[blockIdx.y];
    real* y_row = y + (long long)blockIdx.y * row;
    map_over({y_row}, of_block(tile_begin, tile_end), [=](auto& sum, auto y) { sum[0] = y + value; }, (const real*)y_row);
}

extern "C" __global__ void bias_tile_sums(const real* __restrict__ dy, acc* __restrict__ tile_sums, int row, int tile) {
    const int begin = blockIdx.x * tile, end = row - begin < tile ? row : begin + tile;
    acc sum[1];
    sum_over(sum, begin, end, [](auto& sums, auto value) { sums[0] += value; }, dy + (long long)blockIdx.y * row);
    if (threadIdx.x == 0) tile_sums[(long long)blockIdx.x * gridDim.y + blockIdx.y] = sum[0];
}
