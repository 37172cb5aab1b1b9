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
#include "common.cuh"

enum Draw { SHIFT_Y, SHIFT_X, FLIP, CUT_Y, CUT_X, DRAWS };

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

// Grid: one block per channel and row of pixels; threads run along the batch.
extern "C" __global__ void augment_apply(const unsigned char* __restrict__ images, const int* __restrict__ indices,
                                         const int* __restrict__ draws, const acc* __restrict__ scale,
                                         const acc* __restrict__ shift, real* __restrict__ x, int channels, int height,
                                         int width, int batch, int reflect, int cutout) {
    const int c = blockIdx.x / height, y = blockIdx.x % height;
    const acc factor = scale[c], offset = shift[c];
    real* x_row = x + (long long)blockIdx.x * width * batch;
    BLOCK_LOOP(n, 0, batch) {
        const bool flip = draws[FLIP * batch + n];
        const int dx = draws[SHIFT_X * batch + n], cut_x = draws[CUT_X * batch + n], cut_y = draws[CUT_Y * batch + n];
        const bool cut_row = y >= cut_y && y < cut_y + cutout;
        int from_y = y + draws[SHIFT_Y * batch + n];
        bool row_inside = from_y >= 0 && from_y < height;
        if (!row_inside) from_y = !reflect ? 0 : from_y < 0 ? -from_y : 2 * (height - 1) - from_y;
        row_inside = row_inside || reflect;
        const unsigned char* image_row = images + (((long long)indices[n] * channels + c) * height + from_y) * width;
        for (int i = 0; i < width; ++i) {
            int from_x = (flip ? width - 1 - i : i) + dx;
            bool inside = from_x >= 0 && from_x < width;
            if (!inside) from_x = !reflect ? 0 : from_x < 0 ? -from_x : 2 * (width - 1) - from_x;
            inside = row_inside && (inside || reflect) && !(cut_row && i >= cut_x && i < cut_x + cutout);
            x_row[(long long)i * batch + n] = real(inside ? acc(image_row[from_x]) * factor + offset : acc(0));
        }
    }
}

// In place: each thread takes both of a pair. With an odd batch, the one in the middle has itself as partner, and stays.
// Grid: one block per row of pixels, of all channels; threads run along half the batch.
extern "C" __global__ void augment_mix(real* __restrict__ x, const acc* __restrict__ share, int width, int batch) {
    const acc of_self = *share, of_partner = 1 - of_self;
    real* x_row = x + (long long)blockIdx.x * width * batch;
    BLOCK_LOOP(n, 0, batch / 2) {
        for (int i = 0; i < width; ++i) {
            real* pixel = x_row + (long long)i * batch;
            const acc one = acc(pixel[n]), other = acc(pixel[batch - 1 - n]);
            pixel[n] = real(of_self * one + of_partner * other);
            pixel[batch - 1 - n] = real(of_self * other + of_partner * one);
        }
    }
}
