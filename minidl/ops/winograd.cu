// Convolution with 3x3 windows and stride 1 by fewer multiplications than the definition (conv.cu) takes: Winograd's
// F(m x m, 3 x 3). Lavin, Gray, "Fast algorithms for convolutional neural networks", arXiv 1509.09308.
//
// A tile is m x m outputs and the n x n inputs that they see, n = m + 2. With d a tile of x and g a window of the weight,
//
//   V = B^T d B      U = G g G^T      M[o] = sum over c of U[o, c] * V[c], element by element      y tile = A^T M A
//
// so each of the n^2 elements is a matrix product, M (O, P) = U (O, C) @ V (C, P), where P counts tiles and images: m = 4
// multiplies 36 times for 16 outputs, m = 2 16 times for 4, the definition 144 and 36 times. The gradient of the weight is the
// adjoint: with E = A dy A^T, dU (O, C) = E (O, P) @ V^T (P, C), dg = G^T dU G. The gradient of x is again a convolution, of dy
// with the turned and transposed weight (`adjoint`).
//
// The matrices multiply polynomials by their values at n - 1 points and at infinity. Which points decides how much is lost to
// rounding. For m = 4 they are 0, +-3/4 and +-3/2: in float32, over 16 to 512 channels of normal numbers, y is then twice as far
// from exact as by the direct sum (root mean square 5e-7 to 2e-6 of a typical value), dg four times (5e-7); with 0, +-1 and
// +-2, as usually given, six times. m = 2 loses less than the direct sum, so y is computed by that; gradients by m = 4, but for
// images of one or two rows or columns, where m = 2 multiplies less. On points: Barabasz et al., "Error analysis and improving
// the accuracy of Winograd convolution for deep neural networks", arXiv 1803.10986.
//
// On the CPU the three steps from x to y are one kernel, winograd_conv. On a GPU, and for dU, they are kernels of their own:
// a launch transforms gridDim.x tiles from tile_begin on; they are counted along the rows of y, tiles_x a row. In matrices
// each has `padded` columns: the batch, and zeros up to the next whole vector of the CPU. Threads run along the batch.
#include "epilogue.cuh"
#include "packed_gemm.cuh"

// Products with B^T, A^T, A, G and G^T, of acc or lanes, for `OUTPUTS` outputs along a side of a tile.
template <int OUTPUTS>
struct Winograd;

template <>
struct Winograd<2> {  // the points 0, 1 and -1
    static const int TILE = 4;

    template <class T>
    static __device__ void input(const T (&d)[4], T (&v)[4]) {
        v[0] = d[0] - d[2];
        v[1] = d[1] + d[2];
        v[2] = d[2] - d[1];
        v[3] = d[1] - d[3];
    }

    template <class T>
    static __device__ void output(const T (&m)[4], T (&y)[2]) {
        y[0] = m[0] + m[1] + m[2];
        y[1] = m[1] - m[2] - m[3];
    }

    template <class T>
    static __device__ void output_gradient(const T (&dy)[2], T (&e)[4]) {
        e[0] = dy[0];
        e[1] = dy[0] + dy[1];
        e[2] = dy[0] - dy[1];
        e[3] = -dy[1];
    }

    template <class T>
    static __device__ void weight(const T (&g)[3], T (&u)[4]) {
        u[0] = g[0];
        u[1] = (g[0] + g[1] + g[2]) / 2;
        u[2] = (g[0] - g[1] + g[2]) / 2;
        u[3] = g[2];
    }

    static __device__ void weight_gradient(const acc (&du)[4], acc (&dg)[3]) {
        dg[0] = du[0] + (du[1] + du[2]) / 2;
        dg[1] = (du[1] - du[2]) / 2;
        dg[2] = (du[1] + du[2]) / 2 + du[3];
    }
};

template <>
struct Winograd<4> {  // the points 0, p, -p, q and -q
    static const int TILE = 6;
    static constexpr acc p = 0.75, q = 1.5, p2 = p * p, q2 = q * q;
    // Of the values at each pair of points: 1 over the product of the differences from all other points.
    static constexpr acc at_0 = 1 / (p2 * q2), at_p = 1 / (2 * p2 * (p2 - q2)), at_q = 1 / (2 * q2 * (q2 - p2));

    template <class T>
    static __device__ void input(const T (&d)[6], T (&v)[6]) {
        const T even_p = d[4] - q2 * d[2], odd_p = p * (d[3] - q2 * d[1]);
        const T even_q = d[4] - p2 * d[2], odd_q = q * (d[3] - p2 * d[1]);
        v[0] = p2 * q2 * d[0] - (p2 + q2) * d[2] + d[4];
        v[1] = even_p + odd_p;
        v[2] = even_p - odd_p;
        v[3] = even_q + odd_q;
        v[4] = even_q - odd_q;
        v[5] = p2 * q2 * d[1] - (p2 + q2) * d[3] + d[5];
    }

    template <class T>
    static __device__ void output(const T (&m)[6], T (&y)[4]) {
        const T even_p = m[1] + m[2], odd_p = m[1] - m[2], even_q = m[3] + m[4], odd_q = m[3] - m[4];
        y[0] = m[0] + even_p + even_q;
        y[1] = p * odd_p + q * odd_q;
        y[2] = p2 * even_p + q2 * even_q;
        y[3] = p2 * p * odd_p + q2 * q * odd_q + m[5];
    }

    template <class T>
    static __device__ void output_gradient(const T (&dy)[4], T (&e)[6]) {
        const T even_p = dy[0] + p2 * dy[2], odd_p = p * (dy[1] + p2 * dy[3]);
        const T even_q = dy[0] + q2 * dy[2], odd_q = q * (dy[1] + q2 * dy[3]);
        e[0] = dy[0];
        e[1] = even_p + odd_p;
        e[2] = even_p - odd_p;
        e[3] = even_q + odd_q;
        e[4] = even_q - odd_q;
        e[5] = dy[3];
    }

    template <class T>
    static __device__ void weight(const T (&g)[3], T (&u)[6]) {
        const T even_p = at_p * (g[0] + p2 * g[2]), odd_p = at_p * p * g[1];
        const T even_q = at_q * (g[0] + q2 * g[2]), odd_q = at_q * q * g[1];
        u[0] = at_0 * g[0];
        u[1] = even_p + odd_p;
        u[2] = even_p - odd_p;
        u[3] = even_q + odd_q;
        u[4] = even_q - odd_q;
        u[5] = g[2];
    }

    static __device__ void weight_gradient(const acc (&du)[6], acc (&dg)[3]) {
        const acc even_p = at_p * (du[1] + du[2]), odd_p = at_p * p * (du[1] - du[2]);
        const acc even_q = at_q * (du[3] + du[4]), odd_q = at_q * q * (du[3] - du[4]);
        dg[0] = at_0 * du[0] + even_p + even_q;
        dg[1] = odd_p + odd_q;
        dg[2] = p2 * even_p + q2 * even_q + du[5];
    }
};

struct Images {  // of x or y, with all channels
    int height, width, batch;

    __device__ long long channel() const { return (long long)height * width * batch; }
};

// ---- x -> V -----------------------------------------------------------------------------------------------------------

// Of one channel and tile, whose first input is (top, left): the first `images` images of x, its elements in v, which lie
// `element` apart and have room for `padded`.
template <int OUTPUTS, bool WHOLE>
__device__ __forceinline__ void transform_input(const real* __restrict__ x, real* __restrict__ v, long long element,
                                                Images of_x, int images, int padded, int top, int left) {
    const int TILE = Winograd<OUTPUTS>::TILE;
    LANE_LOOP(n, images) {
        compute_in_loop(top), compute_in_loop(left);
        lanes t[TILE][TILE];
        UNROLL for (int j = 0; j < TILE; ++j) {
            lanes d[TILE], column[TILE];
            const real* source = x + ((long long)top * of_x.width + left + j) * of_x.batch + n;
            UNROLL for (int i = 0; i < TILE; ++i, source += (long long)of_x.width * of_x.batch) {
                const bool inside = (unsigned)(top + i) < (unsigned)of_x.height && (unsigned)(left + j) < (unsigned)of_x.width;
                d[i] = inside ? load<WHOLE>(source, images - n) : lanes{};
            }
            Winograd<OUTPUTS>::input(d, column);
            UNROLL for (int i = 0; i < TILE; ++i) t[i][j] = column[i];
        }
        real* out = v + n;
        UNROLL for (int i = 0; i < TILE; ++i) {
            lanes row[TILE];
            Winograd<OUTPUTS>::input(t[i], row);
            UNROLL for (int j = 0; j < TILE; ++j, out += element) store<WHOLE>(out, row[j], padded - n);
        }
    }
}

// V and E: matrices of `rows` rows, of the channels of a group, which lie `pitch` apart; matrices lie `matrix` apart, those of
// all groups after each other for each element.
struct Stack {
    int rows, pitch;
    long long matrix;

    __device__ long long channel(int c) const { return c / rows * matrix + (long long)(c % rows) * pitch; }
    __device__ long long element(int channels) const { return channels / rows * matrix; }
};

template <int OUTPUTS>
__device__ __forceinline__ void transform_inputs(const real* __restrict__ x, real* __restrict__ v, Images of_x, int padded,
                                                 int padding, int tiles_x, int tile_begin, const Stack& of_v) {
    const int c = blockIdx.y, tile = tile_begin + blockIdx.x, batch = of_x.batch;
    const int top = tile / tiles_x * OUTPUTS - padding, left = tile % tiles_x * OUTPUTS - padding;
    const real* channel = x + c * of_x.channel();
    real* out = v + of_v.channel(c) + (long long)blockIdx.x * padded;
    const long long element = of_v.element(gridDim.y);
    if (whole_lanes(batch)) transform_input<OUTPUTS, true>(channel, out, element, of_x, batch, padded, top, left);
    else transform_input<OUTPUTS, false>(channel, out, element, of_x, batch, padded, top, left);
}

// v (elements, groups, matrix), of those tiles of x; pitch >= P. Grid: tiles x channels, so that rows of v are written in their
// order.
extern "C" __global__ void winograd_input(const real* __restrict__ x, real* __restrict__ v, int outputs, int height, int width,
                                          int batch, int padded, int padding, int tiles_x, int tile_begin, int rows, int pitch,
                                          long long matrix) {
    const Images of_x{height, width, batch};
    const Stack of_v{rows, pitch, matrix};
    if (outputs == 4) transform_inputs<4>(x, v, of_x, padded, padding, tiles_x, tile_begin, of_v);
    else transform_inputs<2>(x, v, of_x, padded, padding, tiles_x, tile_begin, of_v);
}

// ---- M -> y, and dy -> E ----------------------------------------------------------------------------------------------

// The outputs of a tile: where they begin, and how many rows and columns of them exist.
struct Outputs {
    long long begin;
    int rows, columns;
};

template <int OUTPUTS>
__device__ __forceinline__ Outputs outputs_of_tile(long long channel, int tile, Images of_y, int tiles_x) {
    const int oy = tile / tiles_x * OUTPUTS, ox = tile % tiles_x * OUTPUTS;
    return {channel * of_y.channel() + ((long long)oy * of_y.width + ox) * of_y.batch,
            of_y.height - oy < OUTPUTS ? of_y.height - oy : OUTPUTS, of_y.width - ox < OUTPUTS ? of_y.width - ox : OUTPUTS};
}

// The first `images` images of one tile's outputs in y, a channel that has this bias, of its elements in m; see transform_input.
template <int OUTPUTS, bool WHOLE, class Stored>
__device__ __forceinline__ void transform_output(const Stored* __restrict__ m, long long element, const Epilogue& epilogue,
                                                 acc bias, real* y, Outputs tile, Images of_y, int images, int padded) {
    const int TILE = Winograd<OUTPUTS>::TILE;
    LANE_LOOP(n, images) {
        compute_in_loop(element), compute_in_loop(of_y.width);
        lanes t[OUTPUTS][TILE];
        UNROLL for (int j = 0; j < TILE; ++j) {
            lanes a[TILE], column[OUTPUTS];
            const Stored* source = m + j * element + n;
            UNROLL for (int i = 0; i < TILE; ++i, source += TILE * element) a[i] = load<WHOLE>(source, padded - n);
            Winograd<OUTPUTS>::output(a, column);
            UNROLL for (int i = 0; i < OUTPUTS; ++i) t[i][j] = column[i];
        }
        UNROLL for (int i = 0; i < OUTPUTS; ++i) {
            if (i >= tile.rows) break;
            lanes row[OUTPUTS];
            Winograd<OUTPUTS>::output(t[i], row);
            real* out = y + tile.begin + (long long)i * of_y.width * of_y.batch + n;
            UNROLL for (int j = 0; j < OUTPUTS; ++j)
                if (j < tile.columns) epilogue.store_result<WHOLE>(out + (long long)j * of_y.batch, row[j], bias, images - n);
        }
    }
}

template <int OUTPUTS>
__device__ __forceinline__ void transform_outputs(const real* __restrict__ m, const Epilogue& epilogue, Images of_y, int padded,
                                                  int tiles_x, int tile_begin) {
    const Outputs tile = outputs_of_tile<OUTPUTS>(blockIdx.y, tile_begin + blockIdx.x, of_y, tiles_x);
    const long long element = (long long)gridDim.x * gridDim.y * padded;
    const real* elements = m + ((long long)blockIdx.y * gridDim.x + blockIdx.x) * padded;
    const acc bias = epilogue.bias_of(blockIdx.y);
    real* y = epilogue.results;
    if (whole_lanes(of_y.batch))
        transform_output<OUTPUTS, true>(elements, element, epilogue, bias, y, tile, of_y, of_y.batch, padded);
    else transform_output<OUTPUTS, false>(elements, element, epilogue, bias, y, tile, of_y, of_y.batch, padded);
}

// m (elements, O, P) -> those tiles of y. Grid: tiles x outputs.
extern "C" __global__ void winograd_output(const real* __restrict__ m, real* y, OPTIONAL const acc* __restrict__ bias,
                                           OPTIONAL const real* plus, int outputs, int height, int width, int batch, int padded,
                                           int tiles_x, int tile_begin) {
    const Images of_y{height, width, batch};
    const Epilogue epilogue{y, bias, plus};
    if (outputs == 4) transform_outputs<4>(m, epilogue, of_y, padded, tiles_x, tile_begin);
    else transform_outputs<2>(m, epilogue, of_y, padded, tiles_x, tile_begin);
}

template <int OUTPUTS, bool WHOLE>
__device__ __forceinline__ void transform_gradient(const real* __restrict__ dy, real* __restrict__ e, Outputs tile, Images of_y,
                                                   int padded, long long element) {
    const int TILE = Winograd<OUTPUTS>::TILE, batch = of_y.batch;
    LANE_LOOP(n, batch) {
        compute_in_loop(element), compute_in_loop(of_y.width);
        lanes t[TILE][OUTPUTS];
        UNROLL for (int j = 0; j < OUTPUTS; ++j) {
            lanes a[OUTPUTS], column[TILE];
            UNROLL for (int i = 0; i < OUTPUTS; ++i) {
                const bool exists = i < tile.rows && j < tile.columns;
                a[i] = exists ? load<WHOLE>(dy + tile.begin + ((long long)i * of_y.width + j) * batch + n, batch - n) : lanes{};
            }
            Winograd<OUTPUTS>::output_gradient(a, column);
            UNROLL for (int i = 0; i < TILE; ++i) t[i][j] = column[i];
        }
        real* out = e + n;
        UNROLL for (int i = 0; i < TILE; ++i) {
            lanes row[TILE];
            Winograd<OUTPUTS>::output_gradient(t[i], row);
            UNROLL for (int j = 0; j < TILE; ++j, out += element) store<WHOLE>(out, row[j], padded - n);
        }
    }
}

template <int OUTPUTS>
__device__ __forceinline__ void transform_gradients(const real* __restrict__ dy, real* __restrict__ e, Images of_y, int padded,
                                                    int tiles_x, int tile_begin, const Stack& of_e) {
    const Outputs tile = outputs_of_tile<OUTPUTS>(blockIdx.y, tile_begin + blockIdx.x, of_y, tiles_x);
    real* out = e + of_e.channel(blockIdx.y) + (long long)blockIdx.x * padded;
    const long long element = of_e.element(gridDim.y);
    if (whole_lanes(of_y.batch)) transform_gradient<OUTPUTS, true>(dy, out, tile, of_y, padded, element);
    else transform_gradient<OUTPUTS, false>(dy, out, tile, of_y, padded, element);
}

// e (elements, groups, matrix), of those tiles of dy; pitch >= P. Grid: tiles x outputs.
extern "C" __global__ void winograd_output_gradient(const real* __restrict__ dy, real* __restrict__ e, int outputs, int height,
                                                    int width, int batch, int padded, int tiles_x, int tile_begin, int rows,
                                                    int pitch, long long matrix) {
    const Images of_y{height, width, batch};
    const Stack of_e{rows, pitch, matrix};
    if (outputs == 4) transform_gradients<4>(dy, e, of_y, padded, tiles_x, tile_begin, of_e);
    else transform_gradients<2>(dy, e, of_y, padded, tiles_x, tile_begin, of_e);
}

// ---- x -> V -> M -> y -------------------------------------------------------------------------------------------------

// One element of M of a tile: m (row_tiles * ROWS, COUNT vectors), of u (row_tiles, C, ROWS) and v (C, COUNT vectors).
template <int COUNT>
__device__ __forceinline__ void multiply_element(const acc* __restrict__ u, const real* __restrict__ v, int depth, int row_tiles,
                                                 acc* __restrict__ m) {
    const int padded = COUNT * VECTOR_COLUMNS;
    for (int tile = 0; tile < row_tiles; ++tile, u += depth * ROWS, m += ROWS * padded) {
        LANE_LOOP(n, VECTOR_COLUMNS) {
            lanes sums[ROWS][COUNT] = {};
            tile_sums(u, v + n, padded, depth, sums);
            UNROLL for (int r = 0; r < ROWS; ++r)
                UNROLL for (int j = 0; j < COUNT; ++j)
                    store<true>(m + r * padded + j * VECTOR_COLUMNS + n, sums[r][j], VECTOR_COLUMNS);
        }
    }
}

struct Group {  // of channels; of one element, V and M of a tile have room for so many numbers
    int sources, results;
    Images of_x, of_y;
    int padding, tiles_x, v_element, m_element;
};

// `count` tiles of one row, from (ty, tx) on, with `images` images. y, and its first_channel, begin with those of the group.
template <int OUTPUTS, bool WHOLE>
__device__ __forceinline__ void convolve_tiles(const real* __restrict__ x, const acc* __restrict__ u, long long u_element,
                                               real* __restrict__ v, acc* __restrict__ m, const Epilogue& epilogue,
                                               long long first_channel, real* y, Group g, int ty, int tx, int count,
                                               int images) {
    const int elements = Winograd<OUTPUTS>::TILE * Winograd<OUTPUTS>::TILE, row_tiles = (g.results + ROWS - 1) / ROWS;
    const int vectors = (images + VECTOR_COLUMNS - 1) / VECTOR_COLUMNS, padded = vectors * VECTOR_COLUMNS;
    for (int i = 0; i < g.sources * count; ++i) {
        const int c = i / count, t = i % count;
        real* its_v = v + (long long)t * elements * g.v_element + c * padded;
        transform_input<OUTPUTS, WHOLE>(x + c * g.of_x.channel(), its_v, g.v_element, g.of_x, images, padded,
                                        ty * OUTPUTS - g.padding, (tx + t) * OUTPUTS - g.padding);
    }
    __syncthreads();
    for (int e = 0; e < elements; ++e)
        for (int t = 0; t < count; ++t) {
            const acc* its_u = u + e * u_element;
            const real* its_v = v + ((long long)t * elements + e) * g.v_element;
            acc* its_m = m + ((long long)t * elements + e) * g.m_element;
            if (vectors == 1) multiply_element<1>(its_u, its_v, g.sources, row_tiles, its_m);
            else if (vectors == 2 || VECTORS == 2) multiply_element<2>(its_u, its_v, g.sources, row_tiles, its_m);
            else multiply_element<VECTORS>(its_u, its_v, g.sources, row_tiles, its_m);
        }
    __syncthreads();
    for (int i = 0; i < g.results * count; ++i) {
        const int result = i / count, t = i % count;
        const Outputs tile = outputs_of_tile<OUTPUTS>(result, ty * g.tiles_x + tx + t, g.of_y, g.tiles_x);
        transform_output<OUTPUTS, WHOLE>(m + (long long)t * elements * g.m_element + result * padded, g.m_element, epilogue,
                                         epilogue.bias_of(first_channel + result), y, tile, g.of_y, images, padded);
    }
}

template <int OUTPUTS>
__device__ __forceinline__ void convolve(const real* __restrict__ x, const acc* __restrict__ u, long long u_element,
                                         real* __restrict__ v, acc* __restrict__ m, const Epilogue& epilogue, const Group& g,
                                         int groups, int strip, int images) {
    const int elements = Winograd<OUTPUTS>::TILE * Winograd<OUTPUTS>::TILE, batch = g.of_x.batch;
    const int tiles_y = (g.of_y.height + OUTPUTS - 1) / OUTPUTS;
    const int strips = (g.tiles_x + strip - 1) / strip, parts = (batch + images - 1) / images;
    const long long steps = (long long)groups * tiles_y * strips * parts;
    const long long u_group = (long long)(g.results + ROWS - 1) / ROWS * ROWS * g.sources;
    real* own_v = v + (long long)blockIdx.x * strip * elements * g.v_element;
    acc* own_m = m + (long long)blockIdx.x * strip * elements * g.m_element;
    for (long long s = steps * blockIdx.x / gridDim.x; s < steps * (blockIdx.x + 1) / gridDim.x; ++s) {
        const int n = s % parts * images, tx = s / parts % strips * strip, ty = s / parts / strips % tiles_y;
        const int count = g.tiles_x - tx < strip ? g.tiles_x - tx : strip, present = batch - n < images ? batch - n : images;
        const long long group = s / parts / strips / tiles_y;
        const real* x_group = x + group * g.sources * g.of_x.channel() + n;
        real* y_group = epilogue.results + group * g.results * g.of_y.channel() + n;
        const acc* its_u = u + group * u_group;
        if (whole_lanes(present))
            convolve_tiles<OUTPUTS, true>(x_group, its_u, u_element, own_v, own_m, epilogue, group * g.results, y_group, g, ty,
                                          tx, count, present);
        else
            convolve_tiles<OUTPUTS, false>(x_group, its_u, u_element, own_v, own_m, epilogue, group * g.results, y_group, g, ty,
                                           tx, count, present);
    }
}

// x -> y, u as winograd_weight writes it, for products on the CPU. A step is up to `strip` tiles of a row of tiles of a group,
// with up to `images` images, PANEL at most; V and M of it never leave the caches, and of each element V of a tile stays in the
// first while U passes. Blocks share the steps, each with its own part of v (blocks, strip, elements, v_element), which has room
// for the sources' images, and m (blocks, strip, elements, m_element), for those of the results in whole tiles of ROWS.
extern "C" __global__ void winograd_conv(const real* __restrict__ x, const acc* __restrict__ u, long long u_element,
                                         real* __restrict__ v, acc* __restrict__ m, real* y,
                                         OPTIONAL const acc* __restrict__ bias, OPTIONAL const real* plus, int outputs,
                                         int groups, int sources, int results, int height, int width, int out_height,
                                         int out_width, int batch, int padding, int strip, int images, int v_element,
                                         int m_element) {
    const Epilogue epilogue{y, bias, plus};
    const int tiles_x = (out_width + outputs - 1) / outputs;
    const Images of_x{height, width, batch}, of_y{out_height, out_width, batch};
    const Group g{sources, results, of_x, of_y, padding, tiles_x, v_element, m_element};
    if (outputs == 4) convolve<4>(x, u, u_element, v, m, epilogue, g, groups, strip, images);
    else convolve<2>(x, u, u_element, v, m, epilogue, g, groups, strip, images);
}

// ---- weight -> U, and dU -> dweight ------------------------------------------------------------------------------------

// A thread takes some pairs of a source and a result at a time, `first` and those behind it in a tile of U: u, whose elements
// lie `element` apart. window(i): of pair i, or 0.
template <int OUTPUTS, class Window>
__device__ __forceinline__ void transform_weights(acc* u, long long element, int first, int pairs, bool adjoint, Window window) {
    const int TILE = Winograd<OUTPUTS>::TILE;
    acc windows[9][LANES];
    for (int i = 0; i < LANES; ++i) {
        const real* g = first + i < pairs ? window(first + i) : 0;
        UNROLL for (int k = 0; k < 9; ++k) windows[k][i] = g ? acc(g[adjoint ? 8 - k : k]) : acc(0);
    }
    lanes t[TILE][3];
    UNROLL for (int x = 0; x < 3; ++x) {
        lanes g[3], column[TILE];
        UNROLL for (int y = 0; y < 3; ++y) g[y] = load<true>(windows[3 * y + x], LANES);
        Winograd<OUTPUTS>::weight(g, column);
        UNROLL for (int i = 0; i < TILE; ++i) t[i][x] = column[i];
    }
    UNROLL for (int i = 0; i < TILE; ++i) {
        lanes row[TILE];
        Winograd<OUTPUTS>::weight(t[i], row);
        UNROLL for (int j = 0; j < TILE; ++j, u += element)
            if (pairs - first >= LANES) store_past_caches(u + first, row[j]);  // U is larger than what it would displace
            else store<false>(u + first, row[j], pairs - first);
    }
}

// u (elements, groups, tiles, sources, rows), the results of a group in tiles of `rows` as in packed_gemm.cu; its elements lie
// `element` apart. For y, sources are a group's inputs and results its outputs; for dx (`adjoint`) the other way round.
// Grid: groups x tiles x parts of their pairs.
extern "C" __global__ void winograd_weight(const real* __restrict__ weight, acc* __restrict__ u, long long element, int outputs,
                                           int groups, int results, int sources, int rows, int adjoint) {
    const int tiles = (results + rows - 1) / rows, pairs = sources * rows, parts = gridDim.x / (groups * tiles);
    const int part = blockIdx.x % parts, tile = blockIdx.x / parts % tiles;
    const long long group = blockIdx.x / parts / tiles;
    const auto window = [=](int pair) -> const real* {
        const long long source = pair / rows, result = tile * rows + pair % rows;
        if (result >= results) return 0;
        const long long transposed = (group * sources + source) * results + result;
        return weight + 9 * (adjoint ? transposed : (group * results + result) * sources + source);
    };
    acc* its_u = u + (group * tiles + tile) * pairs;
    const int length = (pairs + parts - 1) / parts, begin = part * length, end = pairs - begin < length ? pairs : begin + length;
    LANE_LOOP(i, end - begin) {
        if (outputs == 4) transform_weights<4>(its_u, element, begin + i, end, adjoint, window);
        else transform_weights<2>(its_u, element, begin + i, end, adjoint, window);
    }
}

// One window, of elements that lie n apart.
template <int OUTPUTS>
__device__ __forceinline__ void transform_weight_gradient(const acc* du, long long n, acc* dg) {
    const int TILE = Winograd<OUTPUTS>::TILE;
    acc t[3][TILE];
    UNROLL for (int j = 0; j < TILE; ++j) {
        acc a[TILE], column[3];
        UNROLL for (int i = 0; i < TILE; ++i) a[i] = du[(i * TILE + j) * n];
        Winograd<OUTPUTS>::weight_gradient(a, column);
        UNROLL for (int y = 0; y < 3; ++y) t[y][j] = column[y];
    }
    UNROLL for (int y = 0; y < 3; ++y) {
        acc row[3];
        Winograd<OUTPUTS>::weight_gradient(t[y], row);
        UNROLL for (int x = 0; x < 3; ++x) dg[3 * y + x] = row[x];
    }
}

// du (elements, n) -> dweight (n, 3, 3).
extern "C" __global__ void winograd_weight_gradient(const acc* __restrict__ du, acc* __restrict__ dweight, int outputs,
                                                    long long n) {
    GRID_LOOP(i, n) {
        if (outputs == 4) transform_weight_gradient<4>(du + i, n, dweight + 9 * i);
        else transform_weight_gradient<2>(du + i, n, dweight + 9 * i);
    }
}
