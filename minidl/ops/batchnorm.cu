// Batch normalization. Ioffe, Szegedy, "Batch normalization", arXiv 1502.03167.
//
// An activation is a matrix (C, P), P = H*W*N: one contiguous row of P values per channel. Per channel, with m = P:
//
//   mean = sum x / m       var = sum (x - mean)^2 / m  (biased)      rstd = 1 / sqrt(var + eps)
//   xhat = (x - mean) * rstd               y = f(gamma * xhat + beta [+ z])         f: identity or ReLU
//
//   g      = dy * f'                       f' from the sign of y; without z it is recomputed from x
//   dbeta  = sum g                         dgamma = sum g * xhat
//   dx     = gamma * rstd * (g - dbeta / m - xhat * dgamma / m)           dz = g
//
// Evaluation uses the running statistics instead, which do not depend on x: the terms with 1/m vanish.
//
// Sums have two levels: each block takes one tile of one row (grid: tiles x channels), then the tiles of a row are
// combined in their order, one thread a channel. Deviations are taken from the mean of the tile, and tiles are
// combined by Chan's formula, so nothing cancels when |mean| is large beside the deviation.
#include "common.cuh"

__device__ __forceinline__ int tile_begin(int tile) { return blockIdx.x * tile; }
__device__ __forceinline__ int tile_end(int tile, int row) { return row - tile_begin(tile) < tile ? row : tile_begin(tile) + tile; }

// tile_mean, tile_m2 (C, tiles): mean of each tile and its sum of squared deviations from it.
extern "C" __global__ void bn_tile_moments(const real* __restrict__ x, acc* __restrict__ tile_mean, acc* __restrict__ tile_m2,
                                           int row, int tile) {
    const real* x_row = x + (long long)blockIdx.y * row;
    const int begin = tile_begin(tile), end = tile_end(tile, row);
    const acc first = acc(x_row[begin]);  // of the size of the mean: the sum is of deviations, and small
    acc sum = 0;
    BLOCK_LOOP_SUM(i, begin, end, sum) sum += acc(x_row[i]) - first;
    const acc mean = first + block_sum(sum) / (end - begin);
    acc m2 = 0;
    BLOCK_LOOP_SUM(i, begin, end, m2) {
        const acc deviation = acc(x_row[i]) - mean;
        m2 += deviation * deviation;
    }
    m2 = block_sum(m2);
    if (threadIdx.x == 0) {
        const long long index = (long long)blockIdx.y * gridDim.x + blockIdx.x;
        tile_mean[index] = mean;
        tile_m2[index] = m2;
    }
}

// mean, rstd (C) of this batch; running = (1 - momentum) * running + momentum * batch, the variance unbiased.
extern "C" __global__ void bn_combine_moments(const acc* __restrict__ tile_mean, const acc* __restrict__ tile_m2,
                                              acc* __restrict__ mean, acc* __restrict__ rstd, acc* __restrict__ running_mean,
                                              acc* __restrict__ running_var, int channels, int tiles, int row, int tile,
                                              acc eps, acc momentum) {
    GRID_LOOP(c, channels) {
        acc row_mean = tile_mean[c * tiles], m2 = tile_m2[c * tiles], count = row < tile ? row : tile;
        for (int t = 1; t < tiles; ++t) {
            const acc added = row - t * (long long)tile < tile ? row - t * (long long)tile : tile;
            const acc delta = tile_mean[c * tiles + t] - row_mean;
            const acc share = added / (count + added);
            row_mean += delta * share;
            m2 += tile_m2[c * tiles + t] + delta * delta * count * share;
            count += added;
        }
        mean[c] = row_mean;
        rstd[c] = 1 / sqrt(m2 / row + eps);
        running_mean[c] += momentum * (row_mean - running_mean[c]);
        running_var[c] += momentum * (m2 / (row - 1) - running_var[c]);
    }
}

extern "C" __global__ void bn_rstd(const acc* __restrict__ var, acc* __restrict__ rstd, int channels, acc eps) {
    GRID_LOOP(c, channels) rstd[c] = 1 / sqrt(var[c] + eps);
}

// ---- forward: y (C, P). The three variants differ in f and z. -----------------------------------------------------

// gamma * xhat + beta, in one place: the backward recomputes its sign and must get the forward's.
__device__ __forceinline__ acc affine(acc x, acc mean, acc scale, acc beta) { return (x - mean) * scale + beta; }

__device__ __forceinline__ acc relu(acc value) { return value < acc(0) ? acc(0) : value; }

// `z` is read only in the variant that adds it.
template <bool ADDS, bool RECTIFIES>
__device__ __forceinline__ void apply_tile(const real* __restrict__ x, const real* __restrict__ z, const acc* mean,
                                           const acc* rstd, const acc* gamma, const acc* beta, real* __restrict__ y, int row,
                                           int tile) {
    const int c = blockIdx.y, begin = tile_begin(tile), end = tile_end(tile, row);
    const acc center = mean[c], scale = gamma[c] * rstd[c], shift = beta[c];
    const long long start = (long long)c * row;
    const real *x_row = x + start, *z_row = z + start;
    real* y_row = y + start;
    BLOCK_LOOP(i, begin, end) {
        acc value = affine(acc(x_row[i]), center, scale, shift);
        if (ADDS) value += acc(z_row[i]);
        y_row[i] = real(RECTIFIES ? relu(value) : value);
    }
}

extern "C" __global__ void bn_apply(const real* __restrict__ x, const acc* __restrict__ mean, const acc* __restrict__ rstd,
                                    const acc* __restrict__ gamma, const acc* __restrict__ beta, real* __restrict__ y, int row,
                                    int tile) {
    apply_tile<false, false>(x, x, mean, rstd, gamma, beta, y, row, tile);
}

extern "C" __global__ void bn_apply_relu(const real* __restrict__ x, const acc* __restrict__ mean,
                                         const acc* __restrict__ rstd, const acc* __restrict__ gamma,
                                         const acc* __restrict__ beta, real* __restrict__ y, int row, int tile) {
    apply_tile<false, true>(x, x, mean, rstd, gamma, beta, y, row, tile);
}

extern "C" __global__ void bn_apply_add_relu(const real* __restrict__ x, const real* __restrict__ z,
                                             const acc* __restrict__ mean, const acc* __restrict__ rstd,
                                             const acc* __restrict__ gamma, const acc* __restrict__ beta,
                                             real* __restrict__ y, int row, int tile) {
    apply_tile<true, true>(x, z, mean, rstd, gamma, beta, y, row, tile);
}

// ---- backward ------------------------------------------------------------------------------------------------------

// How f' is known: no ReLU; from the sign recomputed from x; from the sign of y.
enum Mask { NONE, FROM_X, FROM_Y };

// g at one position. Where the mask does not need y, or no dz is wanted, another array stands in and is not touched.
template <Mask MASK>
__device__ __forceinline__ acc masked(acc dy, acc x, const real* y_row, int i, acc mean, acc scale, acc beta) {
    if (MASK == FROM_X) return affine(x, mean, scale, beta) > acc(0) ? dy : acc(0);
    if (MASK == FROM_Y) return acc(y_row[i]) > acc(0) ? dy : acc(0);
    return dy;
}

template <Mask MASK>
__device__ __forceinline__ void backward_tile_sums(const real* __restrict__ x, const real* __restrict__ dy,
                                                   const real* __restrict__ y, const acc* mean, const acc* rstd,
                                                   const acc* gamma, const acc* beta, acc* tile_dgamma, acc* tile_dbeta,
                                                   int row, int tile) {
    const int c = blockIdx.y, begin = tile_begin(tile), end = tile_end(tile, row);
    const acc center = mean[c], scale = gamma[c] * rstd[c], shift = beta[c];
    const long long start = (long long)c * row;
    const real *x_row = x + start, *dy_row = dy + start, *y_row = y + start;
    acc sum = 0, sum_deviation = 0;
    BLOCK_LOOP_SUM(i, begin, end, sum, sum_deviation) {
        const acc value = acc(x_row[i]);
        const acc g = masked<MASK>(acc(dy_row[i]), value, y_row, i, center, scale, shift);
        sum += g;
        sum_deviation += g * (value - center);
    }
    sum = block_sum(sum);
    sum_deviation = block_sum(sum_deviation);
    if (threadIdx.x == 0) {
        const long long index = (long long)c * gridDim.x + blockIdx.x;
        tile_dbeta[index] = sum;
        tile_dgamma[index] = sum_deviation * rstd[c];
    }
}

extern "C" __global__ void bn_backward_sums(const real* __restrict__ x, const real* __restrict__ dy,
                                            const acc* __restrict__ mean, const acc* __restrict__ rstd,
                                            const acc* __restrict__ gamma, const acc* __restrict__ beta,
                                            acc* __restrict__ tile_dgamma, acc* __restrict__ tile_dbeta, int row, int tile) {
    backward_tile_sums<NONE>(x, dy, dy, mean, rstd, gamma, beta, tile_dgamma, tile_dbeta, row, tile);
}

extern "C" __global__ void bn_backward_sums_relu(const real* __restrict__ x, const real* __restrict__ dy,
                                                 const acc* __restrict__ mean, const acc* __restrict__ rstd,
                                                 const acc* __restrict__ gamma, const acc* __restrict__ beta,
                                                 acc* __restrict__ tile_dgamma, acc* __restrict__ tile_dbeta, int row,
                                                 int tile) {
    backward_tile_sums<FROM_X>(x, dy, dy, mean, rstd, gamma, beta, tile_dgamma, tile_dbeta, row, tile);
}

extern "C" __global__ void bn_backward_sums_add_relu(const real* __restrict__ x, const real* __restrict__ dy,
                                                     const real* __restrict__ y, const acc* __restrict__ mean,
                                                     const acc* __restrict__ rstd, const acc* __restrict__ gamma,
                                                     const acc* __restrict__ beta, acc* __restrict__ tile_dgamma,
                                                     acc* __restrict__ tile_dbeta, int row, int tile) {
    backward_tile_sums<FROM_Y>(x, dy, y, mean, rstd, gamma, beta, tile_dgamma, tile_dbeta, row, tile);
}

// dgamma, dbeta (C) from their tiles (C, tiles).
extern "C" __global__ void bn_combine_sums(const acc* __restrict__ tile_dgamma, const acc* __restrict__ tile_dbeta,
                                           acc* __restrict__ dgamma, acc* __restrict__ dbeta, int channels, int tiles) {
    GRID_LOOP(c, channels) {
        acc sum_gamma = 0, sum_beta = 0;
        for (int t = 0; t < tiles; ++t) {
            sum_gamma += tile_dgamma[c * tiles + t];
            sum_beta += tile_dbeta[c * tiles + t];
        }
        dgamma[c] = sum_gamma;
        dbeta[c] = sum_beta;
    }
}

// inverse_m: 1/m in training, 0 in evaluation.
template <Mask MASK>
__device__ __forceinline__ void backward_tile_x(const real* __restrict__ x, const real* __restrict__ dy,
                                                const real* __restrict__ y, const acc* mean, const acc* rstd, const acc* gamma,
                                                const acc* beta, const acc* dgamma, const acc* dbeta,
                                                real* __restrict__ dx, real* __restrict__ dz, int row, int tile,
                                                acc inverse_m) {
    const int c = blockIdx.y, begin = tile_begin(tile), end = tile_end(tile, row);
    const acc center = mean[c], scale = gamma[c] * rstd[c], shift = beta[c];
    const acc g_mean = dbeta[c] * inverse_m, slope = rstd[c] * dgamma[c] * inverse_m;
    const long long start = (long long)c * row;
    const real *x_row = x + start, *dy_row = dy + start, *y_row = y + start;
    real *dx_row = dx + start, *dz_row = dz + start;
    BLOCK_LOOP(i, begin, end) {
        const acc value = acc(x_row[i]);
        const acc g = masked<MASK>(acc(dy_row[i]), value, y_row, i, center, scale, shift);
        if (MASK == FROM_Y) dz_row[i] = real(g);
        dx_row[i] = real(scale * (g - g_mean - (value - center) * slope));
    }
}

extern "C" __global__ void bn_backward_x(const real* __restrict__ x, const real* __restrict__ dy,
                                         const acc* __restrict__ mean, const acc* __restrict__ rstd,
                                         const acc* __restrict__ gamma, const acc* __restrict__ beta,
                                         const acc* __restrict__ dgamma, const acc* __restrict__ dbeta,
                                         real* __restrict__ dx, int row, int tile, acc inverse_m) {
    backward_tile_x<NONE>(x, dy, dy, mean, rstd, gamma, beta, dgamma, dbeta, dx, dx, row, tile, inverse_m);
}

extern "C" __global__ void bn_backward_x_relu(const real* __restrict__ x, const real* __restrict__ dy,
                                              const acc* __restrict__ mean, const acc* __restrict__ rstd,
                                              const acc* __restrict__ gamma, const acc* __restrict__ beta,
                                              const acc* __restrict__ dgamma, const acc* __restrict__ dbeta,
                                              real* __restrict__ dx, int row, int tile, acc inverse_m) {
    backward_tile_x<FROM_X>(x, dy, dy, mean, rstd, gamma, beta, dgamma, dbeta, dx, dx, row, tile, inverse_m);
}

extern "C" __global__ void bn_backward_x_add_relu(const real* __restrict__ x, const real* __restrict__ dy,
                                                  const real* __restrict__ y, const acc* __restrict__ mean,
                                                  const acc* __restrict__ rstd, const acc* __restrict__ gamma,
                                                  const acc* __restrict__ beta, const acc* __restrict__ dgamma,
                                                  const acc* __restrict__ dbeta, real* __restrict__ dx,
                                                  real* __restrict__ dz, int row, int tile, acc inverse_m) {
    backward_tile_x<FROM_Y>(x, dy, y, mean, rstd, gamma, beta, dgamma, dbeta, dx, dz, row, tile, inverse_m);
}
