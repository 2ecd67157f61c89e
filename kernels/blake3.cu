// BLAKE3 of many arrays in device memory: a digest for each, in as many launches as a tree of the
// longest one needs, however many arrays there are (https://github.com/BLAKE3-team/BLAKE3-specs).
//
// `blake3_chunks` hashes the chunks of all arrays, one thread for each; `blake3_parents` merges up to
// TILE nodes of an array in each block, and runs until every array has one node left: its digest.
// Sums of nodes are 64-bit, so that arrays may have any size. Little-endian, as CUDA devices are.

typedef unsigned int u32;
typedef unsigned long long u64;

#define CHUNK_NBYTES 1024
#define BLOCK_NBYTES 64
#define CHUNK_THREADS 128
#define TILE 256
#define PARENT_THREADS (TILE / 2)

enum { CHUNK_START = 1, CHUNK_END = 2, PARENT = 4, ROOT = 8 };

#define IV0 0x6A09E667u
#define IV1 0xBB67AE85u
#define IV2 0x3C6EF372u
#define IV3 0xA54FF53Au
#define IV4 0x510E527Fu
#define IV5 0x9B05688Cu
#define IV6 0x1F83D9ABu
#define IV7 0x5BE0CD19u

#define G(a, b, c, d, x, y)              \
    a = a + b + x;                       \
    d = __funnelshift_r(d ^ a, d ^ a, 16); \
    c = c + d;                           \
    b = __funnelshift_r(b ^ c, b ^ c, 12); \
    a = a + b + y;                       \
    d = __funnelshift_r(d ^ a, d ^ a, 8);  \
    c = c + d;                           \
    b = __funnelshift_r(b ^ c, b ^ c, 7);

// One round over message words in the order i0 ... i15: columns, then diagonals.
#define ROUND(i0, i1, i2, i3, i4, i5, i6, i7, i8, i9, i10, i11, i12, i13, i14, i15) \
    G(s0, s4, s8, s12, m[i0], m[i1])                                                \
    G(s1, s5, s9, s13, m[i2], m[i3])                                                \
    G(s2, s6, s10, s14, m[i4], m[i5])                                               \
    G(s3, s7, s11, s15, m[i6], m[i7])                                               \
    G(s0, s5, s10, s15, m[i8], m[i9])                                               \
    G(s1, s6, s11, s12, m[i10], m[i11])                                             \
    G(s2, s7, s8, s13, m[i12], m[i13])                                              \
    G(s3, s4, s9, s14, m[i14], m[i15])

// Replace the chaining value `cv` by that of the compressed block `m`.
static __device__ __forceinline__ void compress(u32 *cv, const u32 *m, u64 counter, u32 nbytes,
                                                u32 flags)
{
    u32 s0 = cv[0], s1 = cv[1], s2 = cv[2], s3 = cv[3];
    u32 s4 = cv[4], s5 = cv[5], s6 = cv[6], s7 = cv[7];
    u32 s8 = IV0, s9 = IV1, s10 = IV2, s11 = IV3;
    u32 s12 = (u32)counter, s13 = (u32)(counter >> 32), s14 = nbytes, s15 = flags;
    // the message schedule: each row is the one before, permuted
    ROUND(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
    ROUND(2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8)
    ROUND(3, 4, 10, 12, 13, 2, 7, 14, 6, 5, 9, 0, 11, 15, 8, 1)
    ROUND(10, 7, 12, 9, 14, 3, 13, 15, 4, 0, 11, 2, 5, 8, 1, 6)
    ROUND(12, 13, 9, 11, 15, 10, 14, 8, 7, 2, 5, 3, 0, 1, 6, 4)
    ROUND(9, 14, 11, 5, 8, 12, 15, 1, 13, 3, 0, 10, 2, 6, 4, 7)
    ROUND(11, 15, 5, 0, 1, 9, 8, 6, 14, 10, 2, 12, 3, 4, 7, 13)
    cv[0] = s0 ^ s8;
    cv[1] = s1 ^ s9;
    cv[2] = s2 ^ s10;
    cv[3] = s3 ^ s11;
    cv[4] = s4 ^ s12;
    cv[5] = s5 ^ s13;
    cv[6] = s6 ^ s14;
    cv[7] = s7 ^ s15;
}

static __device__ __forceinline__ void start(u32 *cv)
{
    cv[0] = IV0, cv[1] = IV1, cv[2] = IV2, cv[3] = IV3;
    cv[4] = IV4, cv[5] = IV5, cv[6] = IV6, cv[7] = IV7;
}

// Return the last of `count` arrays that begins at or before `index`; firsts[0] is 0.
static __device__ __forceinline__ u32 owner(const u64 *firsts, u32 count, u64 index)
{
    u32 low = 0, high = count;
    while (high - low > 1) {
        u32 middle = low + (high - low) / 2;
        if (firsts[middle] <= index)
            low = middle;
        else
            high = middle;
    }
    return low;
}

// Load up to 64 bytes as 16 words, zeros after the end. __ldg says that they lie in global memory, which
// an address out of a table does not: else each access would find out where it goes.
static __device__ __forceinline__ void load_block(u32 *m, const unsigned char *from, u32 nbytes)
{
    u64 address = (u64)from;
    if (nbytes == BLOCK_NBYTES && address % 16 == 0) {
        const uint4 *words = (const uint4 *)from;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            uint4 four = __ldg(words + i);
            m[4 * i] = four.x, m[4 * i + 1] = four.y, m[4 * i + 2] = four.z, m[4 * i + 3] = four.w;
        }
    } else if (nbytes == BLOCK_NBYTES && address % 4 == 0) {
#pragma unroll
        for (int i = 0; i < 16; i++)
            m[i] = __ldg((const u32 *)from + i);
    } else {
#pragma unroll
        for (int i = 0; i < 16; i++) {
            u32 word = 0;
#pragma unroll
            for (int j = 0; j < 4; j++)
                if (4 * i + j < nbytes)
                    word |= (u32)__ldg(from + 4 * i + j) << (8 * j);
            m[i] = word;
        }
    }
}

// nodes[i] (8 words each) becomes the chaining value of chunk i of `chunks`; that of the only chunk
// of an array is its digest. Array a has the chunks from first_chunk[a] on; an empty one has one.
extern "C" __global__ void __launch_bounds__(CHUNK_THREADS)
    blake3_chunks(const u64 *addresses, const u64 *nbytes, const u64 *first_chunk, u32 count,
                  u64 chunks, u32 *nodes)
{
    u64 index = (u64)blockIdx.x * CHUNK_THREADS + threadIdx.x;
    if (index >= chunks)
        return;
    u32 array = owner(first_chunk, count, index);
    u64 chunk = index - first_chunk[array];
    const unsigned char *from = (const unsigned char *)addresses[array] + chunk * CHUNK_NBYTES;
    u64 rest = nbytes[array] - chunk * CHUNK_NBYTES;
    u32 root = nbytes[array] <= CHUNK_NBYTES ? ROOT : 0;
    u32 left = rest < CHUNK_NBYTES ? (u32)rest : CHUNK_NBYTES;
    u32 cv[8], m[16], flags = CHUNK_START;
    start(cv);
#pragma unroll 1
    while (left > BLOCK_NBYTES) {
        load_block(m, from, BLOCK_NBYTES);
        compress(cv, m, chunk, BLOCK_NBYTES, flags);
        flags = 0;
        from += BLOCK_NBYTES;
        left -= BLOCK_NBYTES;
    }
    load_block(m, from, left);
    compress(cv, m, chunk, left, flags | CHUNK_END | root);
    uint4 *to = (uint4 *)(nodes + 8 * index);
    to[0] = make_uint4(cv[0], cv[1], cv[2], cv[3]);
    to[1] = make_uint4(cv[4], cv[5], cv[6], cv[7]);
}

// Each block merges a tile of up to TILE nodes of one array into one. Array a has the nodes from
// first_node[a] to first_node[a + 1], and the tiles (blocks, and nodes of the result) likewise.
extern "C" __global__ void __launch_bounds__(PARENT_THREADS)
    blake3_parents(const u64 *first_node, const u64 *first_tile, u32 count, const u32 *nodes,
                   u32 *merged)
{
    __shared__ u32 node[8][TILE]; // by word, so that neighbours lie in different banks
    u32 array = owner(first_tile, count, blockIdx.x);
    u64 begin = first_node[array] + (blockIdx.x - first_tile[array]) * TILE;
    u64 rest = first_node[array + 1] - begin;
    u32 left = rest < TILE ? (u32)rest : TILE;
    bool is_top = first_tile[array + 1] - first_tile[array] == 1;
    u32 thread = threadIdx.x;
    for (u32 i = thread; i < left; i += PARENT_THREADS)
        for (int word = 0; word < 8; word++)
            node[word][i] = nodes[8 * (begin + i) + word];
    __syncthreads();
    while (left > 1) {
        u32 pairs = left / 2, cv[8], m[16];
        if (thread < pairs) {
#pragma unroll
            for (int word = 0; word < 8; word++) {
                m[word] = node[word][2 * thread];
                m[word + 8] = node[word][2 * thread + 1];
            }
            start(cv);
            compress(cv, m, 0, BLOCK_NBYTES, PARENT | (is_top && left == 2 ? ROOT : 0));
        } else if (thread == pairs && left % 2) { // the last one has no sibling on this level
#pragma unroll
            for (int word = 0; word < 8; word++)
                cv[word] = node[word][left - 1];
        }
        __syncthreads();
        left = pairs + left % 2;
        if (thread < left) {
#pragma unroll
            for (int word = 0; word < 8; word++)
                node[word][thread] = cv[word];
        }
        __syncthreads();
    }
    if (thread < 8)
        merged[8 * (u64)blockIdx.x + thread] = node[thread][0];
}
