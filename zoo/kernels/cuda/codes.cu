// What kernels that multiply codes share. Compiled for: KIND, ACT (as zoo/kernels/gated.py numbers them), GATED.

__device__ __forceinline__ float fp16(u16 v) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v));
  return r;
}
__device__ __forceinline__ u32 times2(u32 a, u32 b) {
  u32 r;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
__device__ __forceinline__ u32 plus_times2(u32 a, u32 b, u32 c) {
  u32 r;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}
// A word of codes -> pairs of bf16, half a word apart: of e4m3 2^-120 times the values, of e2m1 2^-126, of four bits 2^-133, or, the second
// and the fourth pair, 2^-129; of bytes with a sign 2^-6 (see zoo/kernels/codes.py).
__device__ __forceinline__ void widen(u32 w, u32* p) {
  if (KIND == 1 || KIND == 2) {
    p[0] = ((w << 4) & 0x07F007F0) | ((w << 8) & 0x80008000);
    p[1] = ((w >> 4) & 0x07F007F0) | (w & 0x80008000);
  } else if (KIND == -1) {
    p[0] = plus_times2((w ^ 0x80808080) & 0x00FF00FF, 0x7F007F00, 0xC000C000);  // 2^127, -2
    p[1] = plus_times2(((w ^ 0x80808080) >> 8) & 0x00FF00FF, 0x7F007F00, 0xC000C000);
  } else if (KIND == 3 || KIND == 6) {  // magnitudes and signs are moved by one product each
    u32 v = w >> 8;
    p[0] = ((w & 0x000F000F) * 4160) & 0x81C081C0;
    p[1] = ((w & 0x00F000F0) * 260) & 0x81C081C0;
    p[2] = ((v & 0x000F000F) * 4160) & 0x81C081C0;
    p[3] = ((v & 0x00F000F0) * 260) & 0x81C081C0;
  } else {
    u32 v = w >> 8;
    p[0] = w & 0x000F000F, p[1] = w & 0x00F000F0, p[2] = v & 0x000F000F, p[3] = v & 0x00F000F0;
  }
}
__device__ __forceinline__ float sigmoid(float v) { return __fdividef(1.f, 1.f + __expf(-v)); }
// As `zoo.kernels.gated.activate`: of numbers of bf16.
__device__ __forceinline__ float activate(float gate, float up, float limit, float alpha) {
  float y;
  if (ACT == 4) {
    gate = fminf(gate, limit), up = fminf(fmaxf(up, -limit), limit);
    y = rounded(gate * rounded(sigmoid(rounded(gate * alpha))));
    return rounded(rounded(up + 1.f) * y);
  }
  if (ACT == 7) gate = fminf(gate, limit);
  if (ACT == 7 || ACT == 8) up = fminf(fmaxf(up, -limit), limit);
  if (ACT == 0 || ACT == 7) {
    y = gate * sigmoid(gate);
  } else if (ACT == 8) {
    y = fminf(rounded(gate * sigmoid(gate)), limit);
  } else if (ACT == 1) {
    y = 0.5f * gate * (1.f + erff(gate * 0.7071067811865476f));
  } else if (ACT == 2) {
    y = 0.5f * gate * (1.f + tanhf(0.7978845608028654f * (gate + 0.044715f * gate * gate * gate)));
  } else if (ACT == 6) {
    y = gate * rounded(sigmoid(rounded(1.702f * gate)));
  } else {
    y = fmaxf(gate, 0.f);
    if (ACT == 3) y *= y;
  }
  return GATED ? rounded(rounded(y) * up) : rounded(y);
}

