// Optimizers, each one launch over the flat buffers of all parameters (n elements):
// master and grad as acc, and `data`, the copy in the type of storage that the layers compute with.
//
//   norm = sqrt(sum over all of grad^2) / scale         factor = min(1, clip_norm / (norm + 1e-6)) / scale
//   g = factor * grad + weight_decay * master           (coupled L2, on every parameter, as PyTorch's)
//
//   SGD, Sutskever et al., ICML 2013:   v = momentum * v + g
//     master -= lr * v, or with Nesterov  master -= lr * (g + momentum * v)
//   Adam, Kingma, Ba, arXiv 1412.6980:  m = beta1 * m + (1 - beta1) * g,  v = beta2 * v + (1 - beta2) * g^2
//     master -= lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
//   AdamW, Loshchilov, Hutter, arXiv 1711.05101: the same with g = factor * grad, after  master -= lr * weight_decay * master
//   AdaDelta, Zeiler, arXiv 1212.5701, with a learning rate:  g2 = rho * g2 + (1 - rho) * g^2
//     dx = sqrt((dx2 + eps) / (g2 + eps)) * g,  dx2 = rho * dx2 + (1 - rho) * dx^2,  master -= lr * dx
//
//   Average of weights after t steps, as Polyak, Juditsky, SIAM J. Control Optim. 30, 1992, but with a memory that fades:
//     average += (1 - d) * (value - average),  d = min(decay, (1 + t) / (10 + t)), which forgets the initial values fast
//
// What changes from step to step is in device memory, `state`, so that a captured step can be replayed: the host writes
// LR, the kernels the rest. A step is  tile_squares, norm, the update, advance.
//
// A step whose gradient is not finite is skipped. With loss scaling (Micikevicius et al., arXiv 1710.03740; for float16)
// that halves the scale, and as many steps in a row without one as `growth_interval` says double it. Without, it is a
// failure: FAILED holds the number of the step, and all later steps are skipped too, so that weights and moments stay
// those from before it until the host looks.
#include "common.cuh"

// CALLS counts all steps, STEP those not skipped, AGE those since the moments were 0. NONFINITE and FAILED: 0 for no.
// As float32 they count exactly up to 2^24: 43,000 epochs of 390 steps.
enum State { LR, CALLS, STEP, AGE, SCALE, GOOD_STEPS, SKIPPED_IN_ROW, NONFINITE, FAILED, GRAD_NORM, GRAD_FACTOR };

// Sums of squares of tiles of the gradient, a block each; and state[NONFINITE] = 1 if anything in them is Inf or NaN, told
// from the elements, since squares may overflow. Several threads may write it, all of them the same value. Grid: tiles.
extern "C" __global__ void optimizer_tile_squares(const acc* __restrict__ grad, acc* __restrict__ tile_squares,
                                                  acc* __restrict__ state, long long n, int tile) {
    const long long begin = blockIdx.x * (long long)tile;
    const int count = n - begin < tile ? (int)(n - begin) : tile;
    const acc* tile_grad = grad + begin;
    acc squares = 0, differences = 0;
    BLOCK_LOOP_SUM(i, 0, count, squares, differences) {
        const acc g = tile_grad[i];
        squares += g * g;
        differences += g - g;  // 0, but NaN for Inf and NaN
    }
    if (!(differences == acc(0))) state[NONFINITE] = 1;
    squares = block_sum(squares);
    if (threadIdx.x == 0) tile_squares[blockIdx.x] = squares;
}

// Grid: one block. clip_norm 0: no limit. A norm that overflows is Inf, and its factor 0.
extern "C" __global__ void optimizer_norm(const acc* __restrict__ tile_squares, acc* __restrict__ state, int tiles,
                                          acc clip_norm) {
    acc squares = 0;
    BLOCK_LOOP_SUM(t, 0, tiles, squares) squares += tile_squares[t];
    squares = block_sum(squares);
    if (threadIdx.x == 0) {
        const acc norm = sqrt(squares) / state[SCALE], share = clip_norm / (norm + acc(1e-6));
        state[GRAD_NORM] = norm;
        state[GRAD_FACTOR] = (clip_norm > 0 && share < 1 ? share : acc(1)) / state[SCALE];
    }
}

extern "C" __global__ void sgd_step(acc* master, const acc* grad, acc* velocity, real* data, const acc* state, long long n,
                                    acc momentum, acc weight_decay, int nesterov) {
    if (state[NONFINITE] != 0) return;
    const acc lr = state[LR], factor = state[GRAD_FACTOR];
    const acc g_share = nesterov ? 1 : 0, v_share = nesterov ? momentum : 1;
    GRID_LOOP(i, n) {
        const acc g = grad[i] * factor + weight_decay * master[i];
        const acc v = momentum * velocity[i] + g;
        const acc updated = master[i] - lr * (g_share * g + v_share * v);
        velocity[i] = v;
        master[i] = updated;
        data[i] = real(updated);
    }
}

// 1 - beta^t. The difference of 1 and a power near it would have few digits: of 0.999 a GPU's are wrong in the fourth.
__device__ __forceinline__ acc one_minus_power(acc beta, acc t) { return -expm1(t * log1p(beta - 1)); }

// decoupled: AdamW.
extern "C" __global__ void adam_step(acc* master, const acc* grad, acc* first_moment, acc* second_moment, real* data,
                                     const acc* state, long long n, acc beta1, acc beta2, acc eps, acc weight_decay,
                                     int decoupled) {
    if (state[NONFINITE] != 0) return;
    const acc lr = state[LR], factor = state[GRAD_FACTOR], t = state[AGE] + 1;
    const acc step_size = lr / one_minus_power(beta1, t), second_correction = 1 / one_minus_power(beta2, t);
    const acc in_gradient = decoupled ? 0 : weight_decay, in_step = decoupled ? lr * weight_decay : 0;
    GRID_LOOP(i, n) {
        const acc g = grad[i] * factor + in_gradient * master[i];
        const acc m = beta1 * first_moment[i] + (1 - beta1) * g;
        const acc v = beta2 * second_moment[i] + (1 - beta2) * g * g;
        const acc decayed = master[i] - in_step * master[i];
        const acc updated = decayed - step_size * m / (sqrt(v * second_correction) + eps);
        first_moment[i] = m;
        second_moment[i] = v;
        master[i] = updated;
        data[i] = real(updated);
    }
}

extern "C" __global__ void adadelta_step(acc* master, const acc* grad, acc* mean_g2, acc* mean_dx2, real* data,
                                         const acc* state, long long n, acc rho, acc eps, acc weight_decay) {
    if (state[NONFINITE] != 0) return;
    const acc lr = state[LR], factor = state[GRAD_FACTOR];
    GRID_LOOP(i, n) {
        const acc g = grad[i] * factor + weight_decay * master[i];
        const acc g2 = rho * mean_g2[i] + (1 - rho) * g * g;
        const acc dx = sqrt((mean_dx2[i] + eps) / (g2 + eps)) * g;
        const acc updated = master[i] - lr * dx;
        mean_g2[i] = g2;
        mean_dx2[i] = rho * mean_dx2[i] + (1 - rho) * dx * dx;
        master[i] = updated;
        data[i] = real(updated);
    }
}

// One thread. growth_interval 0: no loss scaling.
extern "C" __global__ void optimizer_advance(acc* state, acc growth_interval) {
    GRID_LOOP(i, 1) {
        state[CALLS] += 1;
        if (state[NONFINITE] == 0) {
            state[STEP] += 1;
            state[AGE] += 1;
            state[SKIPPED_IN_ROW] = 0;
            state[GOOD_STEPS] += 1;
            if (state[GOOD_STEPS] == growth_interval) {
                state[SCALE] *= acc(2);
                state[GOOD_STEPS] = 0;
            }
        } else {
            state[SKIPPED_IN_ROW] += 1;
            state[GOOD_STEPS] = 0;
            if (growth_interval > 0) {
                state[SCALE] *= acc(0.5);
                state[NONFINITE] = 0;
            } else if (state[FAILED] == 0) {  // NONFINITE stays, and with it the weights
                state[FAILED] = state[CALLS];
            }
        }
    }
}

// After optimizer_advance. A step that was skipped does not move the average.
extern "C" __global__ void optimizer_average(acc* __restrict__ average, const acc* __restrict__ value,
                                             const acc* __restrict__ state, long long n, acc decay) {
    if (state[SKIPPED_IN_ROW] != 0) return;
    const acc early = (1 + state[STEP]) / (10 + state[STEP]), share = 1 - (early < decay ? early : decay);
    GRID_LOOP(i, n) average[i] += share * (value[i] - average[i]);
}

// data = master, in the type of storage.
extern "C" __global__ void optimizer_cast(const acc* master, real* data, long long n) {
    GRID_LOOP(i, n) data[i] = real(master[i]);
}
