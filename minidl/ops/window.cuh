// Sliding windows, for convolution and pooling: output position `out` looks at the inputs
// out * stride - padding + (0 .. window - 1), of which those in 0 .. size-1 exist.
#pragma once
#include "lanes.cuh"

// The first and one past the last output position whose window holds input position `in`.
__device__ __forceinline__ int first_window(int in, int window, int stride, int padding) {
    const int reach = in + padding - window + 1;
    return reach <= 0 ? 0 : (reach + stride - 1) / stride;
}

__device__ __forceinline__ int end_of_windows(int in, int stride, int padding, int out_size) {
    const int end = (in + padding) / stride + 1;
    return end < out_size ? end : out_size;
}

// Those positions again for one `in` after the other, from 0 on: begin .. end-1, without divisions.
struct WindowsAt {
    int begin = 0, end = 0;

    __device__ void move_to(int in, int window, int stride, int padding, int out_size) {
        while (end < out_size && end * stride - padding <= in) ++end;
        while (begin < end && begin * stride - padding + window <= in) ++begin;
    }
};

// Pooling of images height x width to out_height x out_width.
struct Pooling {
    int height, width, out_height, out_width, batch, kernel_h, kernel_w, stride, padding;
};

// To be called for each window `out` of a row of windows, whose first row of the source is `row`: a share of what the next row
// of windows meets first, in the order of memory. Processors foresee that order, and not that of a window's rows taking turns.
template <int CACHE>
__device__ __forceinline__ void prefetch_next_row(const real* row, int out, const Pooling& size) {
    if (size.stride > size.kernel_w || size.stride > size.kernel_h) return;  // there are gaps, which nobody reads
    if (size.out_width == 1) return;  // a window reads whole rows, in that order
    const long long share = (long long)(size.out_height > 1 ? size.stride : size.height) * size.stride * size.batch;
    prefetch<CACHE>(row + (long long)size.kernel_h * size.width * size.batch + out * share, share);
}
