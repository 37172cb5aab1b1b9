// Matrix products of convolutions on the CPU:
//
//   y[b, m, p]  = sum over k of w[b, m, k] * cols[b, k, p]         (gemm_panels)
//   dw[b, m, k] = sum over p of dy[b, m, p] * cols[b, k, p]        (gemm_rows)
//
// for a stack of B matrices. Rows of dy and cols lie `step` apart, so that whoever writes them can keep them from meeting in
// the same lines of a cache, as rows of a power of two do. For y, w is `packed` in tiles of ROWS rows, (B, tiles, K, ROWS),
// the missing rows of the last one 0: a tile of sums, ROWS x PANEL, stays in registers while k runs along w and down a panel
// of PANEL columns, which stays in the cache for all tiles of w. Goto, van de Geijn, "Anatomy of high-performance matrix
// multiplication", ACM TOMS 34, 2008; Van Zee, van de Geijn, "BLIS", ACM TOMS 41, 2015: here ROWS x PANEL is their micro-tile.
#include "epilogue.cuh"
#include "packed_gemm.cuh"

#ifndef MINIDL_FAST
#define DW_ROWS 3
#define DW_COLUMNS 2
#define UNIT 1
#define SEGMENT 64
#else
#define UNIT LANES
#define SEGMENT 1024  // columns: with DW_BLOCK rows, of floats, 400 kB
#ifdef FEW_REGISTERS
#define DW_ROWS 3
#define DW_COLUMNS 3
#else
#define DW_ROWS 6
#define DW_COLUMNS 4
#endif
#endif
#define DW_BLOCK (16 * DW_ROWS)

// sizes (6): ROWS, PANEL, VECTOR_COLUMNS, DW_BLOCK, DW_COLUMNS, and how many columns are loaded at once. `like` decides the type.
extern "C" __global__ void gemm_sizes(const real* __restrict__ like, int* __restrict__ sizes) {
    if (blockIdx.x == 0 && threadIdx.x == 0)
        sizes[0] = ROWS, sizes[1] = PANEL, sizes[2] = VECTOR_COLUMNS, sizes[3] = DW_BLOCK, sizes[4] = DW_COLUMNS, sizes[5] = UNIT;
}

// packed (B, tiles, K, rows) of w, whose elements [b, m, k] lie at b * M * K + m * m_step + k * k_step. Grid: B x tiles.
extern "C" __global__ void gemm_pack(const real* __restrict__ w, acc* __restrict__ packed, int m, int k, long long m_step,
                                     long long k_step, int rows) {
    const int tiles = (m + rows - 1) / rows, first = blockIdx.x % tiles * rows;
    const real* w_rows = w + (long long)(blockIdx.x / tiles) * m * k + first * m_step;
    acc* tile = packed + (long long)blockIdx.x * k * rows;
    BLOCK_LOOP(i, 0, k)
        for (int r = 0; r < rows; ++r)
            tile[(long long)i * rows + r] = first + r < m ? acc(w_rows[r * m_step + i * k_step]) : acc(0);
}

// channel: that of the first row.
template <bool WHOLE>
__device__ __forceinline__ void multiply_tile(const acc* __restrict__ w, const real* __restrict__ panel, long long step,
                                              const Epilogue& epilogue, long long channel, real* y, long long y_step, int depth,
                                              int rows, int columns) {
    LANE_LOOP(n, VECTOR_COLUMNS) {
        UNROLL for (int r = 0; r < ROWS; ++r)
            if (WHOLE) prefetch_to_write(y + r * y_step + n, PANEL);
        lanes sums[ROWS][VECTORS] = {};
        tile_sums(w, panel + n, step, depth, sums);
        UNROLL for (int r = 0; r < ROWS; ++r) {
            const acc bias = WHOLE || r < rows ? epilogue.bias_of(channel + r) : acc(0);
            UNROLL for (int j = 0; j < VECTORS; ++j) {
                const int left = columns - j * VECTOR_COLUMNS - n;
                if (WHOLE || (r < rows && left > 0))
                    epilogue.store_result<WHOLE>(y + r * y_step + j * VECTOR_COLUMNS + n, sums[r][j], bias, left);
            }
        }
    }
}

// cols (B, K, step), of which the first `columns` count, and as many as fill the last panel are read; y (B, M, y_step), where
// those from y_begin are written. bias (B, M), plus like y. Grid: B x panels x parts of the tiles.
extern "C" __global__ void gemm_panels(const acc* __restrict__ packed, const real* __restrict__ cols, real* y,
                                       OPTIONAL const acc* __restrict__ bias, OPTIONAL const real* plus, int m, int k,
                                       int columns, long long step, long long y_begin, long long y_step, int parts) {
    const int panels = (columns + PANEL - 1) / PANEL, panel = blockIdx.x / parts % panels, matrix = blockIdx.x / parts / panels;
    const int tiles = (m + ROWS - 1) / ROWS, part = blockIdx.x % parts, left = columns - panel * PANEL;
    const real* values = cols + matrix * k * step + panel * PANEL;
    for (int tile = tiles * part / parts; tile < tiles * (part + 1) / parts; ++tile) {
        const acc* w = packed + ((long long)matrix * tiles + tile) * k * ROWS;
        const long long row = (long long)matrix * m + tile * ROWS;
        real* out = y + row * y_step + y_begin + panel * PANEL;
        const Epilogue epilogue{y, bias, plus};
        if (left >= PANEL && m - tile * ROWS >= ROWS)
            multiply_tile<true>(w, values, step, epilogue, row, out, y_step, k, ROWS, PANEL);
        else multiply_tile<false>(w, values, step, epilogue, row, out, y_step, k, m - tile * ROWS, left);
    }
}

// Sums over `columns` columns: the rows of dw, `depth` long, from row_begin to row_end; there the elements `first`, ...,
// DW_COLUMNS of them at most.
template <bool WHOLE>
__device__ __forceinline__ void sum_rows(const real* __restrict__ dy, const real* __restrict__ cols, acc* __restrict__ dw,
                                         int row_begin, int row_end, int depth, int first, int columns, long long step,
                                         int accumulate) {
    // The rows of cols stay in the first cache while those of dy pass, which stay in the second from block to block.
    const real* cols_rows[DW_COLUMNS];  // what is beyond the last is summed as the first, and not stored
    UNROLL for (int c = 0; c < DW_COLUMNS; ++c) cols_rows[c] = cols + (first + c < depth ? first + c : first) * step;
    for (int row = row_begin; row < row_end; row += DW_ROWS) {
        const real* dy_rows[DW_ROWS];
        UNROLL for (int r = 0; r < DW_ROWS; ++r) dy_rows[r] = dy + (row + r < row_end ? row + r : row) * step;
        lanes sums[DW_ROWS * DW_COLUMNS] = {};
        LANE_LOOP(n, columns) {
            lanes a[DW_ROWS];
            UNROLL for (int r = 0; r < DW_ROWS; ++r) a[r] = load<WHOLE>(dy_rows[r] + n, columns - n);
            UNROLL for (int c = 0; c < DW_COLUMNS; ++c) {
                const lanes b = load<WHOLE>(cols_rows[c] + n, columns - n);
                UNROLL for (int r = 0; r < DW_ROWS; ++r) sums[r * DW_COLUMNS + c] += a[r] * b;
            }
        }
        acc totals[DW_ROWS * DW_COLUMNS];
        sum_each(sums, totals);
        UNROLL for (int r = 0; r < DW_ROWS; ++r)
            UNROLL for (int c = 0; c < DW_COLUMNS; ++c)
                if (threadIdx.x == 0 && row + r < row_end && first + c < depth) {
                    acc* element = dw + (long long)(row + r) * depth + first + c;
                    *element = (accumulate ? *element : acc(0)) + totals[r * DW_COLUMNS + c];
                }
    }
}

// The first row of a block: they are as equal as tiles of DW_ROWS rows allow.
__device__ __forceinline__ int row_of_block(int m, int blocks, int block) {
    const int tiles = (m + DW_ROWS - 1) / DW_ROWS, row = tiles * block / blocks * DW_ROWS;
    return row < m ? row : m;
}

// dy (B, M, step), cols (B, K, step), of which the first `columns` count, matrices so far apart; dw (B, M, K) is added to or
// overwritten.
// Grid: B x blocks of DW_BLOCK rows x strips of K, of `strip` tiles. They are summed a segment of columns at a time, so that
// the rows of dy are in the second cache for all tiles but the first.
extern "C" __global__ void gemm_rows(const real* __restrict__ dy, const real* __restrict__ cols, acc* __restrict__ dw, int m,
                                     int k, int columns, long long step, long long dy_matrix, long long cols_matrix,
                                     int accumulate, int strip) {
    const int tiles = (k + DW_COLUMNS - 1) / DW_COLUMNS, strips = (tiles + strip - 1) / strip;
    const int first_tile = blockIdx.x % strips * strip, end_tile = tiles - first_tile < strip ? tiles : first_tile + strip;
    const int blocks = (m + DW_BLOCK - 1) / DW_BLOCK, block = blockIdx.x / strips % blocks;
    const int begin = row_of_block(m, blocks, block), end = row_of_block(m, blocks, block + 1);
    const long long matrix = blockIdx.x / strips / blocks;
    acc* out = dw + matrix * m * k;
    for (int column = 0; column < columns; column += SEGMENT) {
        const int count = columns - column < SEGMENT ? columns - column : SEGMENT, adds = accumulate || column > 0;
        const real *dy_rows = dy + matrix * dy_matrix + column, *cols_rows = cols + matrix * cols_matrix + column;
        for (int tile = first_tile; tile < end_tile; ++tile) {
            const int first = tile * DW_COLUMNS;
            if (whole_lanes(count)) sum_rows<true>(dy_rows, cols_rows, out, begin, end, k, first, count, step, adds);
            else sum_rows<false>(dy_rows, cols_rows, out, begin, end, k, first, count, step, adds);
        }
    }
}
