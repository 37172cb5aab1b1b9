// Rows of cols, the unfolded windows of an image (conv.cu): row (c, ky, kx) has at column (oy, ox, n)
//
//   x[c, oy*stride - padding + ky, ox*stride - padding + kx, n], 0 outside of the image
#pragma once
#include "pixels.cuh"

// An image height x width with all its batch, and the windows that a convolution looks at it through.
struct Windows {
    int height, width, out_width, batch, kernel_h, kernel_w, stride, padding;

    __device__ long long channel() const { return (long long)height * width * batch; }
};

// Row `row` of the channels `x`: `count` columns to `out`, the first of which is image n of the output pixel (oy, ox). The
// threads of `share` have its runs of memory, as share_of tells.
__device__ __forceinline__ void unfold_row(const real* __restrict__ x, real* __restrict__ out, const Windows& windows, int row,
                                           int oy, int ox, int n, int count, const Share& share) {
    const int width = windows.width, batch = windows.batch, stride = windows.stride;
    const int kx = row % windows.kernel_w, ky = row / windows.kernel_w % windows.kernel_h;
    const real* channel = x + row / windows.kernel_w / windows.kernel_h * windows.channel();
    int runs_before = share.pixel;  // this thread's next run
    while (count > 0) {
        const int iy = oy * stride - windows.padding + ky, ix = ox * stride - windows.padding + kx;
        const bool inside = iy >= 0 && iy < windows.height && ix >= 0 && ix < width;
        // Neighbours that are all inside, or all outside; without strides their images follow each other.
        int pixels = windows.out_width - ox;
        const int edge = ((inside ? width - ix : -ix) + stride - 1) / stride;
        if ((inside || ix < 0) && edge < pixels) pixels = edge;
        const bool apart = inside && stride > 1;
        const real* source = inside ? channel + ((long long)iy * width + ix) * batch : 0;
        const long long run = apart ? batch : (long long)pixels * batch;
        for (int runs = apart ? pixels : 1; runs > 0 && count > 0; --runs, --runs_before) {
            const int length = run - n < count ? (int)run - n : count;
            if (runs_before == 0) {
                copy_over(out, inside ? source + n : 0, of_share(length, share));
                runs_before = share.pixels;
            }
            out += length;
            count -= length;
            n = 0;
            if (apart) source += (long long)stride * batch;
        }
        ox += pixels;
        if (ox == windows.out_width) ox = 0, ++oy;
    }
}

#define AHEAD 4096  // bytes, about, that are on their way into the first cache while others are copied

// What the windows of the output pixels first .. last see of a channel. Processors foresee the next lines of a row, but not the
// next row or channel.
__device__ __forceinline__ void prefetch_windows(const real* channel, const Windows& windows, long long first, long long last) {
    const int oy_first = first / windows.out_width, oy_last = last / windows.out_width;
    int top = oy_first * windows.stride - windows.padding, bottom = oy_last * windows.stride - windows.padding + windows.kernel_h;
    int left = 0, right = windows.width;
    if (oy_first == oy_last) {
        left = first % windows.out_width * windows.stride - windows.padding;
        right = last % windows.out_width * windows.stride - windows.padding + windows.kernel_w;
    }
    if (top < 0) top = 0;
    if (bottom > windows.height) bottom = windows.height;
    if (left < 0) left = 0;
    if (right > windows.width) right = windows.width;
    for (int iy = top; iy < bottom; ++iy)
        prefetch(channel + ((long long)iy * windows.width + left) * windows.batch, (long long)(right - left) * windows.batch);
}

// Rows begin .. end-1 of the channels `x`, `count` columns from `column` on, by the threads of a block: to `out`, rows of
// which lie `pitch` elements apart.
__device__ __forceinline__ void unfold(const real* __restrict__ x, real* __restrict__ out, const Windows& windows, int begin,
                                       int end, long long column, int count, int pitch) {
    const long long pixel = column / windows.batch, last_pixel = (column + count - 1) / windows.batch;
    const int oy = pixel / windows.out_width, ox = pixel % windows.out_width, n = column % windows.batch;
    const long long channel_bytes = (long long)count * windows.stride * windows.stride * sizeof(real);
    const int window = windows.kernel_h * windows.kernel_w, ahead = 1 + AHEAD / channel_bytes;  // in channels
    const Share share = share_of<true>(count);
    for (int row = begin; row < end; ++row, out += pitch) {
        if (row % window == 0 && end - row > ahead * window)
            prefetch_windows(x + (row / window + ahead) * windows.channel(), windows, pixel, last_pixel);
        unfold_row(x, out, windows, row, oy, ox, n, count, share);
    }
}
