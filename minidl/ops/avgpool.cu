// Average pooling over windows (kernel_h, kernel_w), with stride and zero padding that counts:
//
//   y[c, oy, ox, n]  = sum over the window / (kernel_h * kernel_w)
//   dx[c, iy, ix, n] = sum of dy over the windows that hold (iy, ix) / (kernel_h * kernel_w)
//
// Grid: one block per row of pixels, (c, oy) forward and (c, iy) backward. Threads run along the batch.
#include "window.cuh"

extern "C" __global__ void avgpool_forward(const real* __restrict__ x, real* __restrict__ y, int height, int width,
                                           int out_height, int out_width, int batch, int kernel_h, int kernel_w, int stride,
                                           int padding) {
    const int c = blockIdx.x / out_height, oy = blockIdx.x % out_height;
    const int y_origin = oy * stride - padding;
    const int iy_begin = y_origin < 0 ? 0 : y_origin;
    const int iy_end = y_origin + kernel_h < height ? y_origin + kernel_h : height;
    for (int ox = 0; ox < out_width; ++ox) {
        const int x_origin = ox * stride - padding;
        const int ix_begin = x_origin < 0 ? 0 : x_origin;
        const int ix_end = x_origin + kernel_w < width ? x_origin + kernel_w : width;
        real* y_pixel = y + ((long long)blockIdx.x * out_width + ox) * batch;
        BLOCK_LOOP(n, 0, batch) {
            acc sum = 0;
            for (int iy = iy_begin; iy < iy_end; ++iy)
                for (int ix = ix_begin; ix < ix_end; ++ix)
                    sum += acc(x[(((long long)c * height + iy) * width + ix) * batch + n]);
            y_pixel[n] = real(sum / (kernel_h * kernel_w));
        }
    }
}

extern "C" __global__ void avgpool_backward(const real* __restrict__ dy, real* __restrict__ dx, int height, int width,
                                            int out_height, int out_width, int batch, int kernel_h, int kernel_w, int stride,
                                            int padding) {
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
                for (int ox = ox_begin; ox < ox_end; ++ox)
                    sum += acc(dy[(((long long)c * out_height + oy) * out_width + ox) * batch + n]);
            dx_pixel[n] = real(sum / (kernel_h * kernel_w));
        }
    }
}
