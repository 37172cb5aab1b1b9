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

// One output pixel of all images. The window's part inside the image: ky_begin .. ky_end-1, kx_begin .. kx_end-1.
// ROWS, COLUMNS: the size of a part that is known at compile time, so that the loop over the batch vectorizes; else 0.
template <int ROWS, int COLUMNS>
__device__ __forceinline__ void max_of_window(const real* __restrict__ window, real* __restrict__ y,
                                              unsigned short* __restrict__ winner, int ky_begin, int ky_end, int kx_begin,
                                              int kx_end, int width, int batch, int kernel_w) {
    const int rows = ROWS ? ROWS : ky_end - ky_begin, columns = COLUMNS ? COLUMNS : kx_end - kx_begin;
    const real* first = window + ((long long)ky_begin * width + kx_begin) * batch;
    const int first_place = ky_begin * kernel_w + kx_begin;
    BLOCK_LOOP(n, 0, batch) {
        acc best = acc(first[n]);
        int best_place = first_place;
        for (int r = 0; r < rows; ++r)
            for (int k = 0; k < columns; ++k) {
                const acc value = acc(first[(r * width + k) * (long long)batch + n]);
                const bool wins = value > best || (value != value && best == best);
                best = wins ? value : best;
                best_place = wins ? first_place + r * kernel_w + k : best_place;
            }
        y[n] = real(best);
        winner[n] = best_place;
    }
}

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
        if (ky_end - ky_begin == 2 && kx_end - kx_begin == 2)
            max_of_window<2, 2>(window, y + out, winner + out, ky_begin, ky_end, kx_begin, kx_end, width, batch, kernel_w);
        else
            max_of_window<0, 0>(window, y + out, winner + out, ky_begin, ky_end, kx_begin, kx_end, width, batch, kernel_w);
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
        if (oy_end - oy_begin == 1 && ox_end - ox_begin == 1) {  // one window, as everywhere if they do not overlap
            const int place = (iy + padding - oy_begin * stride) * kernel_w + ix + padding - ox_begin * stride;
            const long long out = (((long long)c * out_height + oy_begin) * out_width + ox_begin) * batch;
            BLOCK_LOOP(n, 0, batch) dx_pixel[n] = real(winner[out + n] == place ? acc(dy[out + n]) : acc(0));
            continue;
        }
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
