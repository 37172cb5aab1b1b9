// Convolution with 3x3 windows and stride 1, by 16 multiplications where the definition (conv.cu) takes 36: Winograd's
// F(2x2, 3x3). Lavin, Gray, "Fast algorithms for convolutional neural networks", arXiv 1509.09308.
//
// A tile is 2x2 outputs and the 4x4 inputs that they see. With d a tile of x and g a window of the weight,
//
//   V = B^T d B      U = G g G^T      M[o] = sum over c of U[o, c] * V[c], element by element      y tile = A^T M A
//
//         [1  0 -1  0]         [ 1    0    0 ]
//   B^T = [0  1  1  0]     G = [1/2  1/2  1/2]     A^T = [1  1  1  0]
//         [0 -1  1  0]         [1/2 -1/2  1/2]           [0  1 -1 -1]
//         [0  1  0 -1]         [ 0    0    1 ]
//
// so each of the 16 elements is a matrix product, M (O, P) = U (O, C) @ V (C, P), where P counts tiles and images. The
// gradient of the weight is the adjoint: with E = A dy A^T, dU (O, C) = E (O, P) @ V^T (P, C), dg = G^T dU G. The gradient
// of x is again a convolution, of dy with the turned and transposed weight (`adjoint`).
//
// A launch transforms gridDim.y tiles from tile_begin on; they are counted along the rows of y, tiles_x a row. In matrices
// each has `padded` columns: the batch, and zeros up to the next whole vector of the CPU. Threads run along the batch.
#include "lanes.cuh"

#define TILE 4     // inputs along a side
#define OUTPUTS 2  // outputs along a side

// ---- x -> V -----------------------------------------------------------------------------------------------------------

template <bool WHOLE>
__device__ __forceinline__ void transform_input(const real* __restrict__ x, real* __restrict__ v, int height, int width,
                                                int batch, int padded, int padding, int tiles_x, int tile_begin, int step) {
    const int c = blockIdx.x, tile = tile_begin + blockIdx.y;
    const int top = tile / tiles_x * OUTPUTS - padding, left = tile % tiles_x * OUTPUTS - padding;
    const long long element = (long long)gridDim.x * step;
    const real* image = x + (long long)c * height * width * batch;
    LANE_LOOP(n, batch) {
        lanes t[TILE][TILE];
        UNROLL for (int j = 0; j < TILE; ++j) {
            lanes d[TILE];
            UNROLL for (int i = 0; i < TILE; ++i) {
                const int iy = top + i, ix = left + j;
                const bool inside = iy >= 0 && iy < height && ix >= 0 && ix < width;
                d[i] = inside ? load<WHOLE>(image + ((long long)iy * width + ix) * batch + n, batch - n) : lanes{};
            }
            t[0][j] = d[0] - d[2];
            t[1][j] = d[1] + d[2];
            t[2][j] = d[2] - d[1];
            t[3][j] = d[1] - d[3];
        }
        real* out = v + (long long)c * step + (long long)blockIdx.y * padded + n;
        UNROLL for (int i = 0; i < TILE; ++i) {
            store<WHOLE>(out, t[i][0] - t[i][2], padded - n), out += element;
            store<WHOLE>(out, t[i][1] + t[i][2], padded - n), out += element;
            store<WHOLE>(out, t[i][2] - t[i][1], padded - n), out += element;
            store<WHOLE>(out, t[i][1] - t[i][3], padded - n), out += element;
        }
    }
}

// v (16, C, step), of those tiles of x; step >= P. Grid: channels x tiles.
extern "C" __global__ void winograd_input(const real* __restrict__ x, real* __restrict__ v, int height, int width, int batch,
                                          int padded, int padding, int tiles_x, int tile_begin, int step) {
    if (whole_lanes(batch)) transform_input<true>(x, v, height, width, batch, padded, padding, tiles_x, tile_begin, step);
    else transform_input<false>(x, v, height, width, batch, padded, padding, tiles_x, tile_begin, step);
}

// ---- M -> y, and dy -> E ----------------------------------------------------------------------------------------------

// The 2x2 outputs of this block's tile: where they begin, and which exist.
struct Outputs {
    long long begin, row;
    bool right, below;
};

__device__ __forceinline__ Outputs outputs_of_tile(int height, int width, int batch, int tiles_x, int tile_begin) {
    const int tile = tile_begin + blockIdx.y, oy = tile / tiles_x * OUTPUTS, ox = tile % tiles_x * OUTPUTS;
    return {(((long long)blockIdx.x * height + oy) * width + ox) * batch, (long long)width * batch, ox + 1 < width, oy + 1 < height};
}

template <bool WHOLE>
__device__ __forceinline__ void transform_output(const real* __restrict__ m, real* __restrict__ y, int height, int width, int batch,
                                                 int padded, int tiles_x, int tile_begin) {
    const Outputs tile = outputs_of_tile(height, width, batch, tiles_x, tile_begin);
    const long long element = (long long)gridDim.x * gridDim.y * padded;
    const real* in = m + ((long long)blockIdx.x * gridDim.y + blockIdx.y) * padded;
    LANE_LOOP(n, batch) {
        lanes t[OUTPUTS][TILE];
        UNROLL for (int j = 0; j < TILE; ++j) {
            lanes a[TILE];
            UNROLL for (int i = 0; i < TILE; ++i) a[i] = load<WHOLE>(in + (i * TILE + j) * element + n, padded - n);
            t[0][j] = a[0] + a[1] + a[2];
            t[1][j] = a[1] - a[2] - a[3];
        }
        real* out = y + tile.begin + n;
        store<WHOLE>(out, t[0][0] + t[0][1] + t[0][2], batch - n);
        if (tile.right) store<WHOLE>(out + batch, t[0][1] - t[0][2] - t[0][3], batch - n);
        if (!tile.below) continue;
        store<WHOLE>(out + tile.row, t[1][0] + t[1][1] + t[1][2], batch - n);
        if (tile.right) store<WHOLE>(out + tile.row + batch, t[1][1] - t[1][2] - t[1][3], batch - n);
    }
}

// m (16, O, P) -> those tiles of y. Grid: outputs x tiles.
extern "C" __global__ void winograd_output(const real* __restrict__ m, real* __restrict__ y, int height, int width, int batch,
                                           int padded, int tiles_x, int tile_begin) {
    if (whole_lanes(batch)) transform_output<true>(m, y, height, width, batch, padded, tiles_x, tile_begin);
    else transform_output<false>(m, y, height, width, batch, padded, tiles_x, tile_begin);
}

template <bool WHOLE>
__device__ __forceinline__ void transform_gradient(const real* __restrict__ dy, real* __restrict__ e, int height, int width,
                                                   int batch, int padded, int tiles_x, int tile_begin, int step) {
    const Outputs tile = outputs_of_tile(height, width, batch, tiles_x, tile_begin);
    const long long element = (long long)gridDim.x * step;
    LANE_LOOP(n, batch) {
        const real* in = dy + tile.begin + n;
        const lanes a = load<WHOLE>(in, batch - n);
        const lanes b = tile.right ? load<WHOLE>(in + batch, batch - n) : lanes{};
        const lanes c = tile.below ? load<WHOLE>(in + tile.row, batch - n) : lanes{};
        const lanes d = tile.below && tile.right ? load<WHOLE>(in + tile.row + batch, batch - n) : lanes{};
        const lanes t[TILE][OUTPUTS] = {{a, b}, {a + c, b + d}, {a - c, b - d}, {-c, -d}};
        real* out = e + (long long)blockIdx.x * step + (long long)blockIdx.y * padded + n;
        UNROLL for (int i = 0; i < TILE; ++i) {
            store<WHOLE>(out, t[i][0], padded - n), out += element;
            store<WHOLE>(out, t[i][0] + t[i][1], padded - n), out += element;
            store<WHOLE>(out, t[i][0] - t[i][1], padded - n), out += element;
            store<WHOLE>(out, -t[i][1], padded - n), out += element;
        }
    }
}

// e (16, O, step), of those tiles of dy; step >= P. Grid: outputs x tiles.
extern "C" __global__ void winograd_output_gradient(const real* __restrict__ dy, real* __restrict__ e, int height, int width,
                                                    int batch, int padded, int tiles_x, int tile_begin, int step) {
    if (whole_lanes(batch)) transform_gradient<true>(dy, e, height, width, batch, padded, tiles_x, tile_begin, step);
    else transform_gradient<false>(dy, e, height, width, batch, padded, tiles_x, tile_begin, step);
}

// ---- weight -> U, and dU -> dweight ------------------------------------------------------------------------------------

// u (16, groups, tiles, sources, rows), the results of a group in tiles of `rows` as in packed_gemm.cu. For y, sources are a
// group's inputs and results its outputs; for dx (`adjoint`) the other way round. Grid: groups x tiles x sources.
extern "C" __global__ void winograd_weight(const real* __restrict__ weight, acc* __restrict__ u, int results, int sources,
                                           int rows, int adjoint) {
    const int source = blockIdx.x % sources, tiles = (results + rows - 1) / rows, tile = blockIdx.x / sources % tiles;
    const long long group = blockIdx.x / sources / tiles, element = (long long)gridDim.x * rows;
    BLOCK_LOOP(r, 0, rows) {
        const int result = tile * rows + r;
        const bool exists = result < results;
        const long long window = (group * results + result) * sources + source;
        const real* g = weight + 9 * (adjoint ? (group * sources + source) * results + result : window);
        acc t[TILE][3];
        UNROLL for (int x = 0; x < 3; ++x) {
            const acc a = exists ? acc(g[adjoint ? 8 - x : x]) : acc(0);
            const acc b = exists ? acc(g[adjoint ? 5 - x : 3 + x]) : acc(0);
            const acc c = exists ? acc(g[adjoint ? 2 - x : 6 + x]) : acc(0);
            t[0][x] = a;
            t[1][x] = (a + b + c) / 2;
            t[2][x] = (a - b + c) / 2;
            t[3][x] = c;
        }
        acc* out = u + (long long)blockIdx.x * rows + r;
        UNROLL for (int i = 0; i < TILE; ++i) {
            out[(i * TILE + 0) * element] = t[i][0];
            out[(i * TILE + 1) * element] = (t[i][0] + t[i][1] + t[i][2]) / 2;
            out[(i * TILE + 2) * element] = (t[i][0] - t[i][1] + t[i][2]) / 2;
            out[(i * TILE + 3) * element] = t[i][2];
        }
    }
}

// du (16, n) -> dweight (n, 3, 3).
extern "C" __global__ void winograd_weight_gradient(const acc* __restrict__ du, acc* __restrict__ dweight, long long n) {
    GRID_LOOP(i, n) {
        acc t[3][TILE];
        for (int x = 0; x < TILE; ++x) {
            const acc a = du[x * n + i], b = du[(TILE + x) * n + i], c = du[(2 * TILE + x) * n + i], d = du[(3 * TILE + x) * n + i];
            t[0][x] = a + (b + c) / 2;
            t[1][x] = (b - c) / 2;
            t[2][x] = (b + c) / 2 + d;
        }
        for (int y = 0; y < 3; ++y) {
            dweight[i * 9 + y * 3 + 0] = t[y][0] + (t[y][1] + t[y][2]) / 2;
            dweight[i * 9 + y * 3 + 1] = (t[y][1] - t[y][2]) / 2;
            dweight[i * 9 + y * 3 + 2] = (t[y][1] + t[y][2]) / 2 + t[y][3];
        }
    }
}
