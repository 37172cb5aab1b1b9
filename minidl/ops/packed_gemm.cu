// Convolutions on the CPU, as matrix products with cols (conv.cu), of which only what fits the second cache exists at a time:
//
//   y[b, m, p]  = sum over k of w[b, m, k] * cols[b, k, p]         (conv_panels)
//   dw[b, m, k] = sum over p of dy[b, m, p] * cols[b, k, p]        (conv_rows; gemm_rows, of cols that somebody else wrote)
//
// for a stack of B matrices, groups of channels. A block unfolds a strip of cols into memory of its own, and multiplies all that
// it has to with it. For y, w is `packed` in tiles of ROWS rows, (B, tiles, K, ROWS), the missing rows of the last one 0: a tile
// of sums, ROWS x PANEL, stays in registers while k runs along w and down a panel of PANEL columns. Goto, van de Geijn, "Anatomy
// of high-performance matrix multiplication", ACM TOMS 34, 2008; Van Zee, van de Geijn, "BLIS", ACM TOMS 41, 2015: here
// ROWS x PANEL is their micro-tile. For dw, a tile of sums has a vector for each pair of a row of dy and one of cols.
#include "epilogue.cuh"
#include "packed_gemm.cuh"
#include "unfold.cuh"

#ifndef MINIDL_FAST
#define DW_ROWS 3
#define DW_COLUMNS 2
#define UNIT 1
#define SEGMENT 64
#else
#define UNIT LANES
#define SEGMENT 768  // columns: DW_ROWS + DW_COLUMNS rows of floats have 30 kB, and stay in the first cache
#ifdef FEW_REGISTERS
#define DW_ROWS 3
#define DW_COLUMNS 3
#else
#define DW_ROWS 6
#define DW_COLUMNS 4
#endif
#endif
#define SEGMENT_PITCH (SEGMENT + UNIT)  // from one row of a strip of cols to the next: not in the same lines of a cache

// sizes (8): ROWS, PANEL, VECTOR_COLUMNS, DW_ROWS, DW_COLUMNS, SEGMENT, SEGMENT_PITCH, and how many columns are loaded at once.
// `like` decides the type.
extern "C" __global__ void gemm_sizes(const real* __restrict__ like, int* __restrict__ sizes) {
    const int all[] = {ROWS, PANEL, VECTOR_COLUMNS, DW_ROWS, DW_COLUMNS, SEGMENT, SEGMENT_PITCH, UNIT};
    if (blockIdx.x == 0 && threadIdx.x == 0)
        for (int i = 0; i < 8; ++i) sizes[i] = all[i];
}

// packed (B, tiles, K, rows) of w, whose elements [b, m, k] lie at b * M * K + m * m_pitch + k * k_pitch. Grid: B x tiles.
extern "C" __global__ void gemm_pack(const real* __restrict__ w, acc* __restrict__ packed, int m, int k, long long m_pitch,
                                     long long k_pitch, int rows) {
    const int tiles = (m + rows - 1) / rows, first = blockIdx.x % tiles * rows;
    const real* w_rows = w + (long long)(blockIdx.x / tiles) * m * k + first * m_pitch;
    acc* tile = packed + (long long)blockIdx.x * k * rows;
    BLOCK_LOOP(i, 0, k)
        for (int r = 0; r < rows; ++r)
            tile[(long long)i * rows + r] = first + r < m ? acc(w_rows[r * m_pitch + i * k_pitch]) : acc(0);
}

// channel: that of the first row.
template <bool WHOLE>
__device__ __forceinline__ void multiply_tile(const acc* __restrict__ w, const real* __restrict__ panel, long long pitch,
                                              const Epilogue& epilogue, long long channel, real* y, long long y_pitch,
                                              int depth, int rows, int columns) {
    LANE_LOOP(n, VECTOR_COLUMNS) {
        UNROLL for (int r = 0; r < ROWS; ++r)
            if (WHOLE) prefetch_to_write(y + r * y_pitch + n, PANEL);
        lanes sums[ROWS][VECTORS] = {};
        tile_sums(w, panel + n, pitch, depth, sums);
        UNROLL for (int r = 0; r < ROWS; ++r) {
            const acc bias = WHOLE || r < rows ? epilogue.bias_of(channel + r) : acc(0);
            UNROLL for (int j = 0; j < VECTORS; ++j) {
                const int left = columns - j * VECTOR_COLUMNS - n;
                if (WHOLE || (r < rows && left > 0))
                    epilogue.store_result<WHOLE>(y + r * y_pitch + j * VECTOR_COLUMNS + n, sums[r][j], bias, left);
            }
        }
    }
}

// x (B * channels, height, width, batch); y (B, M, columns), of the columns of cols from column_begin on. bias (B, M), plus like
// y. A step is a group, a strip of up to `strip` columns, whole panels, and one of `parts` of the tiles of w; blocks share the
// steps, each with its own part of cols (blocks, K, pitch).
extern "C" __global__ void conv_panels(const acc* __restrict__ packed, const real* __restrict__ x, real* __restrict__ cols,
                                       real* y, OPTIONAL const acc* __restrict__ bias, OPTIONAL const real* plus, int matrices,
                                       int m, int channels, int height, int width, int out_width, int batch, int kernel_h,
                                       int kernel_w, int stride, int padding, long long column_begin, long long columns,
                                       int strip, int pitch, int parts) {
    const Windows windows{height, width, out_width, batch, kernel_h, kernel_w, stride, padding};
    const Epilogue epilogue{y, bias, plus};
    const int k = channels * kernel_h * kernel_w, tiles = (m + ROWS - 1) / ROWS;
    const long long strips = (columns + strip - 1) / strip, steps = matrices * strips * parts;
    const long long first_step = steps * blockIdx.x / gridDim.x, end_step = steps * (blockIdx.x + 1) / gridDim.x;
    real* its_cols = cols + (long long)blockIdx.x * k * pitch;
    for (long long s = first_step; s < end_step; ++s) {
        const int part = s % parts;
        const long long matrix = s / parts / strips, first = s / parts % strips * strip;
        const int count = columns - first < strip ? columns - first : strip;
        if (part == 0 || s == first_step) {
            __syncthreads();  // all have read what the strip before was
            unfold(x + matrix * channels * windows.channel(), its_cols, windows, 0, k, column_begin + first, count, pitch);
            __syncthreads();
        }
        for (int tile = tiles * part / parts; tile < tiles * (part + 1) / parts; ++tile) {
            const acc* w = packed + (matrix * tiles + tile) * k * ROWS;
            const long long row = matrix * m + tile * ROWS;
            for (int n = 0; n < count; n += PANEL) {
                real* out = y + row * columns + first + n;
                if (count - n >= PANEL && m - tile * ROWS >= ROWS)
                    multiply_tile<true>(w, its_cols + n, pitch, epilogue, row, out, columns, k, ROWS, PANEL);
                else multiply_tile<false>(w, its_cols + n, pitch, epilogue, row, out, columns, k, m - tile * ROWS, count - n);
            }
        }
    }
}

// A tile of dw, `depth` long rows, of up to DW_ROWS rows of dy and DW_COLUMNS of cols: sums over `columns` columns.
template <bool WHOLE>
__device__ __forceinline__ void sum_tile(const real* __restrict__ dy, long long dy_pitch, int rows,
                                         const real* __restrict__ cols, long long cols_pitch, int cols_rows,
                                         acc* __restrict__ dw, int depth, int columns, bool adds) {
    // What is beyond the last is summed as the first, and not stored.
    const real *of_dy[DW_ROWS], *of_cols[DW_COLUMNS];
    UNROLL for (int r = 0; r < DW_ROWS; ++r) of_dy[r] = dy + (r < rows ? r : 0) * dy_pitch;
    UNROLL for (int c = 0; c < DW_COLUMNS; ++c) of_cols[c] = cols + (c < cols_rows ? c : 0) * cols_pitch;
    lanes sums[DW_ROWS * DW_COLUMNS] = {};
    LANE_LOOP(n, columns) {
        lanes a[DW_ROWS];
        UNROLL for (int r = 0; r < DW_ROWS; ++r) a[r] = load<WHOLE>(of_dy[r] + n, columns - n);
        UNROLL for (int c = 0; c < DW_COLUMNS; ++c) {
            const lanes b = load<WHOLE>(of_cols[c] + n, columns - n);
            UNROLL for (int r = 0; r < DW_ROWS; ++r) sums[r * DW_COLUMNS + c] += a[r] * b;
        }
    }
    acc totals[DW_ROWS * DW_COLUMNS];
    sum_each(sums, totals);
    UNROLL for (int r = 0; r < DW_ROWS; ++r)
        UNROLL for (int c = 0; c < DW_COLUMNS; ++c)
            if (threadIdx.x == 0 && r < rows && c < cols_rows) {
                acc* element = dw + (long long)r * depth + c;
                *element = (adds ? *element : acc(0)) + totals[r * DW_COLUMNS + c];
            }
}

// dw (M, K), its rows row_begin .. row_end - 1 and elements k_begin .. k_end - 1 of them: sums over up to SEGMENT columns. dy and
// cols begin with the first of those rows, and elements. The rows of dy stay in the first cache while those of cols pass, which
// stay in the second.
__device__ __forceinline__ void sum_segment(const real* __restrict__ dy, long long dy_pitch, const real* __restrict__ cols,
                                            long long cols_pitch, acc* __restrict__ dw, int row_begin, int row_end, int k_begin,
                                            int k_end, int depth, int columns, bool adds) {
    for (int row = row_begin; row < row_end; row += DW_ROWS)
        for (int k = k_begin; k < k_end; k += DW_COLUMNS) {
            const real *its_dy = dy + (row - row_begin) * dy_pitch, *its_cols = cols + (k - k_begin) * cols_pitch;
            acc* tile = dw + (long long)row * depth + k;
            if (whole_lanes(columns))
                sum_tile<true>(its_dy, dy_pitch, row_end - row, its_cols, cols_pitch, k_end - k, tile, depth, columns, adds);
            else sum_tile<false>(its_dy, dy_pitch, row_end - row, its_cols, cols_pitch, k_end - k, tile, depth, columns, adds);
        }
}

// What a step sums: one of `parts` of the rows of dw, whole tiles, and `strip` tiles of the elements of those rows.
struct Part {
    long long matrix;
    int row_begin, row_end, k_begin, k_end;

    __device__ Part(long long step, int m, int k, int strip, int parts) {
        const int tiles = (m + DW_ROWS - 1) / DW_ROWS, part = step % parts;
        const int width = strip * DW_COLUMNS, strips = (k + width - 1) / width;
        matrix = step / parts / strips;
        row_begin = tiles * part / parts * DW_ROWS, row_end = tiles * (part + 1) / parts * DW_ROWS;
        if (row_end > m) row_end = m;
        k_begin = (int)(step / parts % strips) * width, k_end = k - k_begin < width ? k : k_begin + width;
    }
};

// dy (B, M, pitch), cols (B, K, pitch), of which the first `columns` count, matrices so far apart; dw (B, M, K) is added to or
// overwritten. Grid: steps, B x strips x parts (Part).
extern "C" __global__ void gemm_rows(const real* __restrict__ dy, const real* __restrict__ cols, acc* __restrict__ dw, int m,
                                     int k, int columns, long long pitch, long long dy_matrix, long long cols_matrix,
                                     int accumulate, int strip, int parts) {
    const Part part(blockIdx.x, m, k, strip, parts);
    const real* dy_rows = dy + part.matrix * dy_matrix + part.row_begin * pitch;
    const real* cols_rows = cols + part.matrix * cols_matrix + part.k_begin * pitch;
    for (int column = 0; column < columns; column += SEGMENT)
        sum_segment(dy_rows + column, pitch, cols_rows + column, pitch, dw + part.matrix * m * k, part.row_begin, part.row_end,
                    part.k_begin, part.k_end, k, columns - column < SEGMENT ? columns - column : SEGMENT,
                    accumulate || column > 0);
}

// The same of dy (B, M, columns) and of the unfolded x (B * channels, height, width, batch); dw (column_parts, B, M, K), one for
// each part of the columns, whole segments. Blocks share the steps, column_parts x B x strips x row_parts, each with its own part
// of cols (blocks, strip * DW_COLUMNS, SEGMENT_PITCH).
extern "C" __global__ void conv_rows(const real* __restrict__ dy, const real* __restrict__ x, real* __restrict__ cols,
                                     acc* __restrict__ dw, int matrices, int m, int channels, int height, int width,
                                     int out_width, int batch, int kernel_h, int kernel_w, int stride, int padding,
                                     long long columns, int strip, int row_parts, int column_parts) {
    const Windows windows{height, width, out_width, batch, kernel_h, kernel_w, stride, padding};
    const int k = channels * kernel_h * kernel_w, strips = (k + strip * DW_COLUMNS - 1) / (strip * DW_COLUMNS);
    const long long segments = (columns + SEGMENT - 1) / SEGMENT;
    const long long part_steps = (long long)matrices * strips * row_parts, steps = column_parts * part_steps;
    real* its_cols = cols + (long long)blockIdx.x * strip * DW_COLUMNS * SEGMENT_PITCH;
    for (long long s = steps * blockIdx.x / gridDim.x; s < steps * (blockIdx.x + 1) / gridDim.x; ++s) {
        const Part part(s % part_steps, m, k, strip, row_parts);
        const long long column_part = s / part_steps, first = segments * column_part / column_parts;
        const real* its_dy = dy + (part.matrix * m + part.row_begin) * columns;
        acc* its_dw = dw + (column_part * matrices + part.matrix) * m * k;
        for (long long segment = first; segment < segments * (column_part + 1) / column_parts; ++segment) {
            const long long column = segment * SEGMENT;
            const int count = columns - column < SEGMENT ? columns - column : SEGMENT;
            __syncthreads();  // all have read what the segment before was
            unfold(x + part.matrix * channels * windows.channel(), its_cols, windows, part.k_begin, part.k_end, column, count,
                   SEGMENT_PITCH);
            __syncthreads();
            sum_segment(its_dy + column, columns, its_cols, SEGMENT_PITCH, its_dw, part.row_begin, part.row_end, part.k_begin,
                        part.k_end, k, count, segment > first);
        }
    }
}
