// What a convolution adds to its results before it stores them, each where it is given: a bias for each channel, and another
// array of their shape, such as the other branch of a residual block. So neither takes a pass of its own over the results.
#pragma once
#include "lanes.cuh"

struct Epilogue {
    real* results;     // all of them
    const acc* bias;   // (channels), or 0
    const real* plus;  // like results, which it may be, or 0

    __device__ acc bias_of(long long channel) const { return bias ? bias[channel] : acc(0); }

    // target: of `left` images and more, in results.
    template <bool WHOLE>
    __device__ void store_result(real* target, lanes value, acc its_bias, int left) const {
        value += its_bias;
        if (plus) value += load<WHOLE>(plus + (target - results), left);
        store<WHOLE>(target, value, left);
    }
};
