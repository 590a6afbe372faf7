// Rotation and quantization of tokens, and the search of a weight's scales. Included inside an instruction set's namespace.

typedef float Eight __attribute__((vector_size(32)));
typedef int32_t EightInts __attribute__((vector_size(32)));

// Multiplies by a Hadamard matrix over its square root: butterflies inside eight numbers, then between them.
INLINE void rotate_block(float* x, int64_t size) {
  const float norm = size == 16 ? 0.25f : size == 32 ? 0.17677669529663687f : size == 64 ? 0.125f : 0.08838834764831845f;
  for (int64_t i = 0; i < size; i += 8) {
    Eight v = load<Eight>(x + i);
    v = __builtin_shuffle(v, EightInts{1, 0, 3, 2, 5, 4, 7, 6}) + v * Eight{1, -1, 1, -1, 1, -1, 1, -1};
    v = __builtin_shuffle(v, EightInts{2, 3, 0, 1, 6, 7, 4, 5}) + v * Eight{1, 1, -1, -1, 1, 1, -1, -1};
    v = __builtin_shuffle(v, EightInts{4, 5, 6, 7, 0, 1, 2, 3}) + v * Eight{1, 1, 1, 1, -1, -1, -1, -1};
    store(x + i, v);
  }
  for (int64_t half = 8; half < size; half *= 2) {
    for (int64_t i = 0; i < size; i += 8) {
      if (i & half) continue;
      const Eight a = load<Eight>(x + i), b = load<Eight>(x + i + half);
      store(x + i, a + b);
      store(x + i + half, a - b);
    }
  }
  for (int64_t i = 0; i < size; i += 8) store(x + i, load<Eight>(x + i) * norm);
}

INLINE float largest(const float* x, int64_t count) {
  Floats top = {};
  for (int64_t i = 0; i < count; i += kWidth) top = larger(absolute(load<Floats>(x + i)), top);
  float found = 0.0f;
  for (int i = 0; i < kWidth; ++i) found = top[i] > found ? top[i] : found;
  return found;
}

// The largest power of two that takes `absmax` to at most 256 * 6.
INLINE float dynamic_global(float absmax) {
  const float x = 1536.0f / (absmax > 0x1p-100f ? absmax : 0x1p-100f);
  const int exponent = static_cast<int>(bits(x) >> 23) - 127;
  return as_float(static_cast<uint32_t>((exponent < -100 ? -100 : exponent > 100 ? 100 : exponent) + 127) << 23);
}

// What one unit of E2M1 is worth under a scale byte, and its inverse.
struct Step {
  float unit, inverse;
};

INLINE Step step_of(int byte, Format format, float global) {
  if (format == kMxfp4) return {decode_e8m0(byte), byte == 254 ? as_float(0x400000u) : as_float(static_cast<uint32_t>(254 - byte) << 23)};
  const float scale = decode_e4m3(byte);
  return {scale / global, global / scale};
}

// The E2M1 values of a group under a step, and the (weighted) squared error they leave.
INLINE float round_group(const float* x, int64_t group, Step step, const float* weights, float* rounded) {
  Floats error = {};
  for (int64_t i = 0; i < group; i += kWidth) {
    const Floats v = load<Floats>(x + i), q = round_e2m1(v * step.inverse), miss = q * step.unit - v;
    error += weights == nullptr ? miss * miss : miss * miss * load<Floats>(weights + i);
    store(rounded + i, q);
  }
  float sum = 0.0f;
  for (int i = 0; i < kWidth; ++i) sum += error[i];
  return sum;
}

INLINE int mxfp4_byte(float absmax) {  // its exponent less that of 6, the largest E2M1 value
  const float quarter = absmax / 4.0f;
  const int byte = static_cast<int>(bits(quarter < 0x1p127f ? quarter : 0x1p127f) >> 23);
  return byte > 254 ? 254 : byte;
}

// Chooses a group's scale byte and writes its E2M1 values to `rounded`.
INLINE int quantize_group(const float* x, Format format, Rule rule, float global, float* rounded) {
  const int64_t group = group_of(format);
  const float absmax = largest(x, group);
  const int first = format == kNvfp4 ? encode_e4m3(absmax / 6.0f * global) : mxfp4_byte(absmax);
  float least = round_group(x, group, step_of(first, format, global), nullptr, rounded);
  if (rule == kAbsmax) return first;
  const int second = format == kNvfp4 ? encode_e4m3(absmax / 4.0f * global) : first < 254 ? first + 1 : 254;
  const int below = first > 1 ? first - 1 : 1, others[2] = {second, below};
  int best = first;
  for (int i = 0; i < (format == kNvfp4 && rule == kMse ? 2 : 1); ++i) {
    float other[32];
    const float error = round_group(x, group, step_of(others[i], format, global), nullptr, other);
    if (!(error < least)) continue;
    least = error;
    best = others[i];
    __builtin_memcpy(rounded, other, group * sizeof(float));
  }
  return best;
}

INLINE void write_codes(const float* x, const float* rounded, int64_t group, uint8_t* codes) {
  for (int64_t i = 0; i < group; i += 2) {
    int pair = 0;
    for (int64_t j = 0; j < 2; ++j) {
      const float magnitude = as_float(bits(rounded[i + j]) & 0x7fffffff), doubled = 2.0f * magnitude;
      const int code = static_cast<int>(doubled <= 4.0f ? doubled : magnitude == 6.0f ? 7.0f : magnitude + 2.0f);
      pair |= (code | static_cast<int>(bits(x[i + j]) >> 31) << 3) << (4 * j);
    }
    codes[i / 2] = static_cast<uint8_t>(pair);
  }
}

INLINE void quantize_token(const Activation& a, float* row, int64_t token) {
  const int64_t group = group_of(a.format);
  float global = 1.0f;
  if (a.format == kNvfp4) global = a.global != nullptr ? *a.global : dynamic_global(largest(row, a.k));
  for (int64_t first = 0; first < a.k; first += group) {
    float rounded[32];
    const int byte = quantize_group(row + first, a.format, a.rule, global, rounded);
    if (a.codes != nullptr) {
      write_codes(row + first, rounded, group, a.codes + (token * a.k + first) / 2);
      a.scales[(token * a.k + first) / group] = static_cast<uint8_t>(byte);
    }
    const float scale = a.format == kNvfp4 ? decode_e4m3(byte) : decode_e8m0(byte);
    for (int64_t i = 0; i < group; i += kWidth) store(row + first + i, load<Floats>(rounded + i) * scale);
  }
  if (a.per_token || token == 0) a.token_scale[a.per_token ? token : 0] = 1.0f / global;
}

static void activation(const Activation& a, float* row, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    for (int64_t i = 0; i < a.k; ++i) row[i] = load_number(a.x, a.x_is_bf16, token * a.k + i);
    for (int64_t i = a.k; i < a.k_padded; ++i) row[i] = 0.0f;
    for (int64_t i = 0; a.hadamard != 0 && i < a.k; i += a.hadamard) rotate_block(row + i, a.hadamard);
    if (a.quantize) quantize_token(a, row, token);
    if (a.values == nullptr) continue;
    for (int64_t i = 0; i < a.k_padded; ++i) store_number(a.values, a.values_are_bf16, token * a.k_padded + i, row[i]);
  }
}

static void scales(const ScaleSearch& s, int64_t begin, int64_t end) {
  const int64_t group = group_of(s.format);
  const int low = s.format == kNvfp4 ? 1 : 0, high = s.format == kNvfp4 ? 0x7e : 254;
  const float global = s.format == kNvfp4 ? *s.global : 1.0f;
  for (int64_t place = begin * s.k; place < end * s.k; place += group) {
    const float* x = s.weight + place;
    const float* weights = s.importance == nullptr ? nullptr : s.importance + place % s.k;
    const int base = s.base[place / group];
    int best = 0;
    float least = 0.0f, rounded[32];
    for (int64_t i = 0; i < s.count; ++i) {
      int byte = base + s.steps[i];
      byte = byte < low ? low : byte > high ? high : byte;
      const float error = round_group(x, group, step_of(byte, s.format, global), weights, rounded);
      if (i != 0 && !(error < least)) continue;
      best = byte;
      least = error;
    }
    s.scales[place / group] = static_cast<uint8_t>(best);
  }
}
