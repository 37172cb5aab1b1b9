// Max-pooling over windows (kernel_h, kernel_w), with stride and padding. Padding never wins.
//
//   y[c, oy, ox, n]  = max over (ky, kx) of x[c, oy*stride - padding + ky, ox*stride - padding + kx, n]
//   dx[c, iy, ix, n] = sum of dy over the windows whose maximum is (iy, ix)
//
// Of equal values the first in reading order wins, and NaN wins over all, as in PyTorch. Forward notes the
// winner's place in its window, ky*kernel_w + kx; backward gathers, one writer per element.
//
// Grid: one block per row of pixels, (c, oy) forward and (c, iy) backward. Threads run along the batch.
#include "window.cuh"

extern "C" __global__ void maxpool_forward(const real* __restrict__ x, real* __restrict__ y,
                                           unsigned short* __restrict__ winner, int height, int width, int out_height,
                                           int out_width, int batch, int kernel_h, int kernel_w, int stride, int padding) {
    const int c = blockIdx.x / out_height, oy = blockIdx.x % out_height;
    const int y_origin = oy * stride - padding;
    const int ky_begin = y_origin < 0 ? -y_origin : 0;
    const int ky_end = height - y_origin < kernel_h ? height - y_origin : kernel_h;
    for (int ox = 0; ox < out_width; ++ox) {
        const int x_origin = ox * stride - padding;
        const int kx_begin = x_origin < 0 ? -x_origin : 0;
        const int kx_end = width - x_origin < kernel_w ? width - x_origin : kernel_w;
        const real* window = x + (((long long)c * height + y_origin) * width + x_origin) * batch;
        const long long out = ((long long)blockIdx.x * out_width + ox) * batch;
        BLOCK_LOOP(n, 0, batch) {
            int best_place = ky_begin * kernel_w + kx_begin;
            acc best = acc(window[((long long)ky_begin * width + kx_begin) * batch + n]);
            for (int ky = ky_begin; ky < ky_end; ++ky)
                for (int kx = kx_begin; kx < kx_end; ++kx) {
                    const acc value = acc(window[((long long)ky * width + kx) * batch + n]);
                    const bool wins = value > best || (value != value && best == best);
                    best = wins ? value : best;
                    best_place = wins ? ky * kernel_w + kx : best_place;
                }
            y[out + n] = real(best);
            winner[out + n] = best_place;
        }
    }
}

extern "C" __global__ void maxpool_backward(const real* __restrict__ dy, const unsigned short* __restrict__ winner,
                                            real* __restrict__ dx, int height, int width, int out_height, int out_width,
                                            int batch, int kernel_h, int kernel_w, int stride, int padding) {
    const int c = blockIdx.x / height, iy = blockIdx.x % height;
    const int oy_begin = first_window(iy, kernel_h, stride, padding);
    const int oy_end = end_of_windows(iy, stride, padding, out_height);
    for (int ix = 0; ix < width; ++ix) {
        const int ox_begin = first_window(ix, kernel_w, stride, padding);
        const int ox_end = end_of_windows(ix, stride, padding, out_width);
        real* dx_pixel = dx + ((long long)blockIdx.x * width + ix) * batch;
        BLOCK_LOOP(n, 0, batch) {
            acc sum = 0;
            for (int oy = oy_begin; oy < oy_end; ++oy)
                for (int ox = ox_begin; ox < ox_end; ++ox) {
                    const int place = (iy + padding - oy * stride) * kernel_w + ix + padding - ox * stride;
                    const long long out = (((long long)c * out_height + oy) * out_width + ox) * batch + n;
                    sum += winner[out] == place ? acc(dy[out]) : acc(0);
                }
            dx_pixel[n] = real(sum);
        }
    }
}
