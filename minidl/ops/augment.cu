// Batches from a data set of uint8 images on the device: chosen, normalized, cropped, flipped, cut out, and turned
// from (N, C, H, W) to (C, H, W, N). Cutout: DeVries, Taylor, arXiv 1708.04552.
//
//   x[c, y, x, n] = image[c, y + dy, x' + dx] * scale[c] + shift[c],   x' = width-1-x where flipped, else x
//
// Outside the image: 0 after normalization (the mean colour), or the image mirrored about its border pixels.
//
// A draw is five numbers per image, draws (5, N): dy, dx in -padding..padding, flip, and the upper left corner of the
// cutout square (a square that lies outside the image cuts nothing).
//
// Mixup: Zhang et al., arXiv 1710.09412. The partner of image n is N-1-n: batches are in random order anyway.
//   x[..., n] = share * x[..., n] + (1 - share) * x[..., N-1-n]
#include "philox.cuh"

enum Draw { SHIFT_Y, SHIFT_X, FLIP, CUT_Y, CUT_X };

// Draws for one batch: a pure function of (key, *step, position in the batch). Also gathers the labels.
// The centre of the square is uniform over the pixels, so at borders a part of it is outside.
extern "C" __global__ void augment_draw(const int* __restrict__ indices, const int* __restrict__ labels,
                                        const long long* __restrict__ step, int* __restrict__ draws,
                                        int* __restrict__ batch_labels, int batch, int height, int width,
                                        unsigned long long key, int padding, int flips, int cutout) {
    const unsigned now = (unsigned)*step, now_high = (unsigned)(*step >> 32);
    GRID_LOOP(n, batch) {
        unsigned place[] = {(unsigned)n, 0, now, now_high}, cut[] = {(unsigned)n, 1, now, now_high};
        philox(key, place);
        philox(key, cut);
        const unsigned shifts = 2 * padding + 1;
        draws[SHIFT_Y * batch + n] = (int)(place[0] % shifts) - padding;
        draws[SHIFT_X * batch + n] = (int)(place[1] % shifts) - padding;
        draws[FLIP * batch + n] = flips ? place[2] >> 31 : 0;
        draws[CUT_Y * batch + n] = (int)(cut[0] % height) - cutout / 2;
        draws[CUT_X * batch + n] = (int)(cut[1] % width) - cutout / 2;
        batch_labels[n] = labels[indices[n]];
    }
}

// The place in 0..size-1 of which `at` is the mirror image.
template <class Integers>
__device__ __forceinline__ Integers mirrored(Integers at, int size) {
    return at < 0 ? -at : at >= size ? 2 * (size - 1) - at : at;
}

// READ: how many pixels, neighbours in the image, are read at a time. Those that lie outside of it have mirror images that are
// neighbours, too.
template <bool WHOLE, int READ>
__device__ __forceinline__ void apply_row(const unsigned char* __restrict__ images, const int* __restrict__ indices,
                                          const int* __restrict__ draws, acc factor, acc offset, real* __restrict__ x_row,
                                          int channels, int height, int width, int batch, int reflect, int cutout) {
    const int c = blockIdx.x / height, y = blockIdx.x % height, last = width - READ;
    const integers zero{};
    LANE_LOOP(n, batch) {
        const int left = batch - n;
        const unsigned char* rows[LANES];
        for (int i = 0; i < LANES; ++i) {
            const int image = i < left ? n + i : n, from_y = y + draws[SHIFT_Y * batch + image];
            const bool inside = from_y >= 0 && from_y < height;
            const int row = inside || reflect ? mirrored(from_y, height) : 0;
            rows[i] = images + (((long long)indices[image] * channels + c) * height + row) * width;
            prefetch(rows[i] + 128);  // no processor foresees rows of so many images
        }
        const auto draw = [=](Draw which) { return load_integers<WHOLE>(draws + which * batch + n, left); };
        const integers flip = draw(FLIP), dx = draw(SHIFT_X), from_y = draw(SHIFT_Y) + y, cut_y = draw(CUT_Y);
        const integers cut_x = draw(CUT_X), cut_end = ((y >= cut_y) & (y < cut_y + cutout)) ? cut_x + cutout : cut_x;
        for (int i = 0; i < width; i += READ) {
            const integers first = dx + (flip != 0 ? zero + last - i : zero + i), end = first + READ - 1;
            integers begin = first < 0 ? -end : end >= width ? 2 * (width - 1) - end : first;
            begin = begin < 0 ? zero : begin > last ? zero + last : begin;
            const integers pixels = bytes_at<READ>(rows, begin);
            UNROLL for (int k = 0; k < READ; ++k) {
                if (i + k >= width) break;
                const integers from = first + (flip != 0 ? zero + READ - 1 - k : zero + k);
                const integers pixel = (pixels >> (8 * (mirrored(from, width) - begin) & 31)) & 255;
                const auto inside = (from_y >= 0) & (from_y < height) & (from >= 0) & (from < width);
                const auto seen = (inside | (zero + reflect != 0)) & ((i + k < cut_x) | (i + k >= cut_end));
                store<WHOLE>(x_row + (long long)(i + k) * batch + n, seen ? as_lanes(pixel) * factor + offset : lanes{}, left);
            }
        }
    }
}

// Grid: one block per row of pixels, of all channels; threads run along the batch.
extern "C" __global__ void augment_apply(const unsigned char* __restrict__ images, const int* __restrict__ indices,
                                         const int* __restrict__ draws, const acc* __restrict__ scale,
                                         const acc* __restrict__ shift, real* __restrict__ x, int channels, int height,
                                         int width, int batch, int reflect, int cutout) {
    const acc factor = scale[blockIdx.x / height], offset = shift[blockIdx.x / height];
    real* x_row = x + (long long)blockIdx.x * width * batch;
    if (width < MOST_BYTES)
        apply_row<false, 1>(images, indices, draws, factor, offset, x_row, channels, height, width, batch, reflect, cutout);
    else if (whole_lanes(batch)) apply_row<true, MOST_BYTES>(images, indices, draws, factor, offset, x_row, channels, height,
                                                             width, batch, reflect, cutout);
    else apply_row<false, MOST_BYTES>(images, indices, draws, factor, offset, x_row, channels, height, width, batch, reflect,
                                      cutout);
}

// In place: each thread takes both of a pair. With an odd batch, the one in the middle has itself as partner, and stays.
// Grid: one block per row of pixels, of all channels; threads run along half the batch.
extern "C" __global__ void augment_mix(real* __restrict__ x, const acc* __restrict__ share, int width, int batch) {
    const acc of_self = *share, of_partner = 1 - of_self;
    real* x_row = x + (long long)blockIdx.x * width * batch;
    for (int i = 0; i < width; ++i) {
        real *first = x_row + (long long)i * batch, *last = first + batch - 1;
        BLOCK_LOOP(n, 0, batch / 2) {
            const acc one = acc(first[n]), other = acc(last[-n]);
            first[n] = real(of_self * one + of_partner * other);
            last[-n] = real(of_self * other + of_partner * one);
        }
    }
}
