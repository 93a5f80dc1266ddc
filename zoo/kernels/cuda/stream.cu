// Rows of codes times one row of x, streamed through shared memory: see zoo/kernels/stream.py.
//
// A warp multiplies units of 16 rows (GATED: 8 of gate and the 8 of up) by tensor cores, 128 bytes of a row at a time. A thread copies
// what it will multiply itself, so none waits for another before a sum is done; DEPTH such steps are on their way.
//
// Codes are multiplied as the bf16 whose bits they are once moved to their place, tiny ones, and x times 2^60: no code is converted, and
// exact are products of x from 2^-36 to 2^67. What is missing comes with the scales. Where each 16 or 32 channels have a scale, of the
// eight columns of x that tensor cores multiply each is the x of one of them, else zero (OWN).
//
// Compiled for: KIND, K (columns), TEAM, TEAMS, DEPTH, MODE (0: a matrix, 1: gate and up of the experts of a token, 2: down of these), TOP_K,
// GATED, ACT (as zoo/kernels/gated.py numbers them), SCALE (of integers 0: bf16, 1: fp32, 2: fp16), WEIGHT (of experts, likewise), NORM
// (of x before, 0: none, then as zoo/kernels/norm.py numbers them, one more), PLUS_ONE, WIDE (its weight is in fp32), AT_ONCE steps are on
// their way, of which FIRST before x is there.

constexpr bool FOUR = KIND >= 3;       // codes of four bits
constexpr int CODES = FOUR ? 8 : 4;    // of a word
constexpr int PIECE = FOUR ? 32 : 16;  // channels of 16 bytes
constexpr int XW = PIECE / 8;          // 16 bytes of x, of which a piece needs so many
constexpr int BYTES = K / CODES * 4;   // of a row
constexpr int CHUNKS = (BYTES + 127) / 128, PIECES = CHUNKS * 8;
constexpr bool EVEN = BYTES % 128 == 0;
constexpr int UNIT = GATED ? 8 : 16;
constexpr int SLOTS = MODE == 2 ? TOP_K : 1;    // rows of x that are multiplied at once
// TEAM warps share the columns of a row; TEAMS of them take units in turn.
constexpr int WARPS = TEAMS * SLOTS * TEAM, SHARING = TEAM < CHUNKS ? TEAM : CHUNKS;
constexpr bool OWN = KIND == 3 || KIND == 6;    // each thread's channels have scales of their own
constexpr bool SUMS = KIND == 4 || KIND == 5;   // of x, which offsets multiply

// Scales of a step: bytes of a row of scales, those of a step in it, and the registers that a thread has them in.
constexpr int S_SIZE = KIND == 4 && SCALE != 1 ? 2 : 4;
constexpr int S_HEAD = KIND == 6 ? 16 : 0;
constexpr int S_ROW = KIND == 6 ? 16 + (K / 16 + 15) / 16 * 16 : KIND == 3 ? K / 32 : KIND == 2 ? (K + 127) / 128 * 4
                    : KIND == 5 ? K / 128 * 8 : KIND == 4 ? K / 128 * S_SIZE : 4;
constexpr int S_STEP = KIND == 2 ? 4 : KIND == 3 ? 8 : KIND == 4 ? 2 * S_SIZE : KIND == 5 || KIND == 6 ? 16 : 0;
constexpr int S_HELD = KIND == 2 ? 2 : KIND == 4 ? S_SIZE : KIND == 3 || KIND == 6 ? 4 : KIND == 5 ? 8 : 0;
constexpr int STEP = 2048;  // bytes of a warp: 16 rows, 128 of each

__device__ __forceinline__ void copy16(u32 to, const void* from, bool there) {
  if (EVEN) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from));
  } else {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0));
  }
}
// What sums of products with e2m1 codes are multiplied by, but for 2^66: of e8m0 exponents, of e4m3 scales 2^-8 times.
__device__ __forceinline__ float factor_of(u32 s) {
  if (KIND == 3) return __uint_as_float(s << 23);
  return fp16((s & 0x7F) << 7 | (s & 0x80) << 8);
}
__device__ __forceinline__ u32 part(uint4 v, int m) { return m == 0 ? v.x : m == 1 ? v.y : m == 2 ? v.z : v.w; }
// Two channels from `at` on, times 1 / rms and the weight, rounded as `zoo.kernels.norm.normalise` does.
__device__ __forceinline__ u32 normed(u32 x, float rms, const void* norm, int at) {
  float y[2] = {bf16(x) * rms, upper(x) * rms};
#pragma unroll
  for (int m = 0; m < 2; m++) {
    float w = NORM == 1 ? 1.f : WIDE ? __ldg((const float*)norm + at + m) : bf16(__ldg((const u16*)norm + at + m));
    if (NORM > 1 && PLUS_ONE) w = NORM == 2 ? rounded(1.f + w) : 1.f + w;
    y[m] = NORM == 2 ? rounded(y[m]) * w : y[m] * w;
  }
  return bits(y[0]) | (u32)bits(y[1]) << 16;
}
// Sums of products: number `at` of the four sets together; a set begins anew.
__device__ __forceinline__ float sum_of(const float (&acc)[2][2][4], int at) {
  return acc[0][0][at] + acc[0][1][at] + acc[1][0][at] + acc[1][1][at];
}
__device__ __forceinline__ void clear(float (&d)[4]) { d[0] = d[1] = d[2] = d[3] = 0.f; }

// w [E, n, K] codes, s [E, s_rows, ...] scales, rows [n]: the scale of each row (FP8_ROWS), bias [E, n], x [K] or [TOP_K, K];
// chosen, shares [TOP_K]: the experts of a token and their weights. norm [K]: the weight of the norm. per: units of a program.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
stream(const u8* __restrict__ w, const u8* __restrict__ s, const int* __restrict__ rows, const u16* __restrict__ bias,
       const u16* __restrict__ x, const u16* __restrict__ shared, const u16* __restrict__ residual, u16* __restrict__ out,
       const int* chosen, const void* __restrict__ shares, const void* __restrict__ norm, int n, int s_rows,
       int per, float limit, float alpha, float eps) {
  extern __shared__ __align__(128) u8 mem[];
  const int t = threadIdx.x, lane = t & 31, warp = t >> 5, g = lane >> 2, c = lane & 3;
  const int half = n / 2, of_expert = (GATED ? half : n) / UNIT, units = MODE == 1 ? of_expert * TOP_K : of_expert;
  const int first = blockIdx.x * per, mine = min(per, units - first);
  const int team = warp / (SLOTS * TEAM), x_slot = warp / TEAM % SLOTS, member = warp % TEAM;
  u8* const ring = mem + warp * DEPTH * STEP;
  uint4* const xs = (uint4*)(mem + WARPS * DEPTH * STEP);
  float* const xsum = (float*)(xs + SLOTS * PIECES * XW);
  float* const parts = xsum + (SUMS ? SLOTS * CHUNKS * 2 : 0);
  const u32 ring_at = at_shared(ring);
  const int spu = (CHUNKS - member + TEAM - 1) / TEAM, steps = max(0, (mine - team + TEAMS - 1) / TEAMS) * spu;
  const int start_unit = MODE == 1 ? (first + team) % of_expert : first + team, start_pair = MODE == 1 ? (first + team) / of_expert : x_slot;

  if (MODE == 1) {  // experts are not chosen before
    wait_for_previous();
  }
  auto expert_of = [&](int i) { return MODE == 0 ? 0 : (int)__ldcg(chosen + i); };

  // What is fetched next. MODE 2: `chosen` is there once the kernel before this one lets it start.
  const i64 apart = (i64)(GATED ? half : 8) * BYTES, s_apart = KIND == 2 ? half / 128 * S_ROW : (i64)(GATED ? half : 8) * S_ROW;
  const u8 *f_expert_w, *f_expert_s, *f_w, *f_s;
  int f_slot = 0, f_left = steps, f_step = 0, f_unit = start_unit, f_pair = start_pair;
  auto turn = [&]() {
    f_w = f_expert_w + (i64)f_unit * (UNIT * BYTES);
    if (S_STEP) f_s = f_expert_s + (KIND == 2 ? (i64)(f_unit * UNIT / 128 * S_ROW) : (i64)f_unit * (UNIT * S_ROW));
  };
  auto turn_expert = [&]() {
    int e = expert_of(f_pair);
    f_expert_w = w + ((i64)e * n + g) * BYTES + member * 128 + c * 16;
    if (S_STEP) {
      f_expert_s = s + ((i64)e * s_rows + (KIND == 2 ? 0 : g)) * S_ROW + S_HEAD + member * S_STEP + (KIND == 3 ? c : KIND == 6 ? 2 * c : 0);
    }
    turn();
  };
  auto fetch = [&](u32* held) {
    if (f_left > 0) {
      u32 to = ring_at + f_slot * STEP + lane * 16;
#pragma unroll
      for (int j = 0; j < 2; j++) {
        bool there = EVEN || (member + f_step * TEAM) * 128 + j * 64 + c * 16 < BYTES;
        copy16(to + j * 1024, f_w + j * 64, there);
        copy16(to + j * 1024 + 512, f_w + apart + j * 64, there);
        if (KIND == 3) {
          held[j] = there ? __ldg(f_s + j * 4) : 0, held[j + 2] = there ? __ldg(f_s + s_apart + j * 4) : 0;
        } else if (KIND == 6) {
          held[j] = __ldg((const u16*)(f_s + j * 8)), held[j + 2] = __ldg((const u16*)(f_s + s_apart + j * 8));
        }
      }
      if (KIND == 2 || (KIND == 4 && SCALE != 1)) {
        held[0] = __ldg((const u32*)f_s), held[1] = KIND == 2 && !GATED ? held[0] : __ldg((const u32*)(f_s + s_apart));
      } else if (KIND == 4) {
        *(uint2*)held = __ldg((const uint2*)f_s), *(uint2*)(held + 2) = __ldg((const uint2*)(f_s + s_apart));
      } else if (KIND == 5) {
        *(uint4*)held = __ldg((const uint4*)f_s), *(uint4*)(held + 4) = __ldg((const uint4*)(f_s + s_apart));
      }
      f_w += TEAM * 128;
      if (S_STEP) f_s += TEAM * S_STEP;
      f_left--;
      if (++f_step == spu) {
        f_step = 0, f_unit += TEAMS;
        if (MODE == 1 && f_unit >= of_expert) {
          f_unit -= of_expert, f_pair++;
          if (f_left > 0) turn_expert();
        } else {
          turn();
        }
      }
      if (f_left == 0) launch_dependents();
    }
    asm volatile("cp.async.commit_group;");
    f_slot = f_slot + 1 == DEPTH ? 0 : f_slot + 1;
  };
  constexpr int HELD = S_HELD ? S_HELD : 1;
  __align__(16) u32 held[AT_ONCE][HELD] = {};
  if (steps > 0) turn_expert();
#pragma unroll
  for (int i = 0; i < FIRST; i++) fetch(held[i]);
  if (steps == 0) launch_dependents();

  // What this thread's sum is completed with: of a row (MODE 2: and of one of the experts).
  constexpr int OF_ROW = MODE == 2 ? TOP_K : 1;
  const bool last = t < mine * UNIT * OF_ROW;
  const int l_pair = MODE == 2 ? t % OF_ROW : MODE == 1 ? (first + t / UNIT) / of_expert : 0;
  const int l_row = MODE == 1 ? (first + t / UNIT) % of_expert * UNIT + t % UNIT : first * UNIT + t / OF_ROW;
  // 2^60, 2^73, 2^66
  constexpr float MISSING = SUMS ? 9444732965739290427392.f : OWN ? 73786976294838206464.f : 1152921504606846976.f;
  float times = MISSING, times_up = MISSING, plus = 0.f, plus_up = 0.f, share = 1.f;
  if (last) {
    int e = expert_of(l_pair);
    if (KIND == 1 || KIND == -1) {
      auto at = [&](int row) { return KIND == -1 ? row : rows ? rows[row] : row / 128; };
      constexpr float BYTE = KIND == -1 ? 5.551115123125783e-17f : MISSING;  // 2^6 and 2^-60
      times = ((const float*)s)[(i64)e * s_rows + at(l_row)] * BYTE;
      if (GATED) times_up = ((const float*)s)[(i64)e * s_rows + at(l_row + half)] * BYTE;
    } else if (KIND == 6) {
      const float* head = (const float*)(s + ((i64)e * s_rows + l_row) * S_ROW);
      times = head[0] * (256.f * MISSING) / head[1];
      if (GATED) head += (i64)half * S_ROW / 4, times_up = head[0] * (256.f * MISSING) / head[1];
    }
    if (bias) {
      plus = bf16(bias[(i64)e * n + l_row]);
      if (GATED) plus_up = bf16(bias[(i64)e * n + l_row + half]);
    }
  }
  if (MODE != 1) wait_for_previous();
  float more = 0.f, onto = 0.f;
  if (last && MODE == 2) share = WEIGHT ? __ldcg((const float*)shares + l_pair) : bf16(__ldcg((const u16*)shares + l_pair));
  if (last && shared) more = bf16(shared[l_row]);
  if (last && residual) onto = bf16(residual[l_row]);

  // x, in the order that words give their codes in.
  float rms = 1.f;
  if (NORM) {
    float sum = 0.f;
    for (int i = t; i < K / 8; i += WARPS * 32) {
      uint4 v = *(const uint4*)(x + i * 8);
#pragma unroll
      for (int m = 0; m < 4; m++) sum += square(bf16(part(v, m))) + square(upper(part(v, m)));
    }
#pragma unroll
    for (int d = 16; d; d >>= 1) sum += __shfl_xor_sync(0xFFFFFFFF, sum, d);
    if (lane == 0) parts[warp] = sum;
    __syncthreads();
    sum = 0.f;
#pragma unroll
    for (int v = 0; v < WARPS; v++) sum += parts[v];
    rms = rsqrtf(sum / K + eps);
  }
  for (int i = t; i < SLOTS * PIECES * XW; i += WARPS * 32) {
    int of = i / (PIECES * XW), at = i % (PIECES * XW), piece = at / XW, word = at % XW;
    uint4 v = make_uint4(0, 0, 0, 0), o;
    if (EVEN || at * 8 < K) {
      v = *(const uint4*)(x + (i64)of * K + at * 8);
      if (NORM) v = make_uint4(normed(v.x, rms, norm, at * 8), normed(v.y, rms, norm, at * 8 + 2), normed(v.z, rms, norm, at * 8 + 4),
                               normed(v.w, rms, norm, at * 8 + 6));
    }
    if (FOUR) {  // (0, 4), (2, 6), (1, 5), (3, 7)
      o = make_uint4(__byte_perm(v.x, v.z, 0x5410), __byte_perm(v.y, v.w, 0x5410), __byte_perm(v.x, v.z, 0x7632),
                     __byte_perm(v.y, v.w, 0x7632));
    } else {  // (0, 2), (1, 3), (4, 6), (5, 7)
      o = make_uint4(__byte_perm(v.x, v.y, 0x5410), __byte_perm(v.x, v.y, 0x7632), __byte_perm(v.z, v.w, 0x5410),
                     __byte_perm(v.z, v.w, 0x7632));
    }
    o = make_uint4(times2(o.x, 0x5D805D80), times2(o.y, 0x5D805D80), times2(o.z, 0x5D805D80), times2(o.w, 0x5D805D80));  // 2^60
    xs[(of * XW + word) * PIECES + piece] = o;
    if (SUMS) {  // of 128 channels, which are those of 16 threads
      float sum = bf16(v.x) + upper(v.x) + bf16(v.y) + upper(v.y) + bf16(v.z) + upper(v.z) + bf16(v.w) + upper(v.w);
      u32 who = __activemask();
      for (int d = 8; d; d >>= 1) sum += __shfl_xor_sync(who, sum, d);
      if (i % 16 == 0) xsum[i / 16] = sum * 1.0587911840678754e-22f;  // 2^-73
    }
  }
#pragma unroll
  for (int i = FIRST; i < AT_ONCE; i++) fetch(held[i]);
  __syncthreads();

  int slot = 0, step = 0;
  float y0 = 0.f, y1 = 0.f, acc[2][2][4] = {};
  const uint4* const x_first = xs + x_slot * XW * PIECES + member * 8 + c;
  const uint4* x_at = x_first;
  const float* sum_at = xsum + (x_slot * CHUNKS + member) * 2;
  float* to = parts + warp * 16 + g;  // of a unit SLOTS * TEAM parts, one after the other
#pragma unroll 1
  for (int i = 0; i < steps; i++) {
    asm volatile("cp.async.wait_group %0;" ::"n"(AT_ONCE - 1) : "memory");
    const u8* from = ring + slot * STEP;
    uint4 a[2], b[2];
#pragma unroll
    for (int j = 0; j < 2; j++) {
      a[j] = *(const uint4*)(from + j * 1024 + lane * 16);
      b[j] = *(const uint4*)(from + j * 1024 + 512 + lane * 16);
    }
    float sa[2] = {}, sb[2] = {}, oa[2] = {}, ob[2] = {};
    u32* h = held[0];
#pragma unroll
    for (int j = 0; j < 2; j++) {
      if (KIND == 4 && SCALE != 1) {
        u32 p = j ? h[0] >> 16 : h[0], q = j ? h[1] >> 16 : h[1];
        sa[j] = SCALE == 0 ? bf16(p) : fp16(p), sb[j] = SCALE == 0 ? bf16(q) : fp16(q);
      } else if (KIND == 4) {
        sa[j] = __uint_as_float(h[j]), sb[j] = __uint_as_float(h[2 + j]);
      } else if (KIND == 5) {
        sa[j] = __uint_as_float(h[2 * j]), oa[j] = __uint_as_float(h[2 * j + 1]);
        sb[j] = __uint_as_float(h[4 + 2 * j]), ob[j] = __uint_as_float(h[5 + 2 * j]);
      } else if (KIND == 2) {
        sa[j] = __uint_as_float(h[0]), sb[j] = __uint_as_float(h[1]);
      } else if (OWN) {
        sa[j] = factor_of(h[j] & 255), oa[j] = factor_of(h[j] >> 8);
        sb[j] = factor_of(h[2 + j] & 255), ob[j] = factor_of(h[2 + j] >> 8);
      }
    }
#pragma unroll
    for (int m = 1; m < AT_ONCE; m++) {
#pragma unroll
      for (int r = 0; r < HELD; r++) held[m - 1][r] = held[m][r];
    }
    asm volatile("" ::: "memory");
    fetch(held[AT_ONCE - 1]);
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const u32 *wa = (const u32*)&a[j], *wb = (const u32*)&b[j];
      u32 xv[XW * 4];
#pragma unroll
      for (int m = 0; m < XW; m++) {
        uint4 v = make_uint4(0, 0, 0, 0);
        // nvfp4: the first and the second 16 channels have a column each
        if (KIND == 6 ? (m < 2 ? g == 2 * c : g == 2 * c + 1) : KIND == 3 ? g / 2 == c : true) v = x_at[m * PIECES + j * 4];
        xv[m * 4] = v.x, xv[m * 4 + 1] = v.y, xv[m * 4 + 2] = v.z, xv[m * 4 + 3] = v.w;
      }
#pragma unroll
      for (int q = 0; q < 4; q++) {
        u32 p[4], r[4];
        widen(wa[q], p);
        widen(wb[q], r);
        if (FOUR) {
          mma(acc[j][0], p[0], r[0], p[2], r[2], xv[q * 4], xv[q * 4 + 1]);
          mma(acc[j][1], p[1], r[1], p[3], r[3], xv[q * 4 + 2], xv[q * 4 + 3]);
        } else {
          mma(acc[j][q & 1], p[0], r[0], p[1], r[1], xv[q * 2], xv[q * 2 + 1]);
        }
      }
      if (FOUR) {
        float* d = acc[j][0];
#pragma unroll
        for (int m = 0; m < 4; m++) d[m] += acc[j][1][m] * (SUMS ? 0.0625f : 1.f);
        if (SUMS) {
          y0 += d[0] * sa[j] + (KIND == 5 ? oa[j] : -8.f * sa[j]) * sum_at[j];
          y1 += d[2] * sb[j] + (KIND == 5 ? ob[j] : -8.f * sb[j]) * sum_at[j];
        } else {
          y0 += d[0] * sa[j], y1 += d[2] * sb[j];
          if (KIND == 6) y0 += d[1] * oa[j], y1 += d[3] * ob[j];
        }
        clear(acc[j][0]), clear(acc[j][1]);
      }
    }
    if (KIND == 2) {
      y0 += sum_of(acc, 0) * sa[0], y1 += sum_of(acc, 2) * sb[0];
      clear(acc[0][0]), clear(acc[0][1]), clear(acc[1][0]), clear(acc[1][1]);
    }
    slot = slot + 1 == DEPTH ? 0 : slot + 1;
    x_at += TEAM * 8;
    if (SUMS) sum_at += TEAM * 2;
    if (++step == spu) {
      if (KIND == 1 || KIND == -1) {
        y0 = sum_of(acc, 0), y1 = sum_of(acc, 2);
        clear(acc[0][0]), clear(acc[0][1]), clear(acc[1][0]), clear(acc[1][1]);
      }
      if (OWN) {  // a quad's threads have a part each
#pragma unroll
        for (int d = 1; d < 4; d *= 2) y0 += __shfl_xor_sync(0xFFFFFFFF, y0, d), y1 += __shfl_xor_sync(0xFFFFFFFF, y1, d);
      }
      if (c == 0) to[0] = y0, to[8] = y1;
      to += WARPS * 16;
      y0 = y1 = 0.f, step = 0;
      x_at = x_first, sum_at = xsum + (x_slot * CHUNKS + member) * 2;
    }
  }
  __syncthreads();
  float total = 0.f;
  if (last) {
    const int r = MODE == 2 ? t / OF_ROW : t, u = r / UNIT;
    const float* from = parts + (u * SLOTS + (MODE == 2 ? l_pair : 0)) * TEAM * 16 + r % UNIT;
    float y = 0.f, z = 0.f;
#pragma unroll
    for (int v = 0; v < SHARING; v++) {
      y += from[v * 16];
      if (GATED) z += from[v * 16 + 8];
    }
    total = y * times + plus;
    if (MODE == 2) {
      total = rounded(total) * share;
      if (!WEIGHT) total = rounded(total);
    } else if (GATED || MODE == 1) {
      total = activate(rounded(total), rounded(z * times_up + plus_up), limit, alpha);
    }
  }
  if (MODE == 2) {  // a warp's threads all have a sum, or none has
#pragma unroll
    for (int d = OF_ROW / 2; d; d >>= 1) total += __shfl_xor_sync(0xFFFFFFFF, total, d);
  }
  if (last && (MODE != 2 || l_pair == 0)) {
    if (shared) total = rounded(total) + more;
    if (residual) total = rounded(total) + onto;
    out[MODE == 1 ? l_pair * (GATED ? half : n) + l_row : l_row] = bits(total);
  }
}
