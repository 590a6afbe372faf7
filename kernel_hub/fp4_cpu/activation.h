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

struct Larger {
  static INLINE Floats of(Floats a, Floats b) { return larger(a, b); }
};

struct Sum {
  static INLINE Floats of(Floats a, Floats b) { return a + b; }
};

// In lane l: for l without the bit a pair of a's lanes, else of b's.
template <class Of, int kBit, int... kLane>
INLINE Floats pairs(Floats a, Floats b, std::integer_sequence<int, kLane...>) {
  return Of::of(__builtin_shuffle(a, b, Ints{(kLane & kBit ? kWidth : 0) + (kLane & ~kBit)...}),
                __builtin_shuffle(a, b, Ints{(kLane & kBit ? kWidth : 0) + (kLane | kBit)...}));
}

// In lane l what the lanes of numbers[l] amount to. Everywhere they are taken in the same order.
template <class Of, int kBit = 1>
INLINE Floats across(Floats* numbers) {
  if constexpr (kBit == kWidth) return numbers[0];
  else {
    for (int i = 0; i < kWidth / kBit; i += 2)
      numbers[i / 2] = pairs<Of, kBit>(numbers[i], numbers[i + 1], std::make_integer_sequence<int, kWidth>());
    return across<Of, 2 * kBit>(numbers);
  }
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

// What one unit of E2M1 is worth under scale bytes, and its inverse.
struct Steps {
  Floats unit, inverse;
};

INLINE Floats decode_scale(Ints byte, Format format) { return format == kNvfp4 ? decode_e4m3(byte) : decode_e8m0(byte); }

INLINE Steps steps_of(Ints byte, Format format, float global) {
  if (format == kMxfp4) return {decode_e8m0(byte), decode_e8m0(254 - byte)};
  const Floats scale = decode_e4m3(byte);
  return {scale / global, global / scale};
}

// Up to kWidth groups side by side, of which a vector has one number each.
struct Groups {
  const float* x;
  int64_t count, size;
};

INLINE Floats largest(const Groups& groups) {
  Floats top[kWidth] = {};
  for (int64_t j = 0; j < groups.count; ++j)
    for (int64_t i = 0; i < groups.size; i += kWidth)
      top[j] = larger(absolute(load<Floats>(groups.x + j * groups.size + i)), top[j]);
  return across<Larger>(top);
}

// The (weighted) squared errors that rounding under steps leaves.
INLINE Floats errors_under(const Steps& steps, const Groups& groups, const float* weights) {
  Floats error[kWidth] = {};
  for (int64_t j = 0; j < groups.count; ++j) {
    for (int64_t i = 0; i < groups.size; i += kWidth) {
      const int64_t place = j * groups.size + i;
      const Floats v = load<Floats>(groups.x + place), miss = round_e2m1(v * steps.inverse[j]) * steps.unit[j] - v;
      error[j] += weights == nullptr ? miss * miss : miss * miss * load<Floats>(weights + place);
    }
  }
  return across<Sum>(error);
}

INLINE Ints mxfp4_bytes(Floats absmax) {  // its exponent less that of 6, the largest E2M1 value
  const Floats quarter = absmax / 4.0f;
  const Ints byte = bits(quarter < 0x1p127f ? quarter : all(0x1p127f)) >> 23;
  return byte > 254 ? Ints{} + 254 : byte;
}

INLINE Ints choose_scales(const Groups& groups, Format format, Rule rule, float global) {
  const Floats absmax = largest(groups);
  const Ints first = format == kNvfp4 ? encode_e4m3(absmax / 6.0f * global) : mxfp4_bytes(absmax);
  if (rule == kAbsmax) return first;
  const Ints second = format == kNvfp4 ? encode_e4m3(absmax / 4.0f * global) : first < 254 ? first + 1 : first;
  const Ints others[2] = {second, first > 1 ? first - 1 : first};
  Floats least = errors_under(steps_of(first, format, global), groups, nullptr);
  Ints best = first;
  for (int i = 0; i < (format == kNvfp4 && rule == kMse ? 2 : 1); ++i) {
    const Floats error = errors_under(steps_of(others[i], format, global), groups, nullptr);
    best = error < least ? others[i] : best;
    least = error < least ? error : least;
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
  for (int64_t first = 0; first < a.k; first += group * kWidth) {
    const int64_t left = (a.k - first) / group, count = left < kWidth ? left : kWidth;
    const Ints byte = choose_scales({row + first, count, group}, a.format, a.rule, global);
    const Floats inverse = steps_of(byte, a.format, global).inverse, scale = decode_scale(byte, a.format);
    for (int64_t j = 0; j < count; ++j) {
      float *x = row + first + j * group, rounded[32];
      for (int64_t i = 0; i < group; i += kWidth) store(rounded + i, round_e2m1(load<Floats>(x + i) * inverse[j]));
      if (a.codes != nullptr) {
        const int64_t place = token * a.k + first + j * group;
        write_codes(x, rounded, group, a.codes + place / 2);
        a.scales[place / group] = static_cast<uint8_t>(byte[j]);
      }
      for (int64_t i = 0; i < group; i += kWidth) store(x + i, load<Floats>(rounded + i) * scale[j]);
    }
  }
  if (a.per_token || token == 0) a.token_scale[a.per_token ? token : 0] = 1.0f / global;
}

static void activation(const Activation& a, float* row, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    for (int64_t i = 0; i < a.k; i += kWidth) store(row + i, load_numbers(a.x, a.x_is_bf16, token * a.k + i));
    for (int64_t i = a.k; i < a.k_padded; ++i) row[i] = 0.0f;
    for (int64_t i = 0; a.hadamard != 0 && i < a.k; i += a.hadamard) rotate_block(row + i, a.hadamard);
    if (a.quantize) quantize_token(a, row, token);
    for (int64_t i = 0; a.values != nullptr && i < a.k_padded; i += kWidth)
      store_numbers(a.values, a.values_are_bf16, token * a.k_padded + i, load<Floats>(row + i));
  }
}

static void scales(const ScaleSearch& s, int64_t begin, int64_t end) {
  const int64_t group = group_of(s.format);
  const int low = s.format == kNvfp4 ? 1 : 0, high = s.format == kNvfp4 ? 0x7e : 254;
  const float global = s.format == kNvfp4 ? *s.global : 1.0f;
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t first = 0; first < s.k; first += group * kWidth) {
      const int64_t left = (s.k - first) / group, place = row * s.k + first;
      const Groups groups = {s.weight + place, left < kWidth ? left : kWidth, group};
      const float* weights = s.importance == nullptr ? nullptr : s.importance + first;
      Ints base = {}, best = {};
      for (int64_t j = 0; j < groups.count; ++j) base[j] = s.base[place / group + j];
      Floats least = {};
      for (int64_t i = 0; i < s.count; ++i) {
        Ints byte = base + s.steps[i];
        byte = byte < low ? Ints{} + low : byte > high ? Ints{} + high : byte;
        const Floats error = errors_under(steps_of(byte, s.format, global), groups, weights);
        const Ints better = i == 0 ? Ints{} - 1 : (Ints)(error < least);
        best = better ? byte : best;
        least = better ? error : least;
      }
      for (int64_t j = 0; j < groups.count; ++j) s.scales[place / group + j] = static_cast<uint8_t>(best[j]);
    }
  }
}
