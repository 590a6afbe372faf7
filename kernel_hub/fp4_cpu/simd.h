// Vectors of the instruction set at hand. Included inside its namespace, after the target is set and kWidth, the number of
// floats in a register, is defined. Sums of products are written out as multiply_add, and nothing else is contracted, so
// that every instruction set quantizes tokens to the same bits.

typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));

constexpr int kParts = kRows / kWidth;

// One number for each of 16 rows.
struct Rows {
  Floats part[kParts];
};

#define EACH_PART _Pragma("GCC unroll 8") for (int p = 0; p < kParts; ++p)
#define INLINE inline __attribute__((always_inline))

template <class T>
INLINE T load(const void* from) {
  T value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

template <class T>
INLINE void store(void* to, T value) {
  __builtin_memcpy(to, &value, sizeof value);
}

INLINE Floats all(float value) { return value - Floats{}; }
INLINE Ints bits(Floats x) { return (Ints)x; }
INLINE Floats as_floats(Ints x) { return (Floats)x; }
INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }
INLINE Floats absolute(Floats x) { return as_floats(bits(x) & 0x7fffffff); }

INLINE uint32_t bits(float x) { return load<uint32_t>(&x); }
INLINE float as_float(uint32_t x) { return load<float>(&x); }

// To the nearest E2M1 value, ties to even; NaN stays, zero has no sign. In [2^22, 2^23) a float has no bits below 0.5, the
// grid's spacing under 2; above, the spacing doubles with the power of two that the magnitude reaches.
INLINE Floats round_e2m1(Floats x) {
  x = x > 6.0f ? all(6.0f) : x;
  x = x < -6.0f ? all(-6.0f) : x;
  Floats octave = as_floats(bits(x) & 0x7f800000);
  octave = octave < 1.0f ? all(1.0f) : octave;
  const Floats shift = octave * (1.5f * 4194304.0f);
  return (x + shift) - shift;
}

// E4M3 bytes without sign, exactly and without denormal floats: the bits below 2^-6 count units of 2^-9.
INLINE Floats decode_e4m3(Ints byte) {
  const Floats normal = as_floats((byte << 20) + (120 << 23));
  return byte < 8 ? __builtin_convertvector(byte, Floats) * 0x1p-9f : normal;
}

// Nearest E4M3 bytes of positive numbers, ties to even, saturating, never zero.
INLINE Ints encode_e4m3(Floats x) {
  x = x > 0x1p-9f ? x : all(0x1p-9f);
  x = x < 448.0f ? x : all(448.0f);
  const Ints u = bits(x), normal = ((u + 0x7ffff + ((u >> 20) & 1)) >> 20) - (120 << 3);
  return x < 0x1p-6f ? __builtin_convertvector((x * 512.0f + 8388608.0f) - 8388608.0f, Ints) : normal;
}

// 2^(byte - 127); what a byte of 0 stands for is a denormal float.
INLINE Floats decode_e8m0(Ints byte) { return as_floats(byte == 0 ? Ints{} + 0x400000 : byte << 23); }

INLINE float from_bf16(uint16_t x) { return as_float(static_cast<uint32_t>(x) << 16); }

INLINE uint16_t to_bf16(float x) {
  const uint32_t u = bits(x);
  if ((u & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((u >> 16) | 0x40);
  return static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

INLINE float load_number(const void* from, bool is_bf16, int64_t i) {
  return is_bf16 ? from_bf16(static_cast<const uint16_t*>(from)[i]) : static_cast<const float*>(from)[i];
}

INLINE void store_number(void* to, bool is_bf16, int64_t i, float x) {
  if (is_bf16) static_cast<uint16_t*>(to)[i] = to_bf16(x);
  else static_cast<float*>(to)[i] = x;
}

typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));

// kWidth numbers from the i-th on.
INLINE Floats load_numbers(const void* from, bool is_bf16, int64_t i) {
  if (!is_bf16) return load<Floats>(static_cast<const float*>(from) + i);
  return as_floats(__builtin_convertvector(load<Halves>(static_cast<const uint16_t*>(from) + i), Ints) << 16);
}

INLINE void store_numbers(void* to, bool is_bf16, int64_t i, Floats x) {
  if (!is_bf16) return store(static_cast<float*>(to) + i, x);
  const Ints u = bits(x), upper = (u >> 16) & 0xffff, nearest = ((u + 0x7fff + (upper & 1)) >> 16) & 0xffff;
  const Ints rounded = x == x ? nearest : upper | 0x40;
  store(static_cast<uint16_t*>(to) + i, __builtin_convertvector(rounded, Halves));
}

// 16 bytes as 16 integers; in two steps, since GCC makes one of four bytes for one element by element.
INLINE void load_bytes(const uint8_t* from, Ints (&to)[kParts]) {
  typedef uint8_t Bytes __attribute__((vector_size(kWidth)));
  EACH_PART to[p] = __builtin_convertvector(__builtin_convertvector(load<Bytes>(from + p * kWidth), Halves), Ints);
}
