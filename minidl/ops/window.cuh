// Sliding windows, for convolution and pooling: output position `out` looks at the inputs
// out * stride - padding + (0 .. window - 1), of which those in 0 .. size-1 exist.
#pragma once
#include "common.cuh"

// The first and one past the last output position whose window holds input position `in`.
__device__ __forceinline__ int first_window(int in, int window, int stride, int padding) {
    const int reach = in + padding - window + 1;
    return reach <= 0 ? 0 : (reach + stride - 1) / stride;
}

__device__ __forceinline__ int end_of_windows(int in, int stride, int padding, int out_size) {
    const int end = (in + padding) / stride + 1;
    return end < out_size ? end : out_size;
}
