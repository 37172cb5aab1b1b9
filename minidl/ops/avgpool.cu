// Average pooling over windows (kernel_h, kernel_w), with stride and zero padding that counts:
//
//   y[c, oy, ox, n]  = sum over the window / (kernel_h * kernel_w)
//   dx[c, iy, ix, n] = sum of dy over the windows that hold (iy, ix) / (kernel_h * kernel_w)
//
// Grid: one block per row of pixels, (c, oy) forward and (c, iy) backward, whose pixels and images the threads share.
#include "pixels.cuh"
#include "window.cuh"

template <bool WHOLE>
__device__ __forceinline__ void store_weighed(real* result, Images<WHOLE>& sum, acc weight, int left) {
    each([=](auto& sum) { sum *= weight; }, sum);
    store_images<WHOLE>(result, sum, left);
}

// result = weight * the sum of ROWS x COLUMNS pixels from `first` on, in images of that width.
template <int ROWS, int COLUMNS, bool WHOLE>
__device__ __forceinline__ void weigh_few(const real* __restrict__ first, real* __restrict__ result, int width, int batch,
                                          acc weight, Share share) {
    for (int n = share.image; n < batch; n += share.images) {
        Images<WHOLE> sum{};
        for (int r = 0; r < ROWS; ++r)
            for (int k = 0; k < COLUMNS; ++k)
                each(add_to, sum, load_images<WHOLE>(first + ((long long)r * width + k) * batch + n, batch - n));
        store_weighed<WHOLE>(result + n, sum, weight, batch - n);
    }
}

// The same of rows x columns pixels: in the order of memory, so that each is read with several vectors of images.
template <bool WHOLE>
__device__ __forceinline__ void weigh_many(const real* __restrict__ first, real* __restrict__ result, int rows, int columns,
                                           int width, int batch, acc weight, Share share) {
    constexpr int VECTORS = LANES > 1 ? 8 : 1;
    for (int begin = share.image * VECTORS; begin < batch; begin += share.images * VECTORS) {
        Images<WHOLE> sums[VECTORS]{};
        const auto of_each = [&](auto act) {
            UNROLL for (int v = 0; v < VECTORS; ++v)
                if (const int n = begin + v * LANES; n < batch) act(sums[v], n);
        };
        for (int r = 0; r < rows; ++r)
            for (int k = 0; k < columns; ++k) {
                const real* pixel = first + ((long long)r * width + k) * batch;
                of_each([=](auto& sum, int n) { each(add_to, sum, load_images<WHOLE>(pixel + n, batch - n)); });
            }
        of_each([=](auto& sum, int n) { store_weighed<WHOLE>(result + n, sum, weight, batch - n); });
    }
}

template <bool WHOLE>
__device__ __forceinline__ void weigh(const real* first, real* result, int rows, int columns, int width, int batch, acc weight,
                                      Share share) {
    if (rows == 1 && columns == 1) weigh_few<1, 1, WHOLE>(first, result, width, batch, weight, share);
    else if (rows == 2 && columns == 2) weigh_few<2, 2, WHOLE>(first, result, width, batch, weight, share);
    else weigh_many<WHOLE>(first, result, rows, columns, width, batch, weight, share);
}

template <bool WHOLE>
__device__ __forceinline__ void forward_row(const real* __restrict__ x, real* __restrict__ y, const Pooling& size) {
    const int c = blockIdx.x / size.out_height, oy = blockIdx.x % size.out_height, batch = size.batch;
    const acc weight = acc(1) / (size.kernel_h * size.kernel_w);
    const int y_origin = oy * size.stride - size.padding;
    const int iy_begin = y_origin < 0 ? 0 : y_origin;
    const int iy_end = y_origin + size.kernel_h < size.height ? y_origin + size.kernel_h : size.height;
    const real* row = x + ((long long)c * size.height + iy_begin) * size.width * batch;
    const Share share = share_of<WHOLE>(batch);
    for (int ox = share.pixel; ox < size.out_width; ox += share.pixels) {
        const int x_origin = ox * size.stride - size.padding;
        const int ix_begin = x_origin < 0 ? 0 : x_origin;
        const int ix_end = x_origin + size.kernel_w < size.width ? x_origin + size.kernel_w : size.width;
        prefetch_next_row<2>(row, ox, size);  // the first cache cannot wait for as many lines as sums take
        weigh<WHOLE>(row + (long long)ix_begin * batch, y + ((long long)blockIdx.x * size.out_width + ox) * batch,
                     iy_end - iy_begin, ix_end - ix_begin, size.width, batch, weight, share);
    }
}

extern "C" __global__ void avgpool_forward(const real* __restrict__ x, real* __restrict__ y, int height, int width,
                                           int out_height, int out_width, int batch, int kernel_h, int kernel_w, int stride,
                                           int padding) {
    const Pooling size{height, width, out_height, out_width, batch, kernel_h, kernel_w, stride, padding};
    if (whole_images(batch, x, y)) forward_row<true>(x, y, size);
    else forward_row<false>(x, y, size);
}

template <bool WHOLE>
__device__ __forceinline__ void backward_row(const real* __restrict__ dy, real* __restrict__ dx, const Pooling& size) {
    const int c = blockIdx.x / size.height, iy = blockIdx.x % size.height, batch = size.batch;
    const acc weight = acc(1) / (size.kernel_h * size.kernel_w);
    const int oy_begin = first_window(iy, size.kernel_h, size.stride, size.padding);
    const int rows = end_of_windows(iy, size.stride, size.padding, size.out_height) - oy_begin;
    const real* row = dy + ((long long)c * size.out_height + oy_begin) * size.out_width * batch;
    const Share share = share_of<WHOLE>(batch);
    WindowsAt windows;
    for (int ix = share.pixel; ix < size.width; ix += share.pixels) {
        windows.move_to(ix, size.kernel_w, size.stride, size.padding, size.out_width);
        weigh<WHOLE>(row + (long long)windows.begin * batch, dx + ((long long)blockIdx.x * size.width + ix) * batch,
                     rows, windows.end - windows.begin, size.out_width, batch, weight, share);
    }
}

extern "C" __global__ void avgpool_backward(const real* __restrict__ dy, real* __restrict__ dx, int height, int width,
                                            int out_height, int out_width, int batch, int kernel_h, int kernel_w, int stride,
                                            int padding) {
    const Pooling size{height, width, out_height, out_width, batch, kernel_h, kernel_w, stride, padding};
    if (whole_images(batch, dy, dx)) backward_row<true>(dy, dx, size);
    else backward_row<false>(dy, dx, size);
}
