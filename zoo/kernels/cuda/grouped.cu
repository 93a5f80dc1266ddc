// Experts' weights times the rows of x that chose them: see zoo/kernels/grouped.py.
//
// A program multiplies 256 rows of an expert's weight by up to MOST rows of x. Two groups of four warps multiply 128 rows of the weight each,
// as two tiles of 64: one tile's codes are widened in the registers that tensor cores read, while the other's are multiplied. A third group
// fetches: STAGES steps of 64 channels are on their way, those of the next tile while the last one's results are written.
//
// All products are awaited each ROUND steps: across a loop's end the compiler (ptxas of CUDA 13.0) does not see which registers are read
// still, and would wait after each of them (its note C7513).
//
// Compiled for: KIND, K (columns), COLUMNS (that share a scale, of integers), UP (gate and up, or down), TOP_K (experts that share a row of
// x), GATED, ACT, SCALE (of integers 0: bf16, 1: fp32, 2: fp16), ORDER (of the channels that are given; 0: as they are, 1: as `channel`
// puts them for bytes, 2: for four bits), MOST, STAGES, GROUP (tiles of rows of x that follow each other).

constexpr bool FOUR = KIND >= 3, OWN = KIND == 3 || KIND == 6;
constexpr int BYTES = KIND == 0 ? K * 2 : FOUR ? K / 2 : K;  // of a row
constexpr int PIECES = KIND == 0 ? 8 : FOUR ? 2 : 4;         // of 16 bytes of it in a step
constexpr int STEPS = K / 64, ROWS = 256;
constexpr int A_STEP = ROWS * PIECES * 16, B_STEP = MOST * 128, STEP = A_STEP + B_STEP;
constexpr int WIDTH = GATED ? 128 : 256;  // columns of a tile's result
constexpr int S_SIZE = KIND == 4 ? (SCALE == 1 ? 4 : 2) : 4;
constexpr int S_ROW = KIND == 6 ? 16 + (K / 16 + 15) / 16 * 16 : KIND == 3 ? K / 32 : KIND == 2 ? (K + 127) / 128 * 4
                    : KIND == 4 ? K / COLUMNS * S_SIZE : 4;
constexpr int ROUND = STEPS % 4 == 0 ? 4 : STEPS % 3 == 0 ? 3 : STEPS % 2 == 0 ? 2 : 1;  // steps between which products do not pause
constexpr int PER = KIND == 2 ? 2 : KIND == 4 ? COLUMNS / 64 : 1;  // steps that share scales
constexpr bool HELD = OWN || KIND == 2 || KIND == 4;

// d [64, N] += a [64, 16] times rows b [N, 16].
template <int N> __device__ __forceinline__ void wgmma(float* d, const u32* a, u64 b);
#define L0 "%0,%1,%2,%3,%4,%5,%6,%7"
#define L1 L0 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define L2 L1 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define L3 L2 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define L4 L3 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define L5 L4 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define L6 L5 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define L7 L6 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define L8 L7 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define L9 L8 ",%72,%73,%74,%75,%76,%77,%78,%79"
#define D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define D0 D8(0)
#define D1 D0, D8(8)
#define D2 D1, D8(16)
#define D3 D2, D8(24)
#define D4 D3, D8(32)
#define D5 D4, D8(40)
#define D6 D5, D8(48)
#define D7 D6, D8(56)
#define D8_ D7, D8(64)
#define D9 D8_, D8(72)
#define WGMMA(N, LIST, A0, A1, A2, A3, B, P, ...)                                                                                        \
  template <> __device__ __forceinline__ void wgmma<N>(float* d, const u32* a, u64 b) {                                                  \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" LIST "}, {%" #A0 \
                 ",%" #A1 ",%" #A2 ",%" #A3 "}, %" #B ", p, 1, 1, 0;\n}"                                                                 \
                 : __VA_ARGS__                                                                                                           \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));                                                          \
  }
WGMMA(16, L0, 8, 9, 10, 11, 12, 13, D0)
WGMMA(32, L1, 16, 17, 18, 19, 20, 21, D1)
WGMMA(48, L2, 24, 25, 26, 27, 28, 29, D2)
WGMMA(64, L3, 32, 33, 34, 35, 36, 37, D3)
WGMMA(80, L4, 40, 41, 42, 43, 44, 45, D4)
WGMMA(96, L5, 48, 49, 50, 51, 52, 53, D5)
WGMMA(112, L6, 56, 57, 58, 59, 60, 61, D6)
WGMMA(128, L7, 64, 65, 66, 67, 68, 69, D7)
WGMMA(144, L8, 72, 73, 74, 75, 76, 77, D8_)
WGMMA(160, L9, 80, 81, 82, 83, 84, 85, D9)

__device__ __forceinline__ void barrier_of(u32 bar, int count) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory"); }
__device__ __forceinline__ void arrive(u32 bar) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory"); }
// Arrives once this thread's copies are there.
__device__ __forceinline__ void arrive_with_copies(u32 bar) { asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(bar) : "memory"); }
__device__ __forceinline__ void wait_for(u32 bar, u32 parity) {
  u32 done;
  do {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(bar), "r"(parity)
        : "memory");
  } while (!done);
}
__device__ __forceinline__ void copy16(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ u32 transposed(u32 v) {
  u32 r;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
  return r;
}
__device__ __forceinline__ u32 pair_of(float low, float high) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
// Brings what others will read soon to the multiprocessor.
__device__ __forceinline__ void touch(const void* at) {
  u32 unused;
  asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(unused) : "l"((u64)at & ~(u64)3));
}

// Which channel of 64 is the i-th of those that ORDER gives (see `channel` of zoo/kernels/codes.py).
__device__ __forceinline__ constexpr int channel(int i) {
  constexpr int P = ORDER == 2 ? 4 : 2, RUN = 8 / P;
  return ORDER == 0 ? i : i / 64 * 64 + ((i / 2 % 4 * RUN + i / 8 % RUN) * 2 + i % 2) * P + i / (8 * RUN) % P;
}
// Column, of a tile's result, of a row of its weights: bits of one number are other bits of the other, so what is added in one is in the
// other. A thread's results of all tiles of 64 rows lie side by side once 8 x 8 of them are transposed.
__device__ __forceinline__ constexpr int column_of(int row) {
  int r = row % 8, hi = row / 8 % 2, warp = row / 16 % 4, m = row / 64 % 2, group = row / 128;
  return GATED ? (group * 4 + warp) * 16 + r / 2 * 4 + m * 2 + r % 2 : (group * 4 + warp) * 32 + r / 2 * 8 + (m * 2 + hi) * 2 + r % 2;
}
__device__ __forceinline__ constexpr bool is_up(int row) { return GATED && row / 8 % 2; }

struct Tile {
  int expert, first, left, column;
};
// As `tile_of` of zoo/kernels/experts.py.
__device__ __forceinline__ Tile tile_of(int id, const int* tiles, int n_tiles, int across) {
  const int* at = tiles + id / across;
  int expert = __ldg(at), first = __ldg(at + n_tiles), count = __ldg(at + 2 * n_tiles), tile = __ldg(at + 3 * n_tiles);
  // An expert's tiles are of one height, or nearly: programs take as many of them, and would wait for those with high ones.
  int of_expert = max((count + MOST - 1) / MOST, 1), high = ((count + of_expert - 1) / of_expert + 15) / 16 * 16;
  int group = tile / GROUP * GROUP, together = max(min(GROUP, of_expert - group), 1);
  int i = (tile - group) * across + id % across, into = (group + i % together) * high;
  return {expert, first + into, min(count - into, high), i / together * WIDTH};
}

// Steps that are on their way.
struct Ring {
  u32 at, full, empty;
  int slot = 0;
  u32 phase = 0;
  __device__ __forceinline__ u32 here() const { return at + slot * STEP; }
  __device__ __forceinline__ u32 is_full() const { return full + slot * 8; }
  __device__ __forceinline__ u32 is_empty() const { return empty + slot * 8; }
  __device__ __forceinline__ void next() {
    if (++slot == STAGES) slot = 0, phase ^= 1;
  }
};

// Pair p of a word of codes: numbers that are exact but for a power of two, or (OWN, integers of four bits) times `factor` and rounded once.
__device__ __forceinline__ void values(u32 word, u32 factor, u32 rest, u32* p) {
  widen(word, p);
#pragma unroll
  for (int i = 0; i < (FOUR ? 4 : 2); i++) {
    if (KIND == 1 || KIND == 2) p[i] = times2(p[i], 0x7B807B80);  // 2^120
    if (OWN) p[i] = times2(p[i], factor);
    if (KIND == 4) {
      p[i] = plus_times2(p[i], i % 2 ? 0x7D007D00 : 0x7F007F00, 0xBE00BE00);  // over 64: 2^123 or 2^127, -1/8
      p[i] = SCALE == 0 ? times2(p[i], factor) : plus_times2(p[i], factor, times2(p[i], rest));
    }
  }
}

struct Weights {
  const u8* s;
  const int* rows;
  const u16* bias;
  int n, half, s_rows;
  // Row of the expert's weights that a row of a tile is.
  __device__ __forceinline__ int row(int column, int tile_row) const {
    int f = min(column + (UP ? channel(column_of(tile_row)) : column_of(tile_row)), (GATED ? half : n) - 1);
    return is_up(tile_row) ? f + half : f;
  }
};

template <int N>
__device__ __forceinline__ void multiply(Ring& ring, const Weights& of, const Tile& tile, const int* __restrict__ order, u16* __restrict__ out,
                                         float limit, float alpha, int t) {
  const int lane = t & 31, warp = t / 32 % 4, group = t / 128, g = lane >> 2, c = lane & 3;
  float acc[2][N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; i++) acc[0][i] = acc[1][i] = 0.f;
  // Rows of the weight that this thread's sums are of, as (m, hi).
  int row[2][2];
#pragma unroll
  for (int m = 0; m < 2; m++) {
#pragma unroll
    for (int hi = 0; hi < 2; hi++) row[m][hi] = of.row(tile.column, group * 128 + m * 64 + warp * 16 + hi * 8 + g);
  }
  const u8* const s = of.s + (i64)tile.expert * of.s_rows * S_ROW;
  u32 now[2][2] = {}, soon[2][2] = {};
  auto scales = [&](int step) {  // of the steps from this one on
#pragma unroll
    for (int m = 0; m < (KIND == 2 ? 1 : 2); m++) {
#pragma unroll
      for (int hi = 0; hi < (KIND == 2 && !GATED ? 1 : 2); hi++) {
        if (KIND == 2) {
          soon[m][hi] = __ldg((const u32*)(s + row[m][hi] / 128 * S_ROW) + step / 2);
        } else {
          const u8* at = s + (i64)row[m][hi] * S_ROW;
          if (KIND == 4) soon[m][hi] = S_SIZE == 4 ? __ldg((const u32*)at + step / PER) : __ldg((const u16*)at + step / PER);
          if (KIND == 3) soon[m][hi] = __ldg(at + step * 2 + c / 2);
          if (KIND == 6) soon[m][hi] = __ldg(at + 16 + step * 4 + c);
        }
      }
    }
  };
  auto float_of = [](u32 v) { return SCALE == 1 || KIND == 2 ? __uint_as_float(v) : SCALE == 2 ? fp16(v) : bf16(v); };
  if (HELD) scales(0);

  u32 a[2][16];
  u32 before = 0;
  float ratio[2] = {1.f, 1.f};
#pragma unroll 1
  for (int round = 0; round < STEPS; round += ROUND) {
#pragma unroll
    for (int u = 0; u < ROUND; u++) {
      const int i = round + u;
      if (HELD && (PER == 1 || i % PER == 0)) {
        if (KIND == 2) {  // sums are over a scale, from here on over another
#pragma unroll
          for (int hi = 0; hi < (GATED ? 2 : 1); hi++) {
            float from = __uint_as_float(now[0][hi]), to = __uint_as_float(soon[0][hi]);
            ratio[hi] = i ? from / to : 1.f;
            now[0][hi] = __float_as_uint(to);
          }
          if (!GATED) ratio[1] = ratio[0];
        } else {
#pragma unroll
          for (int m = 0; m < 2; m++) now[m][0] = soon[m][0], now[m][1] = soon[m][1];
        }
      }
      wait_for(ring.is_full(), ring.phase);
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      // (After the fence, which waits for all loads.)
      if (HELD && (PER == 1 || i % PER == 0) && i + PER < STEPS) scales(i + PER);
      const u32 here = ring.here(), rows_at = here + A_STEP;
      // 128 bytes of a row of x, swizzled; eight rows to 1024 bytes.
      const u64 b = (u64)((rows_at & 0x3FFFF) >> 4) | (u64)1 << 16 | (u64)64 << 32 | (u64)1 << 62;
#pragma unroll
      for (int m = 0; m < 2; m++) {
        const int first = group * 128 + m * 64 + warp * 16;
        u32 words[2][PIECES];  // KIND 0: unused
        if (KIND != 0) {
#pragma unroll
          for (int hi = 0; hi < 2; hi++) {
            u32 at = here + (first + hi * 8 + g) * (PIECES * 16) + c * (PIECES * 4);
            if constexpr (FOUR) {
              asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(words[hi][0]), "=r"(words[hi][1]) : "r"(at));
            } else {
              asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                           : "=r"(words[hi][0]), "=r"(words[hi][1]), "=r"(words[hi][2 % PIECES]), "=r"(words[hi][3 % PIECES])
                           : "r"(at));
            }
          }
        }
        if (m == 1 || u > 0) asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");  // of the same m
        if (m == 1 && u > 0) {
          __syncwarp();
          if (lane == 0) arrive(before);
        }
        if (KIND == 2 && i % 2 == 0 && i > 0) {
#pragma unroll
          for (int j = 0; j < N / 2; j++) acc[m][j] *= ratio[j / 2 % 2];
        }
        if (KIND == 0) {
          // Eight rows' pieces of 16 bytes for each quarter of the warp: rows 0-7 and 8-15, then the next channels of these.
          const int r = first + lane % 16;
#pragma unroll
          for (int k = 0; k < 4; k++) {
            u32 at = here + r * 128 + (((k * 2 + lane / 16) ^ (r % 8)) * 16);
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                         : "=r"(a[m][k * 4]), "=r"(a[m][k * 4 + 1]), "=r"(a[m][k * 4 + 2]), "=r"(a[m][k * 4 + 3])
                         : "r"(at));
          }
        } else {
#pragma unroll
          for (int hi = 0; hi < 2; hi++) {
            u32 factor = 0, rest = 0;
            if (KIND == 3) factor = min(now[m][hi] + 66, 255u) * 0x00800080;  // 2^(s - 127 + 126 - 60)
            if (KIND == 6) {  // e4m3 times 2^(126 - 8), exactly: it has four bits
              float v = bf16((now[m][hi] & 127) << 4) * 1329227995784915872903807060280344576.f;
              factor = (__float_as_uint(v * 332306998946228968225951765070086144.f) >> 16 | (now[m][hi] & 128) << 8) * 0x00010001u;
            }
            if (KIND == 4) {
              if (SCALE == 0) {
                factor = now[m][hi] * 0x00010001u;
              } else {
                float v = float_of(now[m][hi]);
                factor = bits(v) * 0x00010001u, rest = bits(v - rounded(v)) * 0x00010001u;
              }
            }
#pragma unroll
            for (int q = 0; q < (FOUR ? 2 : 4); q++) {
              u32 p[4];
              values(words[hi][q], factor, rest, p);
              // Products of 16 channels: pairs p of two words, one after the other.
#pragma unroll
              for (int v = 0; v < (FOUR ? 4 : 2); v++) a[m][(FOUR ? v : v * 2 + q / 2) * 4 + q % 2 * 2 + hi] = p[v];
            }
          }
        }
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int k = 0; k < 4; k++) wgmma<N>(acc[m], a[m] + k * 4, b + k * 2);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
      }
      before = ring.is_empty();
      ring.next();
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    __syncwarp();
    if (lane == 0) arrive(before);
  }

  // What is missing of each sum.
  float times[2][2], plus[2][2];
#pragma unroll
  for (int m = 0; m < 2; m++) {
#pragma unroll
    for (int hi = 0; hi < 2; hi++) {
      float v = 1.f;
      const int r = row[m][hi];
      if (KIND == 1) v = __ldg((const float*)s + (of.rows ? __ldg(of.rows + r) : r / 128));
      if (KIND == -1) v = __ldg((const float*)s + r) * 64.f;
      if (KIND == 2) v = __uint_as_float(now[0][GATED ? hi : 0]);
      if (KIND == 3) v = 1152921504606846976.f;  // 2^60
      if (KIND == 4) v = 64.f;
      if (KIND == 6) {
        const float* head = (const float*)(s + (i64)r * S_ROW);
        v = __ldg(head) * 256.f / __ldg(head + 1);
      }
      times[m][hi] = v;
      plus[m][hi] = of.bias ? bf16(__ldg(of.bias + (i64)tile.expert * of.n + r)) : 0.f;
    }
  }
  const int width = GATED ? of.half : of.n, column = tile.column + (group * 4 + warp) * (GATED ? 16 : 32);
  if (column >= width) return;
#pragma unroll
  for (int j = 0; j < N / 8; j++) {
    u32 y[4];
#pragma unroll
    for (int m = 0; m < 2; m++) {
      u32 v[2];  // of two tokens, hi
#pragma unroll
      for (int hi = 0; hi < 2; hi++) {
        const float* d = acc[m] + j * 4 + hi * 2;
        v[hi] = pair_of(d[0] * times[m][hi] + plus[m][hi], d[1] * times[m][hi] + plus[m][hi]);
      }
      if (GATED) {
        y[m] = transposed(pair_of(activate(bf16(v[0]), bf16(v[1]), limit, alpha), activate(upper(v[0]), upper(v[1]), limit, alpha)));
      } else {
#pragma unroll
        for (int hi = 0; hi < 2; hi++) {
          if (UP) v[hi] = pair_of(activate(bf16(v[hi]), 0.f, limit, alpha), activate(upper(v[hi]), 0.f, limit, alpha));
          y[m * 2 + hi] = transposed(v[hi]);
        }
      }
    }
    const int i = j * 8 + g;
    if (i < tile.left) {
      i64 to = UP ? tile.first + i : __ldg(order + tile.first + i);
      u16* at = out + to * width + column;
      if (GATED) {
        *(uint2*)(at + c * 4) = make_uint2(y[0], y[1]);
      } else {
        *(uint4*)(at + c * 8) = make_uint4(y[0], y[1], y[2], y[3]);
      }
    }
  }
}

// x [.., K] rows, of UP of tokens, else of pairs in order; w [E, n, K] codes, s [E, s_rows, ...] scales, rows [n]: the scale of each row
// (FP8_ROWS), bias [E, n]; order, tiles: of `sort_by_expert`. out: UP [pairs in order, n or n / 2], else [pairs, n].
extern "C" __global__ void __launch_bounds__(384, 1)
grouped(const u8* __restrict__ w, const u8* __restrict__ s, const int* __restrict__ rows, const u16* __restrict__ bias,
        const u8* __restrict__ x, const int* __restrict__ order, const int* __restrict__ tiles, u16* __restrict__ out, int n, int s_rows,
        int n_tiles, float limit, float alpha) {
  extern __shared__ u8 mem[];
  const int t = threadIdx.x;
  Ring ring;
  ring.at = (at_shared(mem) + 1023) & ~1023u;
  ring.full = ring.at + STAGES * STEP, ring.empty = ring.full + STAGES * 8;
  if (t == 0) {
    for (int i = 0; i < STAGES; i++) barrier_of(ring.full + i * 8, 128), barrier_of(ring.empty + i * 8, 8);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  const Weights of = {s, rows, bias, n, n / 2, s_rows};
  const int across = ((GATED ? n / 2 : n) + WIDTH - 1) / WIDTH, all = n_tiles * across;
  wait_for_previous();
  if (t >= 256) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
    const int own = t - 256, a_piece = own % PIECES, a_row = own / PIECES, b_piece = own % 8, b_row = own / 8;
    constexpr int AT_ONCE = 128 / PIECES;  // rows of the weight
    // Pieces of a bf16 row are swizzled as those of x are; rows of codes are read as they lie.
    const u32 a_to = own / PIECES * (PIECES * 16) + (KIND == 0 ? (a_piece ^ (a_row % 8)) : a_piece) * 16;
    const u32 b_to = A_STEP + b_row * 128 + (b_piece ^ (b_row % 8)) * 16;
    for (int id = blockIdx.x; id < all; id += gridDim.x) {
      const Tile tile = tile_of(id, tiles, n_tiles, across);
      if (tile.left <= 0) continue;
      const int left = tile.left, passes = (left + 15) / 16;
      u32 from[MOST / 16];  // rows of x
#pragma unroll
      for (int i = 0; i < MOST / 16; i++) {
        from[i] = tile.first + min(b_row + i * 16, left - 1);
        if (UP) from[i] = __ldg(order + from[i]) / TOP_K;
      }
      const u8* x_from = x + b_piece * 16;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        int r = of.row(tile.column, own + i * 128);
        if (S_ROW > 4) touch(s + ((i64)tile.expert * s_rows + (KIND == 2 ? r / 128 : r)) * S_ROW);
        if (bias) touch(bias + (i64)tile.expert * n + r);
      }
      const u8* a_from = w + (i64)tile.expert * n * BYTES + a_piece * 16;
      const int a_first = tile.column + (UP ? channel(column_of(a_row)) : column_of(a_row));
      const int a_last = (GATED ? of.half : n) - 1, a_up = is_up(a_row) ? of.half : 0;
#pragma unroll 1
      for (int step = 0; step < STEPS; step++) {
        wait_for(ring.is_empty(), ring.phase ^ 1);
        const u32 here = ring.here();
        int first = a_first;
        asm volatile("" : "+r"(first));  // there are not registers enough to keep where each row is
#pragma unroll
        for (int i = 0; i < ROWS / AT_ONCE; i++) {
          const int more = UP ? channel(column_of(i * AT_ONCE)) : column_of(i * AT_ONCE);
          copy16(here + a_to + i * AT_ONCE * (PIECES * 16), a_from + (i64)(min(first + more, a_last) + a_up) * BYTES);
        }
        a_from += PIECES * 16;
#pragma unroll
        for (int i = 0; i < MOST / 16; i++) {
          if (i < passes) copy16(here + b_to + i * 2048, x_from + (i64)from[i] * (K * 2));
        }
        x_from += 128;
        arrive_with_copies(ring.is_full());
        ring.next();
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
    for (int id = blockIdx.x; id < all; id += gridDim.x) {
      const Tile tile = tile_of(id, tiles, n_tiles, across);
      if (tile.left <= 0) continue;
const int rows_of_x = tile.left;
#define CASE(N) multiply<N>(ring, of, tile, order, out, limit, alpha, t)
      if (rows_of_x <= 32) {
        CASE(32);
      } else if (rows_of_x <= 64) {
        CASE(64);
      } else if (rows_of_x <= 96) {
        CASE(96);
      } else if (MOST == 128 || rows_of_x <= 128) {
        CASE(128);
      } else if (MOST == 144 || rows_of_x <= 144) {
        CASE(144);
      } else {
        CASE(160);
      }
    }
  }
}
