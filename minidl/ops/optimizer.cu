// Optimizers, each one launch over the flat buffers of all parameters (n elements):
// master and grad as acc, and `data`, the copy in the type of storage that the layers compute with.
//
//   g = grad / state[SCALE] + weight_decay * master          (coupled L2, on every parameter, as PyTorch's)
//
//   SGD, Sutskever et al., ICML 2013:   v = momentum * v + g
//     master -= lr * v, or with Nesterov  master -= lr * (g + momentum * v)
//   Adam, Kingma, Ba, arXiv 1412.6980:  m = beta1 * m + (1 - beta1) * g,  v = beta2 * v + (1 - beta2) * g^2
//     master -= lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
//
// What changes from step to step is in device memory, `state`, so that a captured step can be replayed: the host
// writes LR; optimizer_advance writes the rest after each step. Loss scaling (Micikevicius et al., arXiv 1710.03740)
// is for float16: a step with a gradient that is not finite is skipped and halves the scale, and as many steps in a row
// without one as `growth_interval` says double it. Other types keep SCALE = 1 and NONFINITE = 0 for ever.
#include "common.cuh"

enum State { LR, STEP, SCALE, GOOD_STEPS, SKIPPED_IN_ROW, NONFINITE };

// Sets state[NONFINITE] if any gradient is Inf or NaN. Several threads may write, all of them the same value.
extern "C" __global__ void optimizer_check(const acc* __restrict__ grad, acc* __restrict__ state, long long n) {
    GRID_LOOP(i, n) {
        if (!(grad[i] - grad[i] == acc(0))) state[NONFINITE] = 1;
    }
}

extern "C" __global__ void sgd_step(acc* master, const acc* grad, acc* velocity, real* data, const acc* state, long long n,
                                    acc momentum, acc weight_decay, int nesterov) {
    if (state[NONFINITE] != 0) return;
    const acc lr = state[LR], inverse_scale = 1 / state[SCALE];
    const acc g_share = nesterov ? 1 : 0, v_share = nesterov ? momentum : 1;
    GRID_LOOP(i, n) {
        const acc g = grad[i] * inverse_scale + weight_decay * master[i];
        const acc v = momentum * velocity[i] + g;
        const acc updated = master[i] - lr * (g_share * g + v_share * v);
        velocity[i] = v;
        master[i] = updated;
        data[i] = real(updated);
    }
}

extern "C" __global__ void adam_step(acc* master, const acc* grad, acc* first_moment, acc* second_moment, real* data,
                                     const acc* state, long long n, acc beta1, acc beta2, acc eps, acc weight_decay) {
    if (state[NONFINITE] != 0) return;
    const acc inverse_scale = 1 / state[SCALE], t = state[STEP] + 1;
    const acc step_size = state[LR] / (1 - pow(beta1, t)), second_correction = 1 / (1 - pow(beta2, t));
    GRID_LOOP(i, n) {
        const acc g = grad[i] * inverse_scale + weight_decay * master[i];
        const acc m = beta1 * first_moment[i] + (1 - beta1) * g;
        const acc v = beta2 * second_moment[i] + (1 - beta2) * g * g;
        const acc updated = master[i] - step_size * m / (sqrt(v * second_correction) + eps);
        first_moment[i] = m;
        second_moment[i] = v;
        master[i] = updated;
        data[i] = real(updated);
    }
}

// One thread.
extern "C" __global__ void optimizer_advance(acc* state, acc growth_interval) {
    GRID_LOOP(i, 1) {
        if (state[NONFINITE] != 0) {
            state[SCALE] *= acc(0.5);
            state[GOOD_STEPS] = 0;
            state[SKIPPED_IN_ROW] += 1;
            state[NONFINITE] = 0;
        } else {
            state[STEP] += 1;
            state[SKIPPED_IN_ROW] = 0;
            state[GOOD_STEPS] += 1;
            if (state[GOOD_STEPS] == growth_interval) {
                state[SCALE] *= acc(2);
                state[GOOD_STEPS] = 0;
            }
        }
    }
}

// data = master, in the type of storage.
extern "C" __global__ void optimizer_cast(const acc* master, real* data, long long n) {
    GRID_LOOP(i, n) data[i] = real(master[i]);
}
