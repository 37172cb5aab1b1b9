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
// On the CPU the three steps from x to y are one kernel, winograd_conv. On a GPU, and for dU, they are kernels of their own:
// a launch transforms gridDim.x tiles from tile_begin on; they are counted along the rows of y, tiles_x a row. In matrices
// each has `padded` columns: the batch, and zeros up to the next whole vector of the CPU. Threads run along the batch.
#include "epilogue.cuh"
#include "packed_gemm.cuh"

#define TILE 4     // inputs along a side
#define OUTPUTS 2  // outputs along a side

struct Images {  // of x or y, with all channels
    int height, width, batch;

    __device__ long long channel() const { return (long long)height * width * batch; }
};

// ---- x -> V -----------------------------------------------------------------------------------------------------------

// Of one channel and tile, whose first input is (top, left): the first `images` images of x, their 16 elements in v, which lie
// `element` apart and have room for `padded`.
template <bool WHOLE>
__device__ __forceinline__ void transform_input(const real* __restrict__ x, real* __restrict__ v, long long element,
                                                Images of_x, int images, int padded, int top, int left) {
    LANE_LOOP(n, images) {
        lanes t[TILE][TILE];
        UNROLL for (int j = 0; j < TILE; ++j) {
            lanes d[TILE];
            UNROLL for (int i = 0; i < TILE; ++i) {
                const int iy = top + i, ix = left + j;
                const bool inside = iy >= 0 && iy < of_x.height && ix >= 0 && ix < of_x.width;
                d[i] = inside ? load<WHOLE>(x + ((long long)iy * of_x.width + ix) * of_x.batch + n, images - n) : lanes{};
            }
            t[0][j] = d[0] - d[2];
            t[1][j] = d[1] + d[2];
            t[2][j] = d[2] - d[1];
            t[3][j] = d[1] - d[3];
        }
        real* out = v + n;
        UNROLL for (int i = 0; i < TILE; ++i) {
            store<WHOLE>(out, t[i][0] - t[i][2], padded - n), out += element;
            store<WHOLE>(out, t[i][1] + t[i][2], padded - n), out += element;
            store<WHOLE>(out, t[i][2] - t[i][1], padded - n), out += element;
            store<WHOLE>(out, t[i][1] - t[i][3], padded - n), out += element;
        }
    }
}

template <bool WHOLE>
__device__ __forceinline__ void transform_inputs(const real* __restrict__ x, real* __restrict__ v, Images of_x, int padded,
                                                 int padding, int tiles_x, int tile_begin, int step) {
    const int c = blockIdx.y, tile = tile_begin + blockIdx.x;
    transform_input<WHOLE>(x + c * of_x.channel(), v + (long long)c * step + (long long)blockIdx.x * padded,
                           (long long)gridDim.y * step, of_x, of_x.batch, padded, tile / tiles_x * OUTPUTS - padding,
                           tile % tiles_x * OUTPUTS - padding);
}

// v (16, C, step), of those tiles of x; step >= P. Grid: tiles x channels, so that rows of v are written in their order.
extern "C" __global__ void winograd_input(const real* __restrict__ x, real* __restrict__ v, int height, int width, int batch,
                                          int padded, int padding, int tiles_x, int tile_begin, int step) {
    const Images of_x{height, width, batch};
    if (whole_lanes(batch)) transform_inputs<true>(x, v, of_x, padded, padding, tiles_x, tile_begin, step);
    else transform_inputs<false>(x, v, of_x, padded, padding, tiles_x, tile_begin, step);
}

// ---- M -> y, and dy -> E ----------------------------------------------------------------------------------------------

// The 2x2 outputs of a tile: where they begin, how far the second row is from the first, and which exist.
struct Outputs {
    long long begin, row;
    bool right, below;
};

__device__ __forceinline__ Outputs outputs_of_tile(long long channel, int tile, Images of_y, int tiles_x) {
    const int oy = tile / tiles_x * OUTPUTS, ox = tile % tiles_x * OUTPUTS;
    return {channel * of_y.channel() + ((long long)oy * of_y.width + ox) * of_y.batch, (long long)of_y.width * of_y.batch,
            ox + 1 < of_y.width, oy + 1 < of_y.height};
}

// The first `images` images of one tile's outputs in y, a channel that has this bias, of its elements in m; see transform_input.
template <bool WHOLE, class Stored>
__device__ __forceinline__ void transform_output(const Stored* __restrict__ m, long long element, const Epilogue& epilogue,
                                                 acc bias, real* y, Outputs tile, int batch, int images, int padded) {
    LANE_LOOP(n, images) {
        lanes t[OUTPUTS][TILE];
        UNROLL for (int j = 0; j < TILE; ++j) {
            lanes a[TILE];
            UNROLL for (int i = 0; i < TILE; ++i) a[i] = load<WHOLE>(m + (i * TILE + j) * element + n, padded - n);
            t[0][j] = a[0] + a[1] + a[2];
            t[1][j] = a[1] - a[2] - a[3];
        }
        real* out = y + tile.begin + n;
        const auto put = [&](real* target, lanes value) { epilogue.store_result<WHOLE>(target, value, bias, images - n); };
        put(out, t[0][0] + t[0][1] + t[0][2]);
        if (tile.right) put(out + batch, t[0][1] - t[0][2] - t[0][3]);
        if (!tile.below) continue;
        put(out + tile.row, t[1][0] + t[1][1] + t[1][2]);
        if (tile.right) put(out + tile.row + batch, t[1][1] - t[1][2] - t[1][3]);
    }
}

// m (16, O, P) -> those tiles of y. Grid: tiles x outputs.
extern "C" __global__ void winograd_output(const real* __restrict__ m, real* y, OPTIONAL const acc* __restrict__ bias,
                                           OPTIONAL const real* plus, int height, int width, int batch, int padded, int tiles_x,
                                           int tile_begin) {
    const Outputs tile = outputs_of_tile(blockIdx.y, tile_begin + blockIdx.x, {height, width, batch}, tiles_x);
    const long long element = (long long)gridDim.x * gridDim.y * padded;
    const real* elements = m + ((long long)blockIdx.y * gridDim.x + blockIdx.x) * padded;
    const Epilogue epilogue{y, bias, plus};
    const acc its_bias = epilogue.bias_of(blockIdx.y);
    if (whole_lanes(batch)) transform_output<true>(elements, element, epilogue, its_bias, y, tile, batch, batch, padded);
    else transform_output<false>(elements, element, epilogue, its_bias, y, tile, batch, batch, padded);
}

template <bool WHOLE>
__device__ __forceinline__ void transform_gradient(const real* __restrict__ dy, real* __restrict__ e, int height, int width,
                                                   int batch, int padded, int tiles_x, int tile_begin, int step) {
    const Outputs tile = outputs_of_tile(blockIdx.y, tile_begin + blockIdx.x, {height, width, batch}, tiles_x);
    const long long element = (long long)gridDim.y * step;
    LANE_LOOP(n, batch) {
        const real* in = dy + tile.begin + n;
        const lanes a = load<WHOLE>(in, batch - n);
        const lanes b = tile.right ? load<WHOLE>(in + batch, batch - n) : lanes{};
        const lanes c = tile.below ? load<WHOLE>(in + tile.row, batch - n) : lanes{};
        const lanes d = tile.below && tile.right ? load<WHOLE>(in + tile.row + batch, batch - n) : lanes{};
        const lanes t[TILE][OUTPUTS] = {{a, b}, {a + c, b + d}, {a - c, b - d}, {-c, -d}};
        real* out = e + (long long)blockIdx.y * step + (long long)blockIdx.x * padded + n;
        UNROLL for (int i = 0; i < TILE; ++i) {
            store<WHOLE>(out, t[i][0], padded - n), out += element;
            store<WHOLE>(out, t[i][0] + t[i][1], padded - n), out += element;
            store<WHOLE>(out, t[i][0] - t[i][1], padded - n), out += element;
            store<WHOLE>(out, -t[i][1], padded - n), out += element;
        }
    }
}

// e (16, O, step), of those tiles of dy; step >= P. Grid: tiles x outputs.
extern "C" __global__ void winograd_output_gradient(const real* __restrict__ dy, real* __restrict__ e, int height, int width,
                                                    int batch, int padded, int tiles_x, int tile_begin, int step) {
    if (whole_lanes(batch)) transform_gradient<true>(dy, e, height, width, batch, padded, tiles_x, tile_begin, step);
    else transform_gradient<false>(dy, e, height, width, batch, padded, tiles_x, tile_begin, step);
}

// ---- x -> V -> M -> y -------------------------------------------------------------------------------------------------

// M of ROWS results of a tile: m (16, ROWS, COUNT vectors), of u (16, ..., C, ROWS), whose elements lie u_element apart, and
// v (16, C, COUNT vectors).
template <int COUNT>
__device__ __forceinline__ void multiply_elements(const acc* __restrict__ u, long long u_element, const real* __restrict__ v,
                                                  int depth, acc* __restrict__ m) {
    const int padded = COUNT * VECTOR_COLUMNS;
    for (int e = 0; e < TILE * TILE; ++e) {
        LANE_LOOP(n, VECTOR_COLUMNS) {
            lanes sums[ROWS][COUNT] = {};
            tile_sums(u + e * u_element, v + (long long)e * depth * padded + n, padded, depth, sums);
            UNROLL for (int r = 0; r < ROWS; ++r)
                UNROLL for (int j = 0; j < COUNT; ++j)
                    store<true>(m + (e * ROWS + r) * padded + j * VECTOR_COLUMNS + n, sums[r][j], VECTOR_COLUMNS);
        }
    }
}

struct Group {  // of channels
    int sources, results;
    Images of_x, of_y;
    int padding, tiles_x;
};

// `count` tiles of one row, from (ty, tx) on, with `images` images. y, and its first_channel, begin with those of the group.
template <bool WHOLE>
__device__ __forceinline__ void convolve_tiles(const real* __restrict__ x, const acc* __restrict__ u, long long u_element,
                                               real* __restrict__ v, acc* __restrict__ m, const Epilogue& epilogue,
                                               long long first_channel, real* y, Group g, int ty, int tx, int count,
                                               int images) {
    const int vectors = (images + VECTOR_COLUMNS - 1) / VECTOR_COLUMNS, padded = vectors * VECTOR_COLUMNS;
    const long long element = (long long)g.sources * padded, v_tile = TILE * TILE * element;
    for (int c = 0; c < g.sources; ++c)
        for (int t = 0; t < count; ++t)
            transform_input<WHOLE>(x + c * g.of_x.channel(), v + t * v_tile + (long long)c * padded, element, g.of_x, images,
                                   padded, ty * OUTPUTS - g.padding, (tx + t) * OUTPUTS - g.padding);
    __syncthreads();
    for (int first = 0; first < g.results; first += ROWS) {
        const acc* rows = u + (long long)first * g.sources;
        for (int t = 0; t < count; ++t) {
            if (vectors == 1) multiply_elements<1>(rows, u_element, v + t * v_tile, g.sources, m);
            else if (vectors == 2) multiply_elements<2>(rows, u_element, v + t * v_tile, g.sources, m);
            else multiply_elements<VECTORS>(rows, u_element, v + t * v_tile, g.sources, m);
            __syncthreads();
            for (int r = 0; r < ROWS && first + r < g.results; ++r) {
                const Outputs tile = outputs_of_tile(first + r, ty * g.tiles_x + tx + t, g.of_y, g.tiles_x);
                transform_output<WHOLE>(m + r * padded, ROWS * padded, epilogue, epilogue.bias_of(first_channel + first + r), y,
                                        tile, g.of_y.batch, images, padded);
            }
            __syncthreads();  // nobody may overwrite m before all have read it
        }
    }
}

// x -> y, u as winograd_weight writes it, for products on the CPU: V of a strip of tiles stays in the second cache while U
// passes, M of ROWS results of a tile in the first. A step is up to `strip` tiles of a row of tiles of a group, with up to
// `images` images, PANEL at most. Blocks share the steps, each with its own part of v (blocks, strip, 16, C/groups, images)
// and m (blocks, 16, ROWS, images).
extern "C" __global__ void winograd_conv(const real* __restrict__ x, const acc* __restrict__ u, real* __restrict__ v,
                                         acc* __restrict__ m, real* y, OPTIONAL const acc* __restrict__ bias,
                                         OPTIONAL const real* plus, int groups, int sources, int results, int height, int width,
                                         int out_height, int out_width, int batch, int padding, int strip, int images) {
    const int tiles_x = (out_width + OUTPUTS - 1) / OUTPUTS, tiles_y = (out_height + OUTPUTS - 1) / OUTPUTS;
    const Group g{sources, results, {height, width, batch}, {out_height, out_width, batch}, padding, tiles_x};
    const int strips = (tiles_x + strip - 1) / strip, parts = (batch + images - 1) / images;
    const long long steps = (long long)groups * tiles_y * strips * parts;
    const long long u_group = (long long)(results + ROWS - 1) / ROWS * ROWS * sources, u_element = groups * u_group;
    real* own_v = v + (long long)blockIdx.x * strip * TILE * TILE * sources * images;
    acc* own_m = m + (long long)blockIdx.x * TILE * TILE * ROWS * images;
    const Epilogue epilogue{y, bias, plus};
    for (long long s = steps * blockIdx.x / gridDim.x; s < steps * (blockIdx.x + 1) / gridDim.x; ++s) {
        const int n = s % parts * images, tx = s / parts % strips * strip, ty = s / parts / strips % tiles_y;
        const int count = tiles_x - tx < strip ? tiles_x - tx : strip, present = batch - n < images ? batch - n : images;
        const long long group = s / parts / strips / tiles_y;
        const real* x_group = x + group * sources * g.of_x.channel() + n;
        real* y_group = y + group * results * g.of_y.channel() + n;
        const acc* its_u = u + group * u_group;
        if (whole_lanes(present))
            convolve_tiles<true>(x_group, its_u, u_element, own_v, own_m, epilogue, group * results, y_group, g, ty, tx, count,
                                 present);
        else
            convolve_tiles<false>(x_group, its_u, u_element, own_v, own_m, epilogue, group * results, y_group, g, ty, tx, count,
                                  present);
    }
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
            const acc a = du[x * n + i], b = du[(TILE + x) * n + i];
            const acc c = du[(2 * TILE + x) * n + i], d = du[(3 * TILE + x) * n + i];
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
