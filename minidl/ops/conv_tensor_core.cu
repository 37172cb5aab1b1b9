// Convolution with 3x3 windows on tensor cores, an implicit matrix product: the products of conv.cu, whose `cols`
// exist only as tiles in shared memory. Chetlur et al., "cuDNN: efficient primitives for deep learning", arXiv 1410.0759.
//
// Per group, of C channels in and O out, K = 9 C rows of cols, P' = H'*W'*N:
//
//   cols[(c, ky, kx), (oy, ox, n)] = x[c, oy*stride - padding + ky, ox*stride - padding + kx, n], 0 outside
//
//   Y (O, P')   = W (O, K) @ cols (K, P')
//   dW (O, K)   = dY (O, P') @ cols (K, P')^T
//   dx          = with stride 1, the same product as Y, of dY, with the turned and transposed weight and the padding
//                 2 - padding
//
// A block multiplies ROWS x COLUMNS of the result, its four warps a quarter each: the larger a warp's part, the less it reads of
// shared memory for each product, and that is what limits such a kernel. Both factors come in chunks of 64 bytes of the sum's
// index, by asynchronous copies of 16 bytes, STAGES - 1 chunks ahead. Since the batch is last, 16 bytes are neighbours in n: a
// filter tap moves the pixel they come from, never their alignment, and padding is asked once for them. So the batch must fill
// them: a multiple of 8, of 4 in float32 (TF32).
//
// For Y the sum goes over CHUNK channels at a time (the last ones filled up with zeros), and over the nine taps of each: a step
// has one tap, so that threads have next to nothing to compute for their copies. The columns of a tile are a box of pixels, all
// with the same `run` of images: the windows of a box overlap, and the first-level cache then gives most of cols.
//
// In shared memory the 16-byte pieces of a row lie permuted, so that the eight rows that a warp reads at once lie in
// different banks.
//
// All kernels but the first need blocks of THREADS threads.
#include "epilogue.cuh"
#include "tensor_core.cuh"

#define THREADS 128
#define COLUMNS 128
#define CHUNK (4 * VECTOR)  // of the sum's index, at a time
#define STAGES 3            // of 128 x 128 tiles fill the 48 KB that a kernel may declare
#define TAPS 9

// The last of the indices that are left in `rest`, which counts to `size`.
__device__ __forceinline__ int take(int& rest, int size) {
    const int index = rest % size;
    rest /= size;
    return index;
}

__device__ __forceinline__ int tiles_of(int size, int tile) { return (size + tile - 1) / tile; }

// packed (groups, row tiles, chunks of sources, taps, rows, CHUNK): the weight as matrix W, in the order in which blocks copy
// it, rounded to factors, what is missing 0. With `adjoint`, for dx: rows are c, sources are o, the windows turned.
// Grid: groups x row tiles x chunks x taps. The number of threads is free.
extern "C" __global__ void conv_tensor_core_pack(const real* __restrict__ weight, real* __restrict__ packed, int group_outputs,
                                                 int group_channels, int rows, int adjoint) {
    const int results = adjoint ? group_channels : group_outputs, sources = adjoint ? group_outputs : group_channels;
    int group = blockIdx.x;
    const int tap = take(group, TAPS), first_source = take(group, tiles_of(sources, CHUNK)) * CHUNK;
    const int first_result = take(group, tiles_of(results, rows)) * rows, place = adjoint ? TAPS - 1 - tap : tap;
    real* tile = packed + (long long)blockIdx.x * rows * CHUNK;
    BLOCK_LOOP(i, 0, rows * CHUNK) {
        const int result = first_result + i / CHUNK, source = first_source + i % CHUNK;
        const int o = adjoint ? source : result, c = adjoint ? result : source;
        const real* window = weight + (((long long)group * group_outputs + o) * group_channels + c) * TAPS;
        tile[i] = result < results && source < sources ? to_factor(window[place]) : real(acc(0));
    }
}

// ---- the product ------------------------------------------------------------------------------------------------------

// Where piece `piece` of a row lies in a tile, of rows of CHUNK or of COLUMNS.
__device__ __forceinline__ int place_in_chunks(int row, int piece) {
    return row * CHUNK + (piece ^ (row / 2 % 4)) * VECTOR;  // two rows fill all banks
}

__device__ __forceinline__ int place_in_columns(int row, int piece) {
    // Each row fills all banks. Of float32, four rows are read at once, two pieces of each.
    return row * COLUMNS + (piece ^ (sizeof(real) == 4 ? row % 4 * 2 : row % 8)) * VECTOR;
}

// A right factor (DEPTH, 16) from rows k.. of a tile (CHUNK, COLUMNS).
template <class Tiles>
__device__ __forceinline__ void load_right(unsigned (&words)[4], Tiles& tiles, int tile, int k, int column) {
    const int lane = threadIdx.x % WARP;
    if constexpr (sizeof(real) == 4) {  // no instruction transposes 32-bit elements: each lane reads its own four
        int places[4];
        UNROLL for (int i = 0; i < 4; ++i) {
            const int row = k + i % 2 * 4 + lane % 4, piece = (column + i / 2 * 8 + lane / 4) / VECTOR;
            places[i] = tile + place_in_columns(row, piece) + lane / 4 % VECTOR;
        }
        load_words(words, tiles, places);
    } else {
        load_columns(words, tiles, tile + place_in_columns(k + lane % 16, column / VECTOR + lane / 16));
    }
}

// sums += the products of `steps` pairs of tiles, left (ROWS, CHUNK) and right (CHUNK, COLUMNS), or, if it lies that way
// (RIGHT_BY_CHUNKS), right (COLUMNS, CHUNK). load(step, left, right) begins the copies of one pair to these places; it is
// called for one step after the other.
template <int ROWS, bool RIGHT_BY_CHUNKS, class Tiles, class Load>
__device__ __forceinline__ void sum_products(float (&sums)[ROWS / 32][COLUMNS / 32][8], Tiles& tiles, int steps, Load& load) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int first_row = warp / 2 * (ROWS / 2), first_column = warp % 2 * (COLUMNS / 2);
    const int stage_size = (ROWS + COLUMNS) * CHUNK;
    const auto next = [](int stage) { return stage == (STAGES - 1) * stage_size ? 0 : stage + stage_size; };
    const auto fetch = [&](int step, int stage) {
        if (step < steps) load(step, stage, stage + ROWS * CHUNK);
        commit_copies();  // one group a step, if an empty one: so the wait below is always for the right one
    };
    for (int step = 0; step < STAGES - 1; ++step) fetch(step, step * stage_size);
    int stage = 0, filled = (STAGES - 1) * stage_size;
    for (int step = 0; step < steps; ++step, stage = next(stage), filled = next(filled)) {
        wait_for_copies<STAGES - 2>();  // this thread's part of the step is there,
        __syncthreads();                // everybody's is, and nobody reads the stage any more that is filled next
        fetch(step + STAGES - 1, filled);
        const int left_tile = stage, right_tile = stage + ROWS * CHUNK;
        UNROLL for (int k = 0; k < CHUNK; k += DEPTH) {
            unsigned left[ROWS / 32][4], right[COLUMNS / 32][4];
            UNROLL for (int m = 0; m < ROWS / 32; ++m)
                load_rows(left[m], tiles, left_tile + place_in_chunks(first_row + 16 * m + lane % 16, k / VECTOR + lane / 16));
            UNROLL for (int n = 0; n < COLUMNS / 32; ++n) {
                const int column = first_column + 16 * n;
                if (RIGHT_BY_CHUNKS)
                    load_rows(right[n], tiles,
                              right_tile + place_in_chunks(column + lane / 16 * 8 + lane % 8, k / VECTOR + lane / 8 % 2));
                else load_right(right[n], tiles, right_tile, k, column);
                UNROLL for (int i = 0; i < 4; ++i) right[n][i] = round_factors(right[n][i]);
            }
            if (RIGHT_BY_CHUNKS)  // else these are packed weights, rounded before
                UNROLL for (int m = 0; m < ROWS / 32; ++m)
                    UNROLL for (int i = 0; i < 4; ++i) left[m][i] = round_factors(left[m][i]);
            multiply_add(sums, left, right);
        }
    }
}

// Calls store(row, column, first, second) for each pair of neighbours in a row of this thread's sums.
template <int ROWS, class Store>
__device__ __forceinline__ void for_each_pair(const float (&sums)[ROWS / 32][COLUMNS / 32][8], const Store& store) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    UNROLL for (int n = 0; n < COLUMNS / 16; ++n)
        UNROLL for (int m = 0; m < ROWS / 16; ++m)
            store(warp / 2 * (ROWS / 2) + 8 * m + lane / 4, warp % 2 * (COLUMNS / 2) + 8 * n + lane % 4 * 2,
                  sums[m / 2][n / 2][n % 2 * 4 + m % 2 * 2], sums[m / 2][n / 2][n % 2 * 4 + m % 2 * 2 + 1]);
}

// ---- y, and dx ----------------------------------------------------------------------------------------------------------

// Grid: groups x boxes of pixels, from top to bottom and from left to right x runs of images x row tiles.
template <int ROWS>
__device__ __forceinline__ void multiply_by_cols(const real* __restrict__ x, const real* __restrict__ packed,
                                                 const Epilogue& epilogue, int group_channels, int height, int width,
                                                 int group_outputs, int out_height, int out_width, int batch, int stride,
                                                 int padding, int run, int box_width) {
    REQUIRE_THREADS(THREADS);
    TILES(tiles, STAGES * (ROWS + COLUMNS) * CHUNK);
    const int box_height = COLUMNS / run / box_width, steps = tiles_of(group_channels, CHUNK) * TAPS;
    int group = blockIdx.x;
    const int row_tiles = tiles_of(group_outputs, ROWS), row_tile = take(group, row_tiles);
    const int first_n = take(group, tiles_of(batch, run)) * run;
    const int first_x = take(group, tiles_of(out_width, box_width)) * box_width;
    const int first_y = take(group, tiles_of(out_height, box_height)) * box_height;

    struct Place {
        int n, x, y;
        bool exists;
    };
    const auto place_of = [=](int column) -> Place {
        const int n = first_n + column % run, x = first_x + column / run % box_width, y = first_y + column / run / box_width;
        return {n, x, y, n < batch && x < out_width && y < out_height};
    };

    // A thread copies the same piece of several rows of cols, channels: one place, of which the taps look at the neighbours.
    const int pieces = COLUMNS / VECTOR, piece = threadIdx.x % pieces, first_row = threadIdx.x / pieces;
    const Place to = place_of(piece * VECTOR);
    const int top = to.y * stride - padding, left = to.x * stride - padding;
    int seen = 0;  // bit `tap`: whether what it looks at is inside
    UNROLL for (int tap = 0; tap < TAPS; ++tap) {
        const bool inside = top + tap / 3 >= 0 && top + tap / 3 < height && left + tap % 3 >= 0 && left + tap % 3 < width;
        seen |= (to.exists && inside) << tap;
    }
    const long long plane = (long long)height * width * batch;
    const real* images = x + group * group_channels * plane;
    const long long window = ((long long)top * width + left) * batch + to.n + first_row * plane;
    const real* weights = packed + ((long long)group * row_tiles + row_tile) * steps * ROWS * CHUNK + threadIdx.x * VECTOR;
    const auto load = [&](int step, int left_tile, int right_tile) {
        UNROLL for (int i = 0; i < ROWS * CHUNK / VECTOR / THREADS; ++i) {
            const int number = threadIdx.x + i * THREADS;
            copy_async(tiles, left_tile + place_in_chunks(number / (CHUNK / VECTOR), number % (CHUNK / VECTOR)),
                       weights + (long long)step * ROWS * CHUNK + i * THREADS * VECTOR, true);
        }
        const int tap = step % TAPS, first_c = step / TAPS * CHUNK;
        const long long source = window + first_c * plane + (tap / 3 * width + tap % 3) * (long long)batch;
        UNROLL for (int i = 0; i < CHUNK * pieces / THREADS; ++i) {
            const int row = i * (THREADS / pieces);
            const bool exists = seen >> tap & 1 && first_c + first_row + row < group_channels;
            copy_async(tiles, right_tile + place_in_columns(first_row + row, piece),
                       exists ? images + (source + row * plane) : images, exists);
        }
    };
    float sums[ROWS / 32][COLUMNS / 32][8] = {};
    sum_products<ROWS, false>(sums, tiles, steps, load);

    for_each_pair<ROWS>(sums, [&](int row, int column, float first, float second) {
        const Place at = place_of(column);
        const int o = row_tile * ROWS + row;
        if (!at.exists || o >= group_outputs) return;
        const long long channel = (long long)group * group_outputs + o;
        const long long place = ((channel * out_height + at.y) * out_width + at.x) * batch + at.n;
        const float bias = epilogue.bias_of(channel);
        const Pair plus = epilogue.plus ? load_pair(epilogue.plus + place) : Pair{};
        store_pair(epilogue.results + place, first + bias + float(plus.first), second + bias + float(plus.second));
    });
}

extern "C" __launch_bounds__(THREADS, 3) __global__
void conv_tensor_core_forward_64(const real* __restrict__ x, const real* __restrict__ packed, real* y,
                                 OPTIONAL const acc* __restrict__ bias, OPTIONAL const real* plus, int group_channels, int height,
                                 int width, int group_outputs, int out_height, int out_width, int batch, int stride, int padding,
                                 int run, int box_width) {
    multiply_by_cols<64>(x, packed, {y, bias, plus}, group_channels, height, width, group_outputs, out_height, out_width, batch,
                         stride, padding, run, box_width);
}

extern "C" __launch_bounds__(THREADS, 2) __global__
void conv_tensor_core_forward_128(const real* __restrict__ x, const real* __restrict__ packed, real* y,
                                  OPTIONAL const acc* __restrict__ bias, OPTIONAL const real* plus, int group_channels,
                                  int height, int width, int group_outputs, int out_height, int out_width, int batch,
                                  int stride, int padding, int run, int box_width) {
    multiply_by_cols<128>(x, packed, {y, bias, plus}, group_channels, height, width, group_outputs, out_height, out_width,
                          batch, stride, padding, run, box_width);
}

// ---- dweight --------------------------------------------------------------------------------------------------------------

// The sum over one of several parts of the P' columns, `steps` chunks long: tile_dweight (parts, O of all groups, C, 3, 3).
// sum_parts.cu adds up the parts, in their order. Grid: parts x groups x tiles of K x row tiles.
template <int ROWS>
__device__ __forceinline__ void multiply_by_cols_transposed(const real* __restrict__ dy, const real* __restrict__ x,
                                                            acc* __restrict__ tile_dweight, int groups, int group_channels,
                                                            int height, int width, int group_outputs, int out_height,
                                                            int out_width, int batch, int stride, int padding, int steps) {
    REQUIRE_THREADS(THREADS);
    TILES(tiles, STAGES * (ROWS + COLUMNS) * CHUNK);
    const int depth = group_channels * TAPS, positions = out_height * out_width * batch;
    int part = blockIdx.x;
    const int first_o = take(part, tiles_of(group_outputs, ROWS)) * ROWS;
    const int first_k = take(part, tiles_of(depth, COLUMNS)) * COLUMNS;
    const int group = take(part, groups), first_step = part * steps;
    const int all_steps = tiles_of(positions, CHUNK), rest = all_steps - first_step;

    // A thread copies the same piece of several rows of dY and of cols: one position (oy, ox, n), which moves on by a chunk
    // from step to step.
    const int pieces = CHUNK / VECTOR, piece = threadIdx.x % pieces, first_row = threadIdx.x / pieces;
    int position = first_step * CHUNK + piece * VECTOR;
    int n = position % batch, ox = position / batch % out_width, oy = position / batch / out_width;
    const real* images = x + (long long)group * group_channels * height * width * batch;
    const real* gradients = dy + ((long long)group * group_outputs + first_o) * positions;
    // What each of its rows of cols looks at: a neighbour of the position, in a channel.
    const int cols_rows = COLUMNS * pieces / THREADS;
    int tap_y[cols_rows], tap_x[cols_rows];
    long long tap_place[cols_rows];
    UNROLL for (int i = 0; i < cols_rows; ++i) {
        const int k = first_k + first_row + i * (THREADS / pieces);
        tap_y[i] = k < depth ? k / 3 % 3 - padding : height;  // beyond the last row: outside of every image
        tap_x[i] = k % 3 - padding;
        tap_place[i] = (((long long)(k / TAPS) * height + tap_y[i]) * width + tap_x[i]) * batch;
    }
    const auto load = [&](int, int left_tile, int right_tile) {
        const bool inside = position < positions;
        UNROLL for (int i = 0; i < ROWS * pieces / THREADS; ++i) {
            const int row = first_row + i * (THREADS / pieces);
            const bool exists = inside && first_o + row < group_outputs;
            copy_async(tiles, left_tile + place_in_chunks(row, piece),
                       exists ? gradients + ((long long)row * positions + position) : gradients, exists);
        }
        const int place = (oy * width + ox) * stride * batch + n;
        UNROLL for (int i = 0; i < cols_rows; ++i) {
            const int iy = oy * stride + tap_y[i], ix = ox * stride + tap_x[i];
            const bool exists = inside && iy >= 0 && iy < height && ix >= 0 && ix < width;
            copy_async(tiles, right_tile + place_in_chunks(first_row + i * (THREADS / pieces), piece),
                       exists ? images + (tap_place[i] + place) : images, exists);
        }
        position += CHUNK;
        n += CHUNK;
        while (n >= batch) {  // a small batch is several pixels a chunk
            n -= batch;
            if (++ox == out_width) ox = 0, ++oy;
        }
    };
    float sums[ROWS / 32][COLUMNS / 32][8] = {};
    sum_products<ROWS, true>(sums, tiles, rest < steps ? rest : steps, load);

    for_each_pair<ROWS>(sums, [&](int row, int column, float first, float second) {
        const int o = first_o + row, k = first_k + column;
        if (o >= group_outputs) return;
        acc* out = tile_dweight + (((long long)part * groups + group) * group_outputs + o) * depth;
        if (k < depth) out[k] = first;
        if (k + 1 < depth) out[k + 1] = second;
    });
}

extern "C" __launch_bounds__(THREADS, 3) __global__
void conv_tensor_core_dweight_64(const real* __restrict__ dy, const real* __restrict__ x, acc* __restrict__ tile_dweight,
                                 int groups, int group_channels, int height, int width, int group_outputs, int out_height,
                                 int out_width, int batch, int stride, int padding, int steps) {
    multiply_by_cols_transposed<64>(dy, x, tile_dweight, groups, group_channels, height, width, group_outputs, out_height,
                                    out_width, batch, stride, padding, steps);
}

extern "C" __launch_bounds__(THREADS, 2) __global__
void conv_tensor_core_dweight_128(const real* __restrict__ dy, const real* __restrict__ x, acc* __restrict__ tile_dweight,
                                  int groups, int group_channels, int height, int width, int group_outputs, int out_height,
                                  int out_width, int batch, int stride, int padding, int steps) {
    multiply_by_cols_transposed<128>(dy, x, tile_dweight, groups, group_channels, height, width, group_outputs, out_height,
                                     out_width, batch, stride, padding, steps);
}
