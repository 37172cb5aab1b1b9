// Convolution in narrow groups, directly: where a group has few channels, its matrices (conv.cu) fill no matrix product.
// Xie, Girshick, Dollar, Tu, He, "Aggregated residual transformations for deep neural networks", arXiv 1611.05431.
//
// Per group, of C channels in and O out; what is outside of an image counts nothing:
//
//   y[o, oy, ox, n]       = sum over (c, ky, kx) of weight[o, c, ky, kx] * x[c, oy*stride - padding + ky, ox*stride - ..., n]
//   dx[c, iy, ix, n]      = sum over (o, ky, kx) of weight[o, c, ky, kx] * dy[o, oy, ox, n], the windows that see (iy, ix):
//                           oy*stride = iy + padding - ky, ox*stride = ix + padding - kx
//   dweight[o, c, ky, kx] = sum over (oy, ox, n) of dy[o, oy, ox, n] * x[c, oy*stride - padding + ky, ox*stride - ..., n]
//
// Threads run along the batch, in lanes, each with a tile of sums in registers: for y and dx, OUTPUTS channels of PIXELS
// pixels of a row; for dweight, OUTPUTS channels of y times TAPS of the (c, ky, kx). Each load then serves several
// multiplications. dx gathers, one writer per element; dweight has two levels, tiles of rows and their sum in order.
#include "epilogue.cuh"

#define OUTPUTS 4  // group_conv.py has it too
#ifdef FEW_REGISTERS
#define PIXELS 3
#define TAPS 2
#else
#define PIXELS 4
#define TAPS 6
#endif

// packed (groups, tiles, sources, kh, kw, OUTPUTS): the weights in the order in which a block reads them, as acc. For y
// the sources are a group's inputs and its outputs lie in tiles; for dx (`adjoint`) the other way round. The last tile's
// missing channels are 0.
extern "C" __global__ void group_conv_pack(const real* __restrict__ weight, acc* __restrict__ packed, int group_outputs,
                                           int group_channels, int window, int tiles, int adjoint, long long n) {
    const int sources = adjoint ? group_outputs : group_channels, results = adjoint ? group_channels : group_outputs;
    GRID_LOOP(i, n) {
        const int place = i / OUTPUTS % window, source = i / OUTPUTS / window % sources;
        const int result = i / OUTPUTS / window / sources % tiles * OUTPUTS + i % OUTPUTS;
        const long long group = i / OUTPUTS / window / sources / tiles;
        const int o = adjoint ? source : result, c = adjoint ? result : source;
        const bool exists = result < results;
        packed[i] = exists ? acc(weight[((group * group_outputs + o) * group_channels + c) * window + place]) : acc(0);
    }
}

// ---- y and dx: both sum over windows of a source ------------------------------------------------------------------

struct Sizes {
    int sources, height, width;           // of a group, and of the source's images
    int results, out_height, out_width;   // of a group, and of the result's images
    int batch, kernel_h, kernel_w, stride, padding;
};

// The window of one result along one axis: the sources first, first + 1, ..., `count` of them, some of which may be
// outside; they meet the weights tap, tap + tap_step, ...
struct Window {
    int first, count, tap, tap_step;
};

template <bool ADJOINT>
__device__ __forceinline__ Window window_of(int result, int kernel, int stride, int padding) {
    if (!ADJOINT) return {result * stride - padding, kernel, 0, 1};
    // Every stride-th weight meets a dy, the last of them the first dy. None does where the stride leaves gaps.
    const int tap = (result + padding) % stride, count = (kernel - tap + stride - 1) / stride;
    return {(result + padding) / stride - count + 1, count, tap + (count - 1) * stride, -stride};
}

// Adds the products with COUNT neighbouring weights of a row. STEP 1: the windows of neighbouring pixels are one source
// apart, and share what is loaded. STEP 3, for up to 3 weights: they are `distance` apart, and share nothing.
template <int COUNT, int STEP, bool WHOLE>
__device__ __forceinline__ void add_products(lanes (&sums)[PIXELS][OUTPUTS], const real* row, int first, const acc* weights,
                                             int weight_step, int distance, int width, int batch, int left) {
    UNROLL for (int i = 0; i < (PIXELS - 1) * STEP + COUNT; ++i) {
        const int ix = first + i / STEP * distance + i % STEP;
        if (STEP > 1 && i % STEP >= COUNT) continue;
        // The next pixels of this row: PIXELS short runs from row to row are too little for the processor to foresee.
        prefetch(row + (ix + PIXELS * distance) * (long long)batch);
        if (ix < 0 || ix >= width) continue;
        const lanes value = load<WHOLE>(row + ix * (long long)batch, left);
        UNROLL for (int p = 0; p < PIXELS; ++p) {
            const int k = i - p * STEP;
            if (k < 0 || k >= COUNT) continue;
            UNROLL for (int o = 0; o < OUTPUTS; ++o) sums[p][o] += weights[k * weight_step + o] * value;
        }
    }
}

// Adds the products of a row of the source with a row of weights.
template <int STEP, bool WHOLE>
__device__ __forceinline__ void add_row(lanes (&sums)[PIXELS][OUTPUTS], const real* row, const Window& columns,
                                        const acc* weights, int distance, int width, int batch, int left) {
    const int weight_step = columns.tap_step * OUTPUTS;
    int first = columns.first, rest = columns.count;
    for (; rest >= 3; rest -= 3, first += 3, weights += 3 * weight_step)
        add_products<3, STEP, WHOLE>(sums, row, first, weights, weight_step, distance, width, batch, left);
    if (rest == 2) add_products<2, STEP, WHOLE>(sums, row, first, weights, weight_step, distance, width, batch, left);
    if (rest == 1) add_products<1, STEP, WHOLE>(sums, row, first, weights, weight_step, distance, width, batch, left);
}

// One row of the results of one tile of channels. Grid: groups x rows x tiles.
template <bool ADJOINT, int STEP, bool WHOLE>
__device__ __forceinline__ void compute_row(const real* __restrict__ source, const acc* __restrict__ packed,
                                            const Epilogue& epilogue, const Sizes& size) {
    const int batch = size.batch, tiles = (size.results + OUTPUTS - 1) / OUTPUTS, tile = blockIdx.x % tiles;
    const int out_y = blockIdx.x / tiles % size.out_height, group = blockIdx.x / tiles / size.out_height;
    const int results = size.results - tile * OUTPUTS;  // that are left for this tile and the next ones
    const real* images = source + (long long)group * size.sources * size.height * size.width * batch;
    const int tile_size = size.sources * size.kernel_h * size.kernel_w * OUTPUTS;
    const acc* tile_weights = packed + ((long long)group * tiles + tile) * tile_size;
    const long long channel = (long long)group * size.results + tile * OUTPUTS;
    real* out = epilogue.results + (channel * size.out_height + out_y) * size.out_width * batch;

    const Window rows = window_of<ADJOINT>(out_y, size.kernel_h, size.stride, size.padding);
    const int begin = rows.first < 0 ? -rows.first : 0;
    const int end = size.height - rows.first < rows.count ? size.height - rows.first : rows.count;
    // The pixels of a tile see neighbouring windows. In the gather those are `stride` apart: several phases cover a row.
    const int out_step = ADJOINT ? size.stride : 1, distance = ADJOINT ? 1 : size.stride;
    for (int phase = 0; phase < out_step; ++phase)
        for (int out_x = phase; out_x < size.out_width; out_x += PIXELS * out_step) {
            const Window columns = window_of<ADJOINT>(out_x, size.kernel_w, size.stride, size.padding);
            LANE_LOOP(n, batch) {
                lanes sums[PIXELS][OUTPUTS] = {};
                for (int c = 0; c < size.sources; ++c)
                    for (int i = begin; i < end; ++i) {
                        const real* row = images + ((long long)c * size.height + rows.first + i) * size.width * batch + n;
                        const int ky = rows.tap + i * rows.tap_step;
                        const acc* weights = tile_weights + ((c * size.kernel_h + ky) * size.kernel_w + columns.tap) * OUTPUTS;
                        add_row<STEP, WHOLE>(sums, row, columns, weights, distance, size.width, batch, batch - n);
                    }
                UNROLL for (int p = 0; p < PIXELS; ++p)
                    UNROLL for (int o = 0; o < OUTPUTS; ++o) {
                        const int x = out_x + p * out_step;
                        real* pixel = out + ((long long)o * size.out_height * size.out_width + x) * batch + n;
                        if (x < size.out_width && o < results)
                            epilogue.store_result<WHOLE>(pixel, sums[p][o], epilogue.bias_of(channel + o), batch - n);
                    }
            }
        }
}

extern "C" __global__ void group_conv_forward(const real* __restrict__ x, const acc* __restrict__ packed, real* y,
                                              OPTIONAL const acc* __restrict__ bias, OPTIONAL const real* plus,
                                              int group_channels, int height, int width, int group_outputs, int out_height,
                                              int out_width, int batch, int kernel_h, int kernel_w, int stride, int padding) {
    const Sizes size{group_channels, height, width, group_outputs, out_height, out_width,
                     batch, kernel_h, kernel_w, stride, padding};
    const Epilogue epilogue{y, bias, plus};
    if (stride == 1 && whole_lanes(batch)) compute_row<false, 1, true>(x, packed, epilogue, size);
    else if (stride == 1) compute_row<false, 1, false>(x, packed, epilogue, size);
    else if (whole_lanes(batch)) compute_row<false, 3, true>(x, packed, epilogue, size);
    else compute_row<false, 3, false>(x, packed, epilogue, size);
}

// packed for the adjoint.
extern "C" __global__ void group_conv_backward_x(const real* __restrict__ dy, const acc* __restrict__ packed,
                                                 real* dx, OPTIONAL const real* plus, int group_channels, int height, int width,
                                                 int group_outputs, int out_height, int out_width, int batch, int kernel_h,
                                                 int kernel_w, int stride, int padding) {
    const Sizes size{group_outputs, out_height, out_width, group_channels, height, width,
                     batch, kernel_h, kernel_w, stride, padding};
    const Epilogue epilogue{dx, 0, plus};
    if (whole_lanes(batch)) compute_row<true, 1, true>(dy, packed, epilogue, size);
    else compute_row<true, 1, false>(dy, packed, epilogue, size);
}

// ---- dweight --------------------------------------------------------------------------------------------------------

// The sums over `rows` rows of y, of OUTPUTS channels of y times TAPS rows of cols, the (c, ky, kx) of conv.cu.
// tile_dweight (row tiles, O, C/groups, kh, kw). Grid: row tiles x groups x tiles of channels x k_blocks, which
// share the tiles of (c, ky, kx).
template <bool WHOLE>
__device__ __forceinline__ void sum_tile(const real* __restrict__ x, const real* __restrict__ dy,
                                         acc* __restrict__ tile_dweight, int groups, int rows, int k_blocks,
                                         const Sizes& size) {
    const int batch = size.batch, window = size.kernel_h * size.kernel_w, depth = size.sources * window;
    const int o_tiles = (size.results + OUTPUTS - 1) / OUTPUTS, first_o = blockIdx.x / k_blocks % o_tiles * OUTPUTS;
    const int group = blockIdx.x / k_blocks / o_tiles % groups, row_tile = blockIdx.x / k_blocks / o_tiles / groups;
    const int begin = row_tile * rows, end = size.out_height - begin < rows ? size.out_height : begin + rows;
    for (int first_k = blockIdx.x % k_blocks * TAPS; first_k < depth; first_k += k_blocks * TAPS) {
        lanes sums[TAPS * OUTPUTS] = {};
        for (int oy = begin; oy < end; ++oy) {
            // Of each tap, the row of x, and where in it the window of ox = 0 begins: at `width`, if there is none.
            const real *x_rows[TAPS], *dy_rows[OUTPUTS];
            int first[TAPS];
            UNROLL for (int k = 0; k < TAPS; ++k) {
                const int tap = first_k + k, iy = oy * size.stride - size.padding + tap / size.kernel_w % size.kernel_h;
                const bool exists = tap < depth && iy >= 0 && iy < size.height;
                const long long c = (long long)group * size.sources + tap / window;
                first[k] = exists ? tap % size.kernel_w - size.padding : size.width;
                x_rows[k] = exists ? x + (c * size.height + iy) * size.width * batch : x;
            }
            UNROLL for (int o = 0; o < OUTPUTS; ++o) {  // channels beyond the group's are summed as its first, and not stored
                const long long channel = (long long)group * size.results + (first_o + o < size.results ? first_o + o : 0);
                dy_rows[o] = dy + (channel * size.out_height + oy) * size.out_width * batch;
            }
            for (int ox = 0; ox < size.out_width; ++ox)
                LANE_LOOP(n, batch) {
                    lanes g[OUTPUTS];
                    UNROLL for (int o = 0; o < OUTPUTS; ++o)
                        g[o] = load<WHOLE>(dy_rows[o] + ox * (long long)batch + n, batch - n);
                    UNROLL for (int k = 0; k < TAPS; ++k) {
                        const int ix = ox * size.stride + first[k];
                        if (ix < 0 || ix >= size.width) continue;
                        const lanes value = load<WHOLE>(x_rows[k] + ix * (long long)batch + n, batch - n);
                        UNROLL for (int o = 0; o < OUTPUTS; ++o) sums[k * OUTPUTS + o] += g[o] * value;
                    }
                }
        }
        acc totals[TAPS * OUTPUTS];
        sum_each(sums, totals);
        UNROLL for (int k = 0; k < TAPS; ++k)
            UNROLL for (int o = 0; o < OUTPUTS; ++o)
                if (threadIdx.x == 0 && first_k + k < depth && first_o + o < size.results) {
                    const long long row = ((long long)row_tile * groups + group) * size.results + first_o + o;
                    tile_dweight[row * depth + first_k + k] = totals[k * OUTPUTS + o];
                }
    }
}

extern "C" __global__ void group_conv_tile_dweight(const real* __restrict__ x, const real* __restrict__ dy,
                                                   acc* __restrict__ tile_dweight, int groups, int group_channels, int height,
                                                   int width, int group_outputs, int out_height, int out_width, int batch,
                                                   int kernel_h, int kernel_w, int stride, int padding, int rows,
                                                   int k_blocks) {
    const Sizes size{group_channels, height, width, group_outputs, out_height, out_width,
                     batch, kernel_h, kernel_w, stride, padding};
    if (whole_lanes(batch)) sum_tile<true>(x, dy, tile_dweight, groups, rows, k_blocks, size);
    else sum_tile<false>(x, dy, tile_dweight, groups, rows, k_blocks, size);
}
