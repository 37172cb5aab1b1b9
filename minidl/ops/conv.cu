// Convolution (cross-correlation, as in every framework) as a matrix product over unfolded windows:
//
//   y[o, oy, ox, n]  = bias[o] + sum over (c, ky, kx) of weight[o, c, ky, kx] * x[c, oy*stride - padding + ky, ...]
//
//   cols[(c, ky, kx), (oy, ox, n)] = x[c, oy*stride - padding + ky, ox*stride - padding + kx, n], 0 outside
//   Y (O, P') = W (O, K) @ cols (K, P'),   K = C*kh*kw, P' = H'*W'*N;  with groups, a stack of such products
//
//   dW = dY @ cols^T        dbias = sum of dY over P'        dx = col2im(W^T @ dY), the adjoint of im2col
//
// A chunk is a range of output pixels (oy, ox), with all their images: `cols` then has pixel_count * N columns.
// Chellapilla, Puri, Simard, "High performance convolutional neural networks for document processing", 2006.
#include "unfold.cuh"
#include "window.cuh"

// cols (groups * K, pitch). Grid: groups * K x stretches of `stretch` pixels, of which the threads share the runs.
extern "C" __global__ void im2col(const real* __restrict__ x, real* __restrict__ cols, int height, int width, int out_width,
                                  int batch, int kernel_h, int kernel_w, int stride, int padding, int pixel_begin,
                                  int pixel_count, int stretch, long long pitch) {
    const Windows windows{height, width, out_width, batch, kernel_h, kernel_w, stride, padding};
    const int begin = blockIdx.y * stretch, count = pixel_count - begin < stretch ? pixel_count - begin : stretch;
    const int pixel = pixel_begin + begin, oy = pixel / out_width, ox = pixel % out_width;
    const int run = (stride > 1 ? 1 : count < out_width ? count : out_width) * batch;
    unfold_row(x, cols + blockIdx.x * pitch + (long long)begin * batch, windows, blockIdx.x, oy, ox, 0, count * batch,
               share_of<true>(run));
}

template <bool WHOLE>
__device__ __forceinline__ void add_windows(const real* __restrict__ dcols, real* __restrict__ dx, int channels, int height,
                                            int width, int out_width, int batch, int kernel_h, int kernel_w, int stride,
                                            int padding, int row_begin, int row_count, int iy_begin, int covered) {
    const int rows = gridDim.x / channels, c = blockIdx.x / rows, iy = iy_begin + (int)blockIdx.x % rows;
    int oy_begin = first_window(iy, kernel_h, stride, padding);
    if (oy_begin < row_begin) oy_begin = row_begin;
    const int y_count = end_of_windows(iy, stride, padding, row_begin + row_count) - oy_begin;
    const int ky = iy + padding - oy_begin * stride;
    const bool adds = iy < covered;
    // In dcols from one row to the next, and to what the next window, down or to the right, has for the same input.
    const long long pitch = (long long)row_count * out_width * batch, x_step = batch - stride * pitch;
    const long long y_step = (long long)out_width * batch - (long long)stride * kernel_w * pitch;
    const Share share = share_of<WHOLE>(batch);
    for (int ix = share.pixel; ix < width; ix += share.pixels) {
        const int ox_begin = first_window(ix, kernel_w, stride, padding);
        const int x_count = end_of_windows(ix, stride, padding, out_width) - ox_begin;
        const int kx = ix + padding - ox_begin * stride;
        const long long row = ((long long)c * kernel_h + ky) * kernel_w + kx;
        const long long first = row * pitch + ((oy_begin - row_begin) * (long long)out_width + ox_begin) * batch;
        real* pixel = dx + (((long long)c * height + iy) * width + ix) * batch;
        for (int n = share.image; n < batch; n += share.images) {
            Images<WHOLE> sum = adds ? load_images<WHOLE>(pixel + n, batch - n) : Images<WHOLE>{};
            for (int y = 0; y < y_count; ++y)
                for (int x = 0; x < x_count; ++x)
                    each(add_to, sum,
                         load_images<WHOLE>(dcols + first + y * y_step + x * x_step + n, batch - n));
            store_images<WHOLE>(pixel + n, sum, batch - n);
        }
    }
}

// Here a chunk is row_count whole output rows. Grid: channels x input rows, whose pixels and images the threads share.
// dx rows iy_begin .. iy_begin + gridDim.x/channels - 1 of each channel, from the chunk's dcols. Rows below
// `covered` hold the sums of earlier chunks and are added to; the others are overwritten.
extern "C" __global__ void col2im(const real* __restrict__ dcols, real* __restrict__ dx, int channels, int height, int width,
                                  int out_width, int batch, int kernel_h, int kernel_w, int stride, int padding,
                                  int row_begin, int row_count, int iy_begin, int covered) {
    if (whole_images(batch, dcols, dx))
        add_windows<true>(dcols, dx, channels, height, width, out_width, batch, kernel_h, kernel_w, stride, padding, row_begin,
                          row_count, iy_begin, covered);
    else
        add_windows<false>(dcols, dx, channels, height, width, out_width, batch, kernel_h, kernel_w, stride, padding, row_begin,
                           row_count, iy_begin, covered);
}
