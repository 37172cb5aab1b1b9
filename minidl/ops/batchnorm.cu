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
// Sums have two levels: over a tile of a row, then over the row's tiles in their order. Deviations are taken from the mean
// of the tile, and tiles are combined by Chan's formula, so nothing cancels when |mean| is large beside the deviation.
//
// Two ways to equal results, bit for bit. Either a block takes a group of whole channels and goes over their rows twice
// (bn_forward*, bn_backward*; Grid: groups): what fits a cache comes from memory once. Or a block takes a tile (Grid: tiles x
// channels): a first kernel sums each (bn_tile_moments, bn_backward_sums*), and in the second, each block combines the tiles of
// its row for itself (bn_normalize*, bn_backward_x*), which spares a GPU a launch between them.
#include "rows.cuh"

#define TILES_FETCHED 128  // at a time, of a row

// The row of a channel in a tensor (C, row).
template <class T>
__device__ __forceinline__ T* row_of(T* tensor, int c, int row) { return tensor + (long long)c * row; }

__device__ __forceinline__ int group_begin(int group) { return blockIdx.x * group; }
__device__ __forceinline__ int group_end(int group, int channels) {
    return channels - group_begin(group) < group ? channels : group_begin(group) + group;
}

__device__ __forceinline__ int tiles_of(int row, int tile) { return row / tile + (row % tile != 0); }
__device__ __forceinline__ int tile_end(int t, int row, int tile) { return row - t * tile < tile ? row : t * tile + tile; }

// ---- statistics ----------------------------------------------------------------------------------------------------

struct Moments {
    acc mean, m2, count;  // m2: the sum of squared deviations from the mean
};

__device__ __forceinline__ Moments tile_moments(const real* x_row, int t, int row, int tile) {
    const int begin = t * tile, end = tile_end(t, row, tile);
    const acc first = acc(x_row[begin]);  // of the size of the mean: the sum is of deviations, and small
    acc sum[1], m2[1];
    sum_over(sum, begin, end, [=](auto& sums, auto value) { sums[0] += value - first; }, x_row);
    const acc mean = first + sum[0] / (end - begin);
    sum_over(m2, begin, end, [=](auto& sums, auto value) { sums[0] += (value - mean) * (value - mean); }, x_row);
    return {mean, m2[0], acc(end - begin)};
}

// Chan's formula. Where a product is added, fma says so: compilers would contract it to one rounding here and not there.
__device__ __forceinline__ void combine(Moments& sum, Moments tile) {
    const acc delta = tile.mean - sum.mean, count = sum.count + tile.count, share = tile.count / count;
    sum.mean = fma(delta, share, sum.mean);
    sum.m2 = fma(delta * sum.count * share, delta, sum.m2 + tile.m2);
    sum.count = count;
}

// Thread 0 gets add(t, first, second) of all tiles of a channel, in their order; the others help to fetch what it needs.
template <class Add>
__device__ __forceinline__ void for_each_tile(const acc* first_of_tile, const acc* second_of_tile, int tiles, Add add) {
    SHARED(acc, first, TILES_FETCHED);
    SHARED(acc, second, TILES_FETCHED);
    for (int begin = 0; begin < tiles; begin += TILES_FETCHED) {
        const int count = tiles - begin < TILES_FETCHED ? tiles - begin : TILES_FETCHED;
        BLOCK_LOOP(i, 0, count) {
            first[i] = first_of_tile[begin + i];
            second[i] = second_of_tile[begin + i];
        }
        __syncthreads();
        for (int i = 0; threadIdx.x == 0 && i < count; ++i) add(begin + i, first[i], second[i]);
        __syncthreads();
    }
}

__device__ __forceinline__ acc rstd_of(acc var, acc eps) { return 1 / sqrt(var + eps); }

// running = (1 - momentum) * running + momentum * batch, the variance unbiased.
__device__ __forceinline__ void move_running(acc& running_mean, acc& running_var, Moments batch, int row, acc momentum) {
    running_mean += momentum * (batch.mean - running_mean);
    running_var += momentum * (batch.m2 / (row - 1) - running_var);
}

// tile_mean, tile_m2 (C, tiles): mean of each tile and its sum of squared deviations from it.
extern "C" __global__ void bn_tile_moments(const real* __restrict__ x, acc* __restrict__ tile_mean, acc* __restrict__ tile_m2,
                                           int row, int tile) {
    const Moments moments = tile_moments(row_of(x, blockIdx.y, row), blockIdx.x, row, tile);
    if (threadIdx.x == 0) {
        const long long index = (long long)blockIdx.y * gridDim.x + blockIdx.x;
        tile_mean[index] = moments.mean;
        tile_m2[index] = moments.m2;
    }
}

// ---- forward: y (C, P). The three variants differ in f and z. -----------------------------------------------------

struct Channel {
    acc mean, rstd, scale, beta;  // scale: gamma * rstd
};

__device__ __forceinline__ Channel channel_of(acc mean, acc rstd, acc gamma, acc beta) { return {mean, rstd, gamma * rstd, beta}; }

// gamma * xhat + beta, of acc or lanes, in one place: the backward recomputes its sign and must get the forward's.
template <class T>
__device__ __forceinline__ T affine(T x, Channel channel) {
    return (x - channel.mean) * channel.scale + channel.beta;
}

template <class T>
__device__ __forceinline__ T relu(T value) { return value < T{} ? T{} : value; }

// `z` is read only in the variant that adds it.
template <bool ADDS, bool RECTIFIES>
__device__ __forceinline__ void apply_tile(const real* x, const real* z, Channel channel, real* y, int channels, int c, int t,
                                           int row, int tile) {
    const long long total = (long long)channels * row;
    const real *x_row = row_of(x, c, row), *z_row = row_of(z, c, row);
    real* y_row = row_of(y, c, row);
    map_over({y_row}, of_block(t * tile, tile_end(t, row, tile), total), [=](auto& y, auto x, auto z) {
        const auto value = affine(x, channel);
        const auto sum = ADDS ? value + z : value;
        y[0] = RECTIFIES ? relu(sum) : sum;
    }, x_row, z_row);
}

template <bool RECTIFIES>
__device__ __forceinline__ void apply(const real* x, const acc* mean, const acc* rstd, const acc* gamma, const acc* beta,
                                      real* y, int row, int tile) {
    const int c = blockIdx.y;
    const Channel channel = channel_of(mean[c], rstd[c], gamma[c], beta[c]);
    apply_tile<false, RECTIFIES>(x, x, channel, y, gridDim.y, c, blockIdx.x, row, tile);
}

// The same y again, from its mean and rstd. Grid: tiles x channels.
extern "C" __global__ void bn_apply(const real* __restrict__ x, const acc* __restrict__ mean, const acc* __restrict__ rstd,
                                    const acc* __restrict__ gamma, const acc* __restrict__ beta, real* __restrict__ y, int row,
                                    int tile) {
    apply<false>(x, mean, rstd, gamma, beta, y, row, tile);
}

extern "C" __global__ void bn_apply_relu(const real* __restrict__ x, const acc* __restrict__ mean,
                                         const acc* __restrict__ rstd, const acc* __restrict__ gamma,
                                         const acc* __restrict__ beta, real* __restrict__ y, int row, int tile) {
    apply<true>(x, mean, rstd, gamma, beta, y, row, tile);
}

// In evaluation, there are no moments of tiles.
template <bool ADDS, bool RECTIFIES>
__device__ __forceinline__ void normalize(const real* x, const real* z, const acc* tile_mean, const acc* tile_m2,
                                          const acc* gamma, const acc* beta, real* y, acc* mean, acc* rstd, acc* running_mean,
                                          acc* running_var, int row, int tile, acc eps, acc momentum) {
    SHARED(acc, statistics, 2);  // mean, rstd
    const int c = blockIdx.y, tiles = gridDim.x;
    Moments batch = {};
    if (tile_mean)
        for_each_tile(tile_mean + (long long)c * tiles, tile_m2 + (long long)c * tiles, tiles, [&](int t, acc mean, acc m2) {
            combine(batch, {mean, m2, acc(tile_end(t, row, tile) - t * tile)});
        });
    if (threadIdx.x == 0) {
        statistics[0] = tile_mean ? batch.mean : running_mean[c];
        statistics[1] = rstd_of(tile_mean ? batch.m2 / row : running_var[c], eps);
        if (blockIdx.x == 0) {
            mean[c] = statistics[0];
            rstd[c] = statistics[1];
            if (tile_mean) move_running(running_mean[c], running_var[c], batch, row, momentum);
        }
    }
    __syncthreads();
    const Channel channel = channel_of(statistics[0], statistics[1], gamma[c], beta[c]);
    apply_tile<ADDS, RECTIFIES>(x, z, channel, y, gridDim.y, c, blockIdx.x, row, tile);
}

// y; mean, rstd (C) of this batch; the running statistics move.
extern "C" __global__ void bn_normalize(const real* __restrict__ x, OPTIONAL const acc* __restrict__ tile_mean,
                                        OPTIONAL const acc* __restrict__ tile_m2, const acc* __restrict__ gamma,
                                        const acc* __restrict__ beta, real* __restrict__ y, acc* __restrict__ mean,
                                        acc* __restrict__ rstd, acc* __restrict__ running_mean, acc* __restrict__ running_var,
                                        int row, int tile, acc eps, acc momentum) {
    normalize<false, false>(x, x, tile_mean, tile_m2, gamma, beta, y, mean, rstd, running_mean, running_var, row, tile, eps,
                            momentum);
}

extern "C" __global__ void bn_normalize_relu(const real* __restrict__ x, OPTIONAL const acc* __restrict__ tile_mean,
                                             OPTIONAL const acc* __restrict__ tile_m2, const acc* __restrict__ gamma,
                                             const acc* __restrict__ beta, real* __restrict__ y, acc* __restrict__ mean,
                                             acc* __restrict__ rstd, acc* __restrict__ running_mean,
                                             acc* __restrict__ running_var, int row, int tile, acc eps, acc momentum) {
    normalize<false, true>(x, x, tile_mean, tile_m2, gamma, beta, y, mean, rstd, running_mean, running_var, row, tile, eps,
                           momentum);
}

extern "C" __global__ void bn_normalize_add_relu(const real* __restrict__ x, const real* __restrict__ z,
                                                 OPTIONAL const acc* __restrict__ tile_mean,
                                                 OPTIONAL const acc* __restrict__ tile_m2, const acc* __restrict__ gamma,
                                                 const acc* __restrict__ beta, real* __restrict__ y, acc* __restrict__ mean,
                                                 acc* __restrict__ rstd, acc* __restrict__ running_mean,
                                                 acc* __restrict__ running_var, int row, int tile, acc eps, acc momentum) {
    normalize<true, true>(x, z, tile_mean, tile_m2, gamma, beta, y, mean, rstd, running_mean, running_var, row, tile, eps,
                          momentum);
}

// Statistics of all rows of a group, then all results: long streams through memory, where rows are short.
template <bool ADDS, bool RECTIFIES>
__device__ __forceinline__ void forward(const real* x, const real* z, const acc* gamma, const acc* beta, real* y, acc* mean,
                                        acc* rstd, acc* running_mean, acc* running_var, int channels, int group, int row,
                                        int tile, int training, acc eps, acc momentum) {
    const int begin = group_begin(group), end = group_end(group, channels), tiles = tiles_of(row, tile);
    for (int c = begin; c < end; ++c) {
        Moments batch = {};
        for (int t = 0; training && t < tiles; ++t) combine(batch, tile_moments(row_of(x, c, row), t, row, tile));
        if (threadIdx.x == 0) {
            mean[c] = training ? batch.mean : running_mean[c];
            rstd[c] = rstd_of(training ? batch.m2 / row : running_var[c], eps);
            if (training) move_running(running_mean[c], running_var[c], batch, row, momentum);
        }
    }
    __syncthreads();
    for (int c = begin; c < end; ++c) {
        const Channel channel = channel_of(mean[c], rstd[c], gamma[c], beta[c]);
        for (int t = 0; t < tiles; ++t) apply_tile<ADDS, RECTIFIES>(x, z, channel, y, channels, c, t, row, tile);
    }
}

extern "C" __global__ void bn_forward(const real* __restrict__ x, const acc* __restrict__ gamma, const acc* __restrict__ beta,
                                      real* __restrict__ y, acc* __restrict__ mean, acc* __restrict__ rstd,
                                      acc* __restrict__ running_mean, acc* __restrict__ running_var, int channels, int group,
                                      int row, int tile, int training, acc eps, acc momentum) {
    forward<false, false>(x, x, gamma, beta, y, mean, rstd, running_mean, running_var, channels, group, row, tile, training,
                          eps, momentum);
}

extern "C" __global__ void bn_forward_relu(const real* __restrict__ x, const acc* __restrict__ gamma,
                                           const acc* __restrict__ beta, real* __restrict__ y, acc* __restrict__ mean,
                                           acc* __restrict__ rstd, acc* __restrict__ running_mean,
                                           acc* __restrict__ running_var, int channels, int group, int row, int tile,
                                           int training, acc eps, acc momentum) {
    forward<false, true>(x, x, gamma, beta, y, mean, rstd, running_mean, running_var, channels, group, row, tile, training,
                         eps, momentum);
}

extern "C" __global__ void bn_forward_add_relu(const real* __restrict__ x, const real* __restrict__ z,
                                               const acc* __restrict__ gamma, const acc* __restrict__ beta,
                                               real* __restrict__ y, acc* __restrict__ mean, acc* __restrict__ rstd,
                                               acc* __restrict__ running_mean, acc* __restrict__ running_var, int channels,
                                               int group, int row, int tile, int training, acc eps, acc momentum) {
    forward<true, true>(x, z, gamma, beta, y, mean, rstd, running_mean, running_var, channels, group, row, tile, training,
                        eps, momentum);
}

// ---- backward ------------------------------------------------------------------------------------------------------

// How f' is known: no ReLU; from the sign recomputed from x; from the sign of y.
enum Mask { NONE, FROM_X, FROM_Y };

// g, of acc or lanes. Where the mask does not need y, or no dz is wanted, another array stands in.
template <Mask MASK, class T>
__device__ __forceinline__ T masked(T dy, T x, T y, Channel channel) {
    if (MASK == FROM_X) return affine(x, channel) > T{} ? dy : T{};
    if (MASK == FROM_Y) return y > T{} ? dy : T{};
    return dy;
}

struct Sums {
    acc g, deviation;  // of g, and of g * (x - mean)
};

__device__ __forceinline__ void combine(Sums& sum, Sums tile) {
    sum.g += tile.g;
    sum.deviation += tile.deviation;
}

template <Mask MASK>
__device__ __forceinline__ Sums tile_sums(const real* x, const real* dy, const real* y, Channel channel, int c, int t, int row,
                                          int tile) {
    acc sums[2];
    sum_over(sums, t * tile, tile_end(t, row, tile), [=](auto& sums, auto x, auto dy, auto y) {
        const auto g = masked<MASK>(dy, x, y, channel);
        sums[0] += g;
        sums[1] += g * (x - channel.mean);
    }, row_of(x, c, row), row_of(dy, c, row), row_of(y, c, row));
    return {sums[0], sums[1]};
}

template <Mask MASK>
__device__ __forceinline__ void backward_sums(const real* x, const real* dy, const real* y, const acc* mean, const acc* rstd,
                                              const acc* gamma, const acc* beta, acc* tile_deviation, acc* tile_g, int row,
                                              int tile) {
    const int c = blockIdx.y;
    const Channel channel = channel_of(mean[c], rstd[c], gamma[c], beta[c]);
    const Sums sums = tile_sums<MASK>(x, dy, y, channel, c, blockIdx.x, row, tile);
    if (threadIdx.x == 0) {
        const long long index = (long long)c * gridDim.x + blockIdx.x;
        tile_deviation[index] = sums.deviation;
        tile_g[index] = sums.g;
    }
}

extern "C" __global__ void bn_backward_sums(const real* __restrict__ x, const real* __restrict__ dy,
                                            const acc* __restrict__ mean, const acc* __restrict__ rstd,
                                            const acc* __restrict__ gamma, const acc* __restrict__ beta,
                                            acc* __restrict__ tile_deviation, acc* __restrict__ tile_g, int row, int tile) {
    backward_sums<NONE>(x, dy, dy, mean, rstd, gamma, beta, tile_deviation, tile_g, row, tile);
}

extern "C" __global__ void bn_backward_sums_relu(const real* __restrict__ x, const real* __restrict__ dy,
                                                 const acc* __restrict__ mean, const acc* __restrict__ rstd,
                                                 const acc* __restrict__ gamma, const acc* __restrict__ beta,
                                                 acc* __restrict__ tile_deviation, acc* __restrict__ tile_g, int row,
                                                 int tile) {
    backward_sums<FROM_X>(x, dy, dy, mean, rstd, gamma, beta, tile_deviation, tile_g, row, tile);
}

extern "C" __global__ void bn_backward_sums_add_relu(const real* __restrict__ x, const real* __restrict__ dy,
                                                     const real* __restrict__ y, const acc* __restrict__ mean,
                                                     const acc* __restrict__ rstd, const acc* __restrict__ gamma,
                                                     const acc* __restrict__ beta, acc* __restrict__ tile_deviation,
                                                     acc* __restrict__ tile_g, int row, int tile) {
    backward_sums<FROM_Y>(x, dy, y, mean, rstd, gamma, beta, tile_deviation, tile_g, row, tile);
}

// inverse_m: 1/m in training, 0 in evaluation. plus: what is added to dx, or 0.
template <Mask MASK>
__device__ __forceinline__ void tile_dx(const real* x, const real* dy, const real* y, const real* plus, Channel channel,
                                        acc dgamma, acc dbeta, real* dx, real* dz, int c, int t, int row, int tile,
                                        acc inverse_m) {
    const acc g_mean = dbeta * inverse_m, slope = channel.rstd * dgamma * inverse_m;
    const real *x_row = row_of(x, c, row), *dy_row = row_of(dy, c, row), *y_row = row_of(y, c, row);
    const auto dx_and_g = [=](auto& results, auto x, auto dy, auto y) {
        const auto g = masked<MASK>(dy, x, y, channel);
        results[0] = channel.scale * (g - g_mean - (x - channel.mean) * slope);
        if (MASK == FROM_Y) results[1] = g;
    };
    const auto positions = of_block(t * tile, tile_end(t, row, tile));
    real *dx_row = row_of(dx, c, row), *dz_row = row_of(dz, c, row);
    if constexpr (MASK == FROM_Y) map_over({dx_row, dz_row}, positions, dx_and_g, x_row, dy_row, y_row);
    else if (!plus) map_over({dx_row}, positions, dx_and_g, x_row, dy_row, y_row);
    else map_over({dx_row}, positions, [=](auto& dx, auto x, auto dy, auto plus) {
        dx_and_g(dx, x, dy, dy);
        dx[0] += plus;
    }, x_row, dy_row, row_of(plus, c, row));
}

template <Mask MASK>
__device__ __forceinline__ void backward_x(const real* x, const real* dy, const real* y, const real* plus, const acc* mean,
                                           const acc* rstd, const acc* gamma, const acc* beta, const acc* tile_deviation,
                                           const acc* tile_g, acc* dgamma, acc* dbeta, real* dx, real* dz, int row, int tile,
                                           acc inverse_m) {
    SHARED(acc, gradients, 2);  // dgamma, dbeta
    const int c = blockIdx.y, tiles = gridDim.x;
    Sums sums = {};
    for_each_tile(tile_deviation + (long long)c * tiles, tile_g + (long long)c * tiles, tiles,
                  [&](int, acc deviation, acc g) { combine(sums, {g, deviation}); });
    if (threadIdx.x == 0) {
        gradients[0] = sums.deviation * rstd[c];
        gradients[1] = sums.g;
        if (blockIdx.x == 0) {
            dgamma[c] = gradients[0];
            dbeta[c] = gradients[1];
        }
    }
    __syncthreads();
    const Channel channel = channel_of(mean[c], rstd[c], gamma[c], beta[c]);
    tile_dx<MASK>(x, dy, y, plus, channel, gradients[0], gradients[1], dx, dz, c, blockIdx.x, row, tile, inverse_m);
}

// dgamma, dbeta (C) from the sums over tiles (C, tiles); dx.
extern "C" __global__ void bn_backward_x(const real* __restrict__ x, const real* __restrict__ dy,
                                         OPTIONAL const real* __restrict__ plus, const acc* __restrict__ mean,
                                         const acc* __restrict__ rstd, const acc* __restrict__ gamma,
                                         const acc* __restrict__ beta, const acc* __restrict__ tile_deviation,
                                         const acc* __restrict__ tile_g, acc* __restrict__ dgamma, acc* __restrict__ dbeta,
                                         real* __restrict__ dx, int row, int tile, acc inverse_m) {
    backward_x<NONE>(x, dy, dy, plus, mean, rstd, gamma, beta, tile_deviation, tile_g, dgamma, dbeta, dx, dx, row, tile,
                     inverse_m);
}

extern "C" __global__ void bn_backward_x_relu(const real* __restrict__ x, const real* __restrict__ dy,
                                              OPTIONAL const real* __restrict__ plus, const acc* __restrict__ mean,
                                              const acc* __restrict__ rstd, const acc* __restrict__ gamma,
                                              const acc* __restrict__ beta, const acc* __restrict__ tile_deviation,
                                              const acc* __restrict__ tile_g, acc* __restrict__ dgamma,
                                              acc* __restrict__ dbeta, real* __restrict__ dx, int row, int tile,
                                              acc inverse_m) {
    backward_x<FROM_X>(x, dy, dy, plus, mean, rstd, gamma, beta, tile_deviation, tile_g, dgamma, dbeta, dx, dx, row, tile,
                       inverse_m);
}

extern "C" __global__ void bn_backward_x_add_relu(const real* __restrict__ x, const real* __restrict__ dy,
                                                  const real* __restrict__ y, const acc* __restrict__ mean,
                                                  const acc* __restrict__ rstd, const acc* __restrict__ gamma,
                                                  const acc* __restrict__ beta, const acc* __restrict__ tile_deviation,
                                                  const acc* __restrict__ tile_g, acc* __restrict__ dgamma,
                                                  acc* __restrict__ dbeta, real* __restrict__ dx, real* __restrict__ dz,
                                                  int row, int tile, acc inverse_m) {
    backward_x<FROM_Y>(x, dy, y, 0, mean, rstd, gamma, beta, tile_deviation, tile_g, dgamma, dbeta, dx, dz, row, tile,
                       inverse_m);
}

template <Mask MASK>
__device__ __forceinline__ void backward(const real* x, const real* dy, const real* y, const real* plus, const acc* mean,
                                         const acc* rstd, const acc* gamma, const acc* beta, acc* dgamma, acc* dbeta,
                                         real* dx, real* dz, int channels, int group, int row, int tile, acc inverse_m) {
    const int begin = group_begin(group), end = group_end(group, channels), tiles = tiles_of(row, tile);
    for (int c = begin; c < end; ++c) {
        const Channel channel = channel_of(mean[c], rstd[c], gamma[c], beta[c]);
        Sums sums = {};
        for (int t = 0; t < tiles; ++t) combine(sums, tile_sums<MASK>(x, dy, y, channel, c, t, row, tile));
        if (threadIdx.x == 0) {
            dgamma[c] = sums.deviation * rstd[c];
            dbeta[c] = sums.g;
        }
    }
    __syncthreads();
    for (int c = begin; c < end; ++c) {
        const Channel channel = channel_of(mean[c], rstd[c], gamma[c], beta[c]);
        for (int t = 0; t < tiles; ++t)
            tile_dx<MASK>(x, dy, y, plus, channel, dgamma[c], dbeta[c], dx, dz, c, t, row, tile, inverse_m);
    }
}

extern "C" __global__ void bn_backward(const real* __restrict__ x, const real* __restrict__ dy,
                                       OPTIONAL const real* __restrict__ plus, const acc* __restrict__ mean,
                                       const acc* __restrict__ rstd, const acc* __restrict__ gamma,
                                       const acc* __restrict__ beta, acc* __restrict__ dgamma, acc* __restrict__ dbeta,
                                       real* __restrict__ dx, int channels, int group, int row, int tile, acc inverse_m) {
    backward<NONE>(x, dy, dy, plus, mean, rstd, gamma, beta, dgamma, dbeta, dx, dx, channels, group, row, tile, inverse_m);
}

extern "C" __global__ void bn_backward_relu(const real* __restrict__ x, const real* __restrict__ dy,
                                            OPTIONAL const real* __restrict__ plus, const acc* __restrict__ mean,
                                            const acc* __restrict__ rstd, const acc* __restrict__ gamma,
                                            const acc* __restrict__ beta, acc* __restrict__ dgamma, acc* __restrict__ dbeta,
                                            real* __restrict__ dx, int channels, int group, int row, int tile, acc inverse_m) {
    backward<FROM_X>(x, dy, dy, plus, mean, rstd, gamma, beta, dgamma, dbeta, dx, dx, channels, group, row, tile, inverse_m);
}

extern "C" __global__ void bn_backward_add_relu(const real* __restrict__ x, const real* __restrict__ dy,
                                                const real* __restrict__ y, const acc* __restrict__ mean,
                                                const acc* __restrict__ rstd, const acc* __restrict__ gamma,
                                                const acc* __restrict__ beta, acc* __restrict__ dgamma,
                                                acc* __restrict__ dbeta, real* __restrict__ dx, real* __restrict__ dz,
                                                int channels, int group, int row, int tile, acc inverse_m) {
    backward<FROM_Y>(x, dy, y, 0, mean, rstd, gamma, beta, dgamma, dbeta, dx, dz, channels, group, row, tile, inverse_m);
}
