// Pixels with all their images, shared by the threads of a block: each has some images of some of the pixels. On a GPU a thread
// takes 16 bytes of images at a time, where batch and arrays allow it (WHOLE), and else one image; in the fast host target, a
// vector of them.
//
//   const Share share = share_of<WHOLE>(batch);
//   for (int i = share.pixel; i < pixels; i += share.pixels)
//       for (int n = share.image; n < batch; n += share.images) {
//           Images<WHOLE> sum{};                                  // of y[i] = a[i] + b[i], for example
//           each(add_to, sum, load_images<WHOLE>(a + i * batch + n, batch - n));
//           each(add_to, sum, load_images<WHOLE>(b + i * batch + n, batch - n));
//           store_images<WHOLE>(y + i * batch + n, sum, batch - n);
//       }
//
// WHOLE: whole_images(batch, a, b, y), asked once and outside. `each` calls a function of single images, or of vectors of them.
// Numbers are integers that go with images, one for each.
#pragma once
#include "rows.cuh"

// What a thread has: the pixels from `pixel` on, each `pixels`-th; of each the images from `image` on, in steps of `images`.
struct Share {
    int pixel, pixels, image, images;
};

constexpr auto add_to = [](auto& sum, auto value) { sum += value; };

#ifdef MINIDL_FAST

template <bool WHOLE>
using Images = lanes;
template <bool WHOLE>
using Numbers = integers;

template <class... Stored>
__device__ __forceinline__ bool whole_images(int batch, const Stored*...) {
    return whole_lanes(batch);
}

template <bool WHOLE>
__device__ __forceinline__ Share share_of(int) {
    return {0, 1, 0, LANES};
}

__device__ __forceinline__ Positions<int> of_share(int count, Share) { return of_block(0, count); }

template <class Function, class... Values>
__device__ __forceinline__ void each(Function function, Values&&... values) {
    function(values...);
}

template <bool WHOLE>
__device__ __forceinline__ Numbers<WHOLE> same_number(int number) {
    return integers{} + number;
}

template <bool WHOLE>
__device__ __forceinline__ Images<WHOLE> load_images(const real* source, int left) {
    return load<WHOLE>(source, left);
}

template <bool WHOLE, class Stored>
__device__ __forceinline__ Numbers<WHOLE> load_numbers(const Stored* source, int left) {
    return load_integers<WHOLE>(source, left);
}

template <bool WHOLE>
__device__ __forceinline__ void store_images(real* target, const Images<WHOLE>& values, int left) {
    store<WHOLE>(target, values, left);
}

template <bool WHOLE, class Stored>
__device__ __forceinline__ void store_numbers(Stored* target, const Numbers<WHOLE>& values, int left) {
    store_integers<WHOLE>(target, values, left);
}

#else

template <class Value, int COUNT>
struct Several {
    Value of[COUNT];
};

#define IMAGES (WHOLE ? PIECE : 1)  // at a time

template <bool WHOLE>
using Images = Several<acc, IMAGES>;
template <bool WHOLE>
using Numbers = Several<int, IMAGES>;

template <class... Stored>
__device__ __forceinline__ bool whole_images(int batch, const Stored*... arrays) {
    return batch % PIECE == 0 && (begins_with_piece(arrays) && ...);
}

// As many threads as a pixel needs, or all, go along its images; the others have the next pixels.
template <bool WHOLE>
__device__ __forceinline__ Share share_of(int batch) {
    const int needed = (batch + IMAGES - 1) / IMAGES, along = needed < (int)blockDim.x ? needed : (int)blockDim.x;
    const int pixels = blockDim.x / along, pixel = threadIdx.x / along;
    const int nothing = 0x7FFFFFFF - MAX_THREADS;  // for threads that are too few for one more pixel
    return {pixel < pixels ? pixel : nothing, pixels, (int)threadIdx.x % along * IMAGES, along * IMAGES};
}

// Positions 0 .. count-1 of a row, of those who share a pixel (WHOLE).
__device__ __forceinline__ Positions<int> of_share(int count, Share share) {
    return {0, count, share.image / PIECE, share.images / PIECE};
}

template <class Function, class First, int COUNT, class... Values>
__device__ __forceinline__ void each_of(Function function, Several<First, COUNT>& first, Values&... values) {
    UNROLL for (int k = 0; k < COUNT; ++k) function(first.of[k], values.of[k]...);
}

template <class Function, class... Values>
__device__ __forceinline__ void each(Function function, Values&&... values) {
    each_of(function, values...);
}

template <bool WHOLE>
__device__ __forceinline__ Numbers<WHOLE> same_number(int number) {
    Numbers<WHOLE> numbers;
    each([=](int& each) { each = number; }, numbers);
    return numbers;
}

template <class Value, bool WHOLE, class Stored>
__device__ __forceinline__ Several<Value, IMAGES> load_several(const Stored* source) {
    Several<Value, IMAGES> values;
    if constexpr (WHOLE) {
        const Piece<Stored> piece = piece_at(source);
        UNROLL for (int k = 0; k < PIECE; ++k) values.of[k] = Value(piece.values[k]);
    } else values.of[0] = Value(*source);
    return values;
}

template <class Stored, class Value, int COUNT>
__device__ __forceinline__ void store_several(Stored* target, const Several<Value, COUNT>& values) {
    if constexpr (COUNT > 1) {
        Piece<Stored> piece;
        UNROLL for (int k = 0; k < COUNT; ++k) piece.values[k] = Stored(values.of[k]);
        *(Piece<Stored>*)target = piece;
    } else *target = Stored(values.of[0]);
}

template <bool WHOLE>
__device__ __forceinline__ Images<WHOLE> load_images(const real* source, int) {
    return load_several<acc, WHOLE>(source);
}

template <bool WHOLE, class Stored>
__device__ __forceinline__ Numbers<WHOLE> load_numbers(const Stored* source, int) {
    return load_several<int, WHOLE>(source);
}

template <bool WHOLE>
__device__ __forceinline__ void store_images(real* target, const Images<WHOLE>& values, int) {
    store_several(target, values);
}

template <bool WHOLE, class Stored>
__device__ __forceinline__ void store_numbers(Stored* target, const Numbers<WHOLE>& values, int) {
    store_several(target, values);
}

#endif
