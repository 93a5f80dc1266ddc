// One token's attention: QK norm, RoPE, the write to the cache, and softmax over the keys, in one kernel: see zoo/kernels/attend.py.
//
// A cluster of SPLITS programs to a key head, whose warps take 16 keys at a time, programs first; their results are joined in the
// programs' shared memory. Tensor cores multiply keys by the queries of a key head (16 keys, 8 queries), and values by the softmax.
// A thread copies what it will multiply of keys: of 32 channels 8 that lie side by side; queries are read likewise. DEPTH times 16 old keys
// and values of a warp are on their way, the first before the newest and the queries are there.
//
// Compiled for: D (channels of a head), GROUP (queries of a key head), SPLITS, WARPS, DEPTH, NORM (0: none, then as zoo/kernels/norm.py numbers
// them, one more), AFTER (RoPE), PLUS_ONE, WIDE (its weights are in fp32), HALF (channels that turn, by two; 0: none), INTERLEAVED, TABLE (cos
// and sin are in fp32), CAPPED, SINK (0: none, 1: bf16, 2: fp32).

constexpr int NH = (GROUP + 7) / 8;       // of 8 queries
constexpr int STEPS = D / 32;             // 16 bytes of a key that a thread multiplies
constexpr int PITCH = (D + 63) / 64 * 128;             // bytes of a value's row
constexpr int KEYS = 32 * D, STAGE = KEYS + 16 * PITCH;  // of 16 keys; and of as many values
constexpr int Q_PITCH = D * 2 + 64;
constexpr int PIECES = D / 8;             // of 16 bytes of a row
constexpr int SLICE = (GROUP * D + SPLITS - 1) / SPLITS;  // results that a program joins
constexpr int ROUNDS = (GROUP + 2 + WARPS - 1) / WARPS;
constexpr float NONE = -1e30f;

__device__ __forceinline__ float weight_of(const void* w, bool wide, int at) {
  return wide ? __ldg((const float*)w + at) : bf16(__ldg((const u16*)w + at));
}
__device__ __forceinline__ float turned_to(float v) { return TABLE ? v : rounded(v); }
__device__ __forceinline__ float mean_square(const float* x) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < STEPS; i++) sum += square(x[i]);
#pragma unroll
  for (int d = 16; d; d >>= 1) sum += __shfl_xor_sync(0xFFFFFFFF, sum, d);
  return sum / D;
}
__device__ __forceinline__ void copy16(u32 to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0));
}
__device__ __forceinline__ u32 transposed(u32 v) {
  u32 r;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
  return r;
}
// Where a channel of a query lies among those that a warp leaves behind: no two threads at one bank.
__device__ __forceinline__ int placed(int head, int d) { return head * D + (d ^ (head / 2 % 4 * 8)); }
__device__ __forceinline__ void tell(const float* at, int rank, float v) {
  u32 there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at_shared(at)), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(there), "f"(v) : "memory");
}

// q [B, H, D], k, v [B, KV, D] as projected, rows q_b, q_h, ... elements apart; keys, values [B, C, KV, D]; position [1]; cos, sin [HALF];
// q_norm, k_norm [D]; sinks [H]. out [B, H, D]. scale and cap: times log2(e).
extern "C" __global__ void __cluster_dims__(SPLITS, 1, 1) __launch_bounds__(WARPS * 32, D * NH <= 128 ? 2 : 1)
attend(const u16* q, const u16* k, const u16* v, u16* keys, u16* values, u16* __restrict__ out, const i64* position, const void* cos,
       const void* sin, const void* __restrict__ q_norm, const void* __restrict__ k_norm, const void* __restrict__ sinks, int C, int window,
       int chunk, int KV, int q_b, int q_h, int k_b, int k_h, int v_b, int v_h, int keys_b, int keys_s, int keys_h, int values_b, int values_s,
       int values_h, float scale, float cap, float eps) {
  extern __shared__ __align__(128) u8 mem[];
  const int t = threadIdx.x, lane = t & 31, warp = t >> 5, g = lane >> 2, c = lane & 3;
  const int split = blockIdx.x % SPLITS, head = blockIdx.x / SPLITS % KV, b = blockIdx.x / SPLITS / KV;
  u8* const ring = mem + warp * DEPTH * STAGE;
  u8* const queries = mem + WARPS * DEPTH * STAGE;
  u16* const fresh = (u16*)(queries + NH * 8 * Q_PITCH);  // the newest key and value
  float* const turning = (float*)(fresh + 2 * D) + warp * D;
  float* const stats = (float*)(fresh + 2 * D) + WARPS * D;  // [WARPS, GROUP, 2]: maximum and sum
  float* const came = stats + WARPS * GROUP * 2;             // [SPLITS, SLICE]
  float* const came_stats = came + SPLITS * SLICE;           // [SPLITS, GROUP, 2]
  const u32 ring_at = at_shared(ring);

  if (SPLITS > 1) asm volatile("barrier.cluster.arrive.relaxed.aligned;");
  launch_dependents();
  const int newest = (int)__ldcg(position);
  int oldest = max(0, newest - C + 1);
  if (window) oldest = max(oldest, newest - window + 1);
  if (chunk) oldest = max(oldest, newest / chunk * chunk);
  const int old = newest - oldest, n_tiles = old / 16 + 1;  // the last has the newest
  keys += (i64)b * keys_b + (i64)head * keys_h;
  values += (i64)b * values_b + (i64)head * values_h;

  // Keys are read by the thread that copied them, values by all of its warp.
  auto slot = [&](int first, int row) { return first + row >= C ? first + row - C : first + row; };
  auto fetch = [&](int tile, int stage) {
    if (tile < n_tiles) {
      const int first = (oldest + 16 * tile) % C, left = old - 16 * tile;
      const u32 to = ring_at + stage * STAGE + lane * 16, values_to = ring_at + stage * STAGE + KEYS;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int row = g + 8 * half;
        const u16* from = keys + (i64)(row < left ? slot(first, row) : 0) * keys_s + c * 8;
#pragma unroll
        for (int s = 0; s < STEPS; s++) copy16(to + (2 * s + half) * 512, from + 32 * s, row < left);
      }
#pragma unroll
      for (int i = 0; i < PIECES / 2; i++) {
        const int row = (lane + 32 * i) / PIECES, piece = (lane + 32 * i) % PIECES;
        const u16* from = values + (i64)(row < left ? slot(first, row) : 0) * values_s + piece * 8;
        copy16(values_to + row * PITCH + (piece ^ (row & 7)) * 16, from, row < left);
      }
    }
    asm volatile("cp.async.commit_group;");
  };
  const int begin = split + warp * SPLITS;
#pragma unroll
  for (int i = 0; i < DEPTH; i++) fetch(begin + i * SPLITS * WARPS, i);

  // The queries and the newest key and value: a warp to each.
  const bool last_here = (n_tiles - 1) % SPLITS == split;
  float wq[STEPS], wk[STEPS], cosine[STEPS], sine[STEPS], raw[ROUNDS][STEPS];
  if (NORM > 1) {
#pragma unroll
    for (int i = 0; i < STEPS; i++) wq[i] = weight_of(q_norm, WIDE, lane + 32 * i), wk[i] = weight_of(k_norm, WIDE, lane + 32 * i);
  }
  wait_for_previous();
#pragma unroll
  for (int r = 0; r < ROUNDS; r++) {
    const int row = warp + r * WARPS;
    const u16* from = row < GROUP    ? q + (i64)b * q_b + (i64)(head * GROUP + row) * q_h
                      : row == GROUP ? k + (i64)b * k_b + (i64)head * k_h
                                     : v + (i64)b * v_b + (i64)head * v_h;
    const bool there = row < GROUP || (last_here && row < GROUP + 2);
#pragma unroll
    for (int i = 0; i < STEPS; i++) raw[r][i] = there ? bf16(__ldcg(from + lane + 32 * i)) : 0.f;
  }
#pragma unroll
  for (int i = 0; i < STEPS; i++) {
    const int d = lane + 32 * i, angle = INTERLEAVED ? d / 2 : d < HALF ? d : d - HALF;
    if (d < 2 * HALF) {
      cosine[i] = TABLE ? __ldcg((const float*)cos + angle) : bf16(__ldcg((const u16*)cos + angle));
      sine[i] = TABLE ? __ldcg((const float*)sin + angle) : bf16(__ldcg((const u16*)sin + angle));
    }
  }
#pragma unroll
  for (int r = 0; r < ROUNDS; r++) {
    const int row = warp + r * WARPS;
    if (row < GROUP || (last_here && row < GROUP + 2)) {
      float* x = raw[r];
      if (row <= GROUP) {
        if (NORM && !AFTER) {
          const float rms = rsqrtf(mean_square(x) + eps);
#pragma unroll
          for (int i = 0; i < STEPS; i++) {
            float w = NORM == 1 ? 1.f : row < GROUP ? wq[i] : wk[i], y = x[i] * rms;
            if (NORM > 1 && PLUS_ONE) w = NORM == 2 ? rounded(1.f + w) : 1.f + w;
            x[i] = NORM == 1 ? rounded(y) : NORM == 2 ? rounded(rounded(y) * w) : rounded(y * w);
          }
        }
        if (HALF) {
#pragma unroll
          for (int i = 0; i < STEPS; i++) turning[lane + 32 * i] = x[i];
          __syncwarp();
#pragma unroll
          for (int i = 0; i < STEPS; i++) {  // no product is fused with a sum
            const int d = lane + 32 * i;
            if (d < 2 * HALF) {
              const bool first = INTERLEAVED ? d % 2 == 0 : d < HALF;
              const float mate = turning[INTERLEAVED ? d ^ 1 : first ? d + HALF : d - HALF];
              const float a = turned_to(__fmul_rn(x[i], cosine[i])), o = turned_to(__fmul_rn(mate, sine[i]));
              x[i] = turned_to(first ? __fsub_rn(a, o) : __fadd_rn(a, o));
            }
          }
          __syncwarp();
        }
        if (NORM && AFTER) {
#pragma unroll
          for (int i = 0; i < STEPS; i++) x[i] = rounded(x[i]);
          const float rms = rsqrtf(mean_square(x) + eps);
#pragma unroll
          for (int i = 0; i < STEPS; i++) x[i] *= rms;
        }
      }
      u16* to = row < GROUP ? (u16*)(queries + row * Q_PITCH) : fresh + (row - GROUP) * D;
      u16* stored = row == GROUP ? keys + (i64)(newest % C) * keys_s : values + (i64)(newest % C) * values_s;
#pragma unroll
      for (int i = 0; i < STEPS; i++) {
        const u16 y = bits(x[i]);
        to[lane + 32 * i] = y;
        if (row >= GROUP) stored[lane + 32 * i] = y;
      }
    }
  }
  __syncthreads();
  uint4 qs[NH][STEPS];
#pragma unroll
  for (int n = 0; n < NH; n++) {
#pragma unroll
    for (int s = 0; s < STEPS; s++) qs[n][s] = *(const uint4*)(queries + (n * 8 + g) * Q_PITCH + (s * 4 + c) * 16);
  }

  float top[NH][2], sum[NH][2] = {}, acc[NH][D / 16][4] = {};
#pragma unroll
  for (int n = 0; n < NH; n++) top[n][0] = top[n][1] = NONE;
  int stage = 0;
#pragma unroll 1
  for (int tile = begin; tile < n_tiles; tile += SPLITS * WARPS) {
    const int left = old - 16 * tile;  // row `left` is the newest
    u8* const from = ring + stage * STAGE;
    asm volatile("cp.async.wait_group %0;" ::"n"(DEPTH - 1) : "memory");
    uint4 ka[STEPS], kb[STEPS];
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
      ka[s] = *(const uint4*)(g == left ? (u8*)fresh + (s * 4 + c) * 16 : from + 2 * s * 512 + lane * 16);
      kb[s] = *(const uint4*)(g + 8 == left ? (u8*)fresh + (s * 4 + c) * 16 : from + (2 * s + 1) * 512 + lane * 16);
    }
    float scores[NH][4] = {};
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
#pragma unroll
      for (int n = 0; n < NH; n++) {
        mma(scores[n], ka[s].x, kb[s].x, ka[s].y, kb[s].y, qs[n][s].x, qs[n][s].y);
        mma(scores[n], ka[s].z, kb[s].z, ka[s].w, kb[s].w, qs[n][s].z, qs[n][s].w);
      }
    }
    u32 p[NH][2];
#pragma unroll
    for (int n = 0; n < NH; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float y = scores[n][i] * scale;
        if (CAPPED) y = cap * tanhf(y / cap);
        scores[n][i] = (i < 2 ? g : g + 8) <= left ? y : NONE;
      }
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float most = fmaxf(scores[n][i], scores[n][i + 2]);
#pragma unroll
        for (int d = 4; d < 32; d *= 2) most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFF, most, d));
        const float higher = fmaxf(top[n][i], most), shrink = exp2f(top[n][i] - higher);
        scores[n][i] = exp2f(scores[n][i] - higher), scores[n][i + 2] = exp2f(scores[n][i + 2] - higher);
        sum[n][i] = sum[n][i] * shrink + scores[n][i] + scores[n][i + 2];
        top[n][i] = higher;
#pragma unroll
        for (int m = 0; m < D / 16; m++) acc[n][m][i] *= shrink, acc[n][m][i + 2] *= shrink;
      }
      p[n][0] = transposed(bits(scores[n][0]) | (u32)bits(scores[n][1]) << 16);
      p[n][1] = transposed(bits(scores[n][2]) | (u32)bits(scores[n][3]) << 16);
    }
    if (left < 16) {
      for (int piece = lane; piece < PIECES; piece += 32)
        *(uint4*)(from + KEYS + left * PITCH + (piece ^ (left & 7)) * 16) = *(const uint4*)(fresh + D + piece * 8);
    }
    __syncwarp();
    const int row = lane % 8 + lane / 16 * 8;  // of 16 by 16 values the quarter that this thread says where it lies
    const u32 at = ring_at + stage * STAGE + KEYS + row * PITCH;
#pragma unroll
    for (int m = 0; m < D / 16; m++) {
      u32 a[4];
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                   : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                   : "r"(at + ((2 * m + lane / 8 % 2) ^ (row & 7)) * 16)
                   : "memory");
#pragma unroll
      for (int n = 0; n < NH; n++) mma(acc[n][m], a[0], a[1], a[2], a[3], p[n][0], p[n][1]);
    }
    __syncwarp();
    fetch(tile + DEPTH * SPLITS * WARPS, stage);
    stage = stage + 1 == DEPTH ? 0 : stage + 1;
  }

  // Of this warp, then of all warps, then of all programs.
  float* const parts = (float*)ring;
#pragma unroll
  for (int n = 0; n < NH; n++) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int h = n * 8 + 2 * c + i;
#pragma unroll
      for (int d = 4; d < 32; d *= 2) sum[n][i] += __shfl_xor_sync(0xFFFFFFFF, sum[n][i], d);
      if (h < GROUP) {
        if (g == 0) stats[(warp * GROUP + h) * 2] = top[n][i], stats[(warp * GROUP + h) * 2 + 1] = sum[n][i];
#pragma unroll
        for (int m = 0; m < D / 16; m++) {
          parts[placed(h, 16 * m + g)] = acc[n][m][i];
          parts[placed(h, 16 * m + g + 8)] = acc[n][m][i + 2];
        }
      }
    }
  }
  __syncthreads();
  if (SPLITS > 1) asm volatile("barrier.cluster.wait.aligned;");
  for (int i = t; i < GROUP * D; i += WARPS * 32) {
    const int h = i / D;
    float most = NONE, y = 0.f, all = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) most = fmaxf(most, stats[(w * GROUP + h) * 2]);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const float share = exp2f(stats[(w * GROUP + h) * 2] - most);
      y += ((const float*)(mem + w * DEPTH * STAGE))[placed(h, i % D)] * share, all += stats[(w * GROUP + h) * 2 + 1] * share;
    }
    tell(came + split * SLICE + i % SLICE, i / SLICE, y);
    if (i % D < SPLITS) {
      float* at = came_stats + (split * GROUP + h) * 2;
      tell(at, i % D, most), tell(at + 1, i % D, all);
    }
  }
  if (SPLITS > 1) {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
  } else {
    __syncthreads();
  }
  for (int i = split * SLICE + t; i < min((split + 1) * SLICE, GROUP * D); i += WARPS * 32) {
    const int h = i / D;
    const float sink = SINK ? weight_of(sinks, SINK == 2, head * GROUP + h) * 1.4426950408889634f : NONE;
    float most = sink, y = 0.f, all;
#pragma unroll
    for (int r = 0; r < SPLITS; r++) most = fmaxf(most, came_stats[(r * GROUP + h) * 2]);
    all = SINK ? exp2f(sink - most) : 0.f;
#pragma unroll
    for (int r = 0; r < SPLITS; r++) {
      const float share = exp2f(came_stats[(r * GROUP + h) * 2] - most);
      y += came[r * SLICE + i - split * SLICE] * share, all += came_stats[(r * GROUP + h) * 2 + 1] * share;
    }
    out[((i64)b * KV + head) * GROUP * D + i] = bits(y / all);
  }
}
