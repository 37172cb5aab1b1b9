// Max-pooling over windows (kernel_h, kernel_w), with stride and padding. Padding never wins.
//
//   y[c, oy, ox, n]  = max over (ky, kx) of x[c, oy*stride - padding + ky, ox*stride - padding + kx, n]
//   dx[c, iy, ix, n] = sum of dy over the windows whose maximum is (iy, ix)
//
// Of equal values the first in reading order wins, and NaN wins over all, as in PyTorch. Forward notes the
// winner's place in its window, ky*kernel_w + kx; backward gathers, one writer per element.
//
// Grid: one block per row of pixels, (c, oy) forward and (c, iy) backward, whose pixels and images the threads share.
#include "pixels.cuh"
#include "window.cuh"

// The part of a window that lies inside the image: rows x columns pixels from `first` on, whose place is first_place.
struct Part {
    const real* first;
    int rows, columns, first_place;
};

// ROWS, COLUMNS: those of the part, where the compiler shall know them and unroll the loops; else 0.
template <int ROWS, int COLUMNS, bool WHOLE>
__device__ __forceinline__ void max_of(const Part& part, real* __restrict__ y, unsigned short* __restrict__ winner,
                                       const Pooling& size, Share share) {
    const int rows = ROWS ? ROWS : part.rows, columns = COLUMNS ? COLUMNS : part.columns, batch = size.batch;
    for (int n = share.image; n < batch; n += share.images) {
        Images<WHOLE> best = load_images<WHOLE>(part.first + n, batch - n);
        Numbers<WHOLE> best_place = same_number<WHOLE>(part.first_place);
        for (int r = 0; r < rows; ++r)
            for (int k = 0; k < columns; ++k) {
                const auto take_larger = [](auto& best, auto& best_place, auto value, auto place) {
                    const auto wins = !(value <= best) & (best == best);  // larger, or the first NaN
                    best = wins ? value : best;
                    best_place = wins ? place : best_place;
                };
                each(take_larger, best, best_place,
                     load_images<WHOLE>(part.first + ((long long)r * size.width + k) * batch + n, batch - n),
                     same_number<WHOLE>(part.first_place + r * size.kernel_w + k));
            }
        store_images<WHOLE>(y + n, best, batch - n);
        store_numbers<WHOLE>(winner + n, best_place, batch - n);
    }
}

template <bool WHOLE>
__device__ __forceinline__ void forward_row(const real* __restrict__ x, real* __restrict__ y,
                                            unsigned short* __restrict__ winner, const Pooling& size) {
    const int c = blockIdx.x / size.out_height, oy = blockIdx.x % size.out_height;
    const int y_origin = oy * size.stride - size.padding;
    const int ky_begin = y_origin < 0 ? -y_origin : 0;
    const int ky_end = size.height - y_origin < size.kernel_h ? size.height - y_origin : size.kernel_h;
    const long long row = (long long)size.width * size.batch;
    const real* first_row = x + ((long long)c * size.height + y_origin + ky_begin) * row;
    const Share share = share_of<WHOLE>(size.batch);
    for (int ox = share.pixel; ox < size.out_width; ox += share.pixels) {
        const int x_origin = ox * size.stride - size.padding;
        const int kx_begin = x_origin < 0 ? -x_origin : 0;
        const int kx_end = size.width - x_origin < size.kernel_w ? size.width - x_origin : size.kernel_w;
        const Part part{first_row + (long long)(x_origin + kx_begin) * size.batch, ky_end - ky_begin, kx_end - kx_begin,
                        ky_begin * size.kernel_w + kx_begin};
        const long long out = ((long long)blockIdx.x * size.out_width + ox) * size.batch;
        // The first cache would lose a part of long rows before they are read.
        if (row * size.stride * sizeof(real) <= 8192) prefetch_next_row<1>(first_row, ox, size);
        else prefetch_next_row<2>(first_row, ox, size);
        prefetch_to_write(y + out + 4 * size.batch, size.batch);
        prefetch_to_write(winner + out + 4 * size.batch, size.batch);
        if (part.rows == 2 && part.columns == 2) max_of<2, 2, WHOLE>(part, y + out, winner + out, size, share);
        else if (part.rows == 3 && part.columns == 3) max_of<3, 3, WHOLE>(part, y + out, winner + out, size, share);
        else max_of<0, 0, WHOLE>(part, y + out, winner + out, size, share);
    }
}

extern "C" __global__ void maxpool_forward(const real* __restrict__ x, real* __restrict__ y,
                                           unsigned short* __restrict__ winner, int height, int width, int out_height,
                                           int out_width, int batch, int kernel_h, int kernel_w, int stride, int padding) {
    const Pooling size{height, width, out_height, out_width, batch, kernel_h, kernel_w, stride, padding};
    if (whole_images(batch, x, y, winner)) forward_row<true>(x, y, winner, size);
    else forward_row<false>(x, y, winner, size);
}

// dy where the place has won in the window whose pixel is at `out`, else 0.
template <bool WHOLE>
__device__ __forceinline__ Images<WHOLE> won(const real* dy, const unsigned short* winner, long long out, int place, int left) {
    Images<WHOLE> result{};
    each([=](auto& result, auto value, auto winner) { result = winner == place ? value : result; }, result,
         load_images<WHOLE>(dy + out, left), load_numbers<WHOLE>(winner + out, left));
    return result;
}

template <bool WHOLE>
__device__ __forceinline__ void backward_row(const real* __restrict__ dy, const unsigned short* __restrict__ winner,
                                             real* __restrict__ dx, const Pooling& size) {
    const int c = blockIdx.x / size.height, iy = blockIdx.x % size.height, batch = size.batch;
    const int oy_begin = first_window(iy, size.kernel_h, size.stride, size.padding);
    const int rows = end_of_windows(iy, size.stride, size.padding, size.out_height) - oy_begin;
    const int ky = iy + size.padding - oy_begin * size.stride;
    const Share share = share_of<WHOLE>(batch);
    WindowsAt windows;
    for (int ix = share.pixel; ix < size.width; ix += share.pixels) {
        windows.move_to(ix, size.kernel_w, size.stride, size.padding, size.out_width);
        const int columns = windows.end - windows.begin;
        const int place = ky * size.kernel_w + ix + size.padding - windows.begin * size.stride;  // in the first of the windows
        const long long first = (((long long)c * size.out_height + oy_begin) * size.out_width + windows.begin) * batch;
        real* dx_pixel = dx + ((long long)blockIdx.x * size.width + ix) * batch;
        if (rows == 1 && columns == 1) {  // as everywhere if windows do not overlap
            for (int n = share.image; n < batch; n += share.images)
                store_images<WHOLE>(dx_pixel + n, won<WHOLE>(dy, winner, first + n, place, batch - n), batch - n);
            continue;
        }
        for (int n = share.image; n < batch; n += share.images) {
            Images<WHOLE> sum{};
            for (int r = 0; r < rows; ++r)
                for (int k = 0; k < columns; ++k)
                    each(add_to, sum,
                         won<WHOLE>(dy, winner, first + ((long long)r * size.out_width + k) * batch + n,
                                    place - (r * size.kernel_w + k) * size.stride, batch - n));
            store_images<WHOLE>(dx_pixel + n, sum, batch - n);
        }
    }
}

extern "C" __global__ void maxpool_backward(const real* __restrict__ dy, const unsigned short* __restrict__ winner,
                                            real* __restrict__ dx, int height, int width, int out_height, int out_width,
                                            int batch, int kernel_h, int kernel_w, int stride, int padding) {
    const Pooling size{height, width, out_height, out_width, batch, kernel_h, kernel_w, stride, padding};
    if (whole_images(batch, dy, winner, dx)) backward_row<true>(dy, winner, dx, size);
    else backward_row<false>(dy, winner, dx, size);
}
