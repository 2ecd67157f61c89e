// Many arrays in one launch, between places of device memory; and matrices turned.

typedef unsigned int u32;
typedef unsigned long long u64;

#define PIECE_NBYTES 16384
#define COPY_THREADS 256

// Copy nbytes[a] bytes from[a] -> to[a] for each of `count` arrays: a gather where the targets lie in
// one slab, a scatter where the sources do. Each block copies one piece; array a has the pieces from
// first_piece[a] on.
extern "C" __global__ void __launch_bounds__(COPY_THREADS)
    copy_arrays(const u64 *from, const u64 *to, const u64 *nbytes, const u64 *first_piece,
                u32 count)
{
    u32 low = 0, high = count;
    while (high - low > 1) { // the last array that begins at or before this piece
        u32 middle = low + (high - low) / 2;
        if (first_piece[middle] <= blockIdx.x)
            low = middle;
        else
            high = middle;
    }
    u64 start = (blockIdx.x - first_piece[low]) * PIECE_NBYTES;
    u64 rest = nbytes[low] - start;
    u32 left = rest < PIECE_NBYTES ? (u32)rest : PIECE_NBYTES, done = 0;
    const unsigned char *source = (const unsigned char *)from[low] + start;
    unsigned char *target = (unsigned char *)to[low] + start;
    if (((u64)source | (u64)target) % 16 == 0) {
        done = left / 16 * 16;
#pragma unroll 4
        for (u32 i = threadIdx.x; i < left / 16; i += COPY_THREADS)
            ((uint4 *)target)[i] = __ldg((const uint4 *)source + i);
    }
    for (u32 i = done + threadIdx.x; i < left; i += COPY_THREADS)
        target[i] = __ldg(source + i);
}

#define EDGE 32
#define EDGE_ROWS 8

// Write the row-major matrix `from` of rows x columns as the row-major matrix of columns x rows. Each
// block of EDGE x EDGE_ROWS threads turns a tile of EDGE x EDGE elements within the chip, so that
// both reading and writing go along rows; the tiles are counted along the rows of `from`.
template <typename T>
static __device__ __forceinline__ void turn(T (*tile)[EDGE + 1], const T *from, T *to, u64 rows,
                                            u64 columns)
{
    u64 across = (columns + EDGE - 1) / EDGE;
    u64 top = blockIdx.x / across * EDGE, left = blockIdx.x % across * EDGE;
    u32 x = threadIdx.x % EDGE, y = threadIdx.x / EDGE;
    for (u32 i = y; i < EDGE; i += EDGE_ROWS)
        if (top + i < rows && left + x < columns)
            tile[i][x] = from[(top + i) * columns + left + x];
    __syncthreads();
    for (u32 i = y; i < EDGE; i += EDGE_ROWS)
        if (left + i < columns && top + x < rows)
            to[(left + i) * rows + top + x] = tile[x][i];
}

#define TURN(nbytes, type)                                                                        \
    extern "C" __global__ void __launch_bounds__(EDGE * EDGE_ROWS)                                \
        turn_##nbytes(const type *from, type *to, u64 rows, u64 columns)                          \
    {                                                                                             \
        __shared__ type tile[EDGE][EDGE + 1]; /* one more: no two of a column in the same bank */ \
        turn(tile, from, to, rows, columns);                                                      \
    }

TURN(1, unsigned char)
TURN(2, unsigned short)
TURN(4, u32)
TURN(8, u64)
TURN(16, ulonglong2)
