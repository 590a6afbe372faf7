// GPTQ's serial parts, see torch-ext/hf_fp4_kernels/_gptq.py. Included inside an instruction set's namespace.
//
// A strip is 16 rows of the weight; columns are done in groups, and what a group does to the rest of the block is applied
// when it is done, in the order of its columns.

constexpr int64_t kSolveGroup = 16, kMaxBlock = 128;

INLINE Rows load_rows(const float* from, int64_t count, float rest) {
  if (count == kRows) return load<Rows>(from);
  float padded[kRows];
  for (int64_t i = 0; i < kRows; ++i) padded[i] = i < count ? from[i] : rest;
  return load<Rows>(padded);
}

INLINE void store_rows(float* to, int64_t count, const Rows& rows) { __builtin_memcpy(to, &rows, count * sizeof(float)); }

// rest[j] -= sum over i of factors[i][j] change[i]
INLINE void subtract_products(Rows* rest, int64_t count, const float* factors, int64_t stride, const Rows* change,
                              int64_t size) {
  for (int64_t j = 0; j < count; ++j) {
    Rows value = rest[j];
    for (int64_t i = 0; i < size; ++i) {
      const Floats factor = all(-factors[i * stride + j]);
      EACH_PART value.part[p] = isa_multiply_add(factor, change[i].part[p], value.part[p]);
    }
    rest[j] = value;
  }
}

static void solve(const SolveBlock& s, int64_t begin, int64_t end) {
  for (int64_t strip = begin; strip < end; ++strip) {
    const int64_t row = strip * kRows, rows = s.n - row < kRows ? s.n - row : kRows;
    alignas(64) Rows tile[kMaxBlock], errors[kSolveGroup];
    for (int64_t i = 0; i < s.count; ++i) tile[i] = load_rows(s.columns + i * s.n + row, rows, 0.0f);
    for (int64_t first = 0; first < s.count; first += kSolveGroup) {
      for (int64_t i = 0; i < kSolveGroup; ++i) {
        const int64_t column = first + i, place = column * s.n + row;
        const float* factors = s.upper + column * s.stride + first;
        const Rows steps = load_rows(s.steps + place, rows, 0.0f), inverse = load_rows(s.inverse + place, rows, 0.0f);
        Rows quantized;
        EACH_PART {
          const Floats value = tile[column].part[p];
          quantized.part[p] = round_e2m1(value * inverse.part[p]) * steps.part[p];
          errors[i].part[p] = (value - quantized.part[p]) / factors[i];
        }
        subtract_products(tile + column + 1, kSolveGroup - 1 - i, factors + i + 1, s.stride, errors + i, 1);
        store_rows(s.quantized + place, rows, quantized);
        store_rows(s.errors + place, rows, errors[i]);
      }
      const int64_t next = first + kSolveGroup;
      subtract_products(tile + next, s.count - next, s.upper + first * s.stride + next, s.stride, errors, kSolveGroup);
    }
  }
}

// Steps of 16 rows under their scale bytes.
struct RowSteps {
  Rows unit, inverse;
};

INLINE RowSteps row_steps(const Ints (&byte)[kParts], Format format, const float* global) {
  RowSteps rows;
  EACH_PART {
    const Steps steps = steps_of(byte[p], format, format == kNvfp4 ? *global : 1.0f);
    rows.unit.part[p] = steps.unit;
    rows.inverse.part[p] = steps.inverse;
  }
  return rows;
}

// Moves each row's scale to a neighbour on its grid, and the values with it, where that lowers the error.
INLINE void rescale(const DescendBlock& d, const float* square, Rows* values, Rows* gradient, Ints (&stored)[kParts]) {
  const int size = static_cast<int>(group_of(d.format)), low = d.format == kNvfp4 ? 1 : 0,
            high = d.format == kNvfp4 ? 0x7e : 254;
  Rows wanted[32], change[32] = {}, least = {};
  Ints chosen[kParts];
  EACH_PART chosen[p] = stored[p];
  for (int i = 0; i < size; ++i)
    EACH_PART wanted[i].part[p] = values[i].part[p] + gradient[i].part[p] / square[i * d.stride + i];
  for (int move = -1; move <= 1; move += 2) {
    Ints byte[kParts];
    EACH_PART {
      byte[p] = stored[p] + move;
      byte[p] = byte[p] < low ? Ints{} + low : byte[p] > high ? Ints{} + high : byte[p];
    }
    const RowSteps steps = row_steps(byte, d.format, d.global);
    Rows difference[32], error = {};
    for (int i = 0; i < size; ++i)
      EACH_PART difference[i].part[p] =
          round_e2m1(wanted[i].part[p] * steps.inverse.part[p]) * steps.unit.part[p] - values[i].part[p];
    for (int i = 0; i < size; ++i) {
      Rows product = {};
      for (int j = 0; j < size; ++j) {
        const Floats factor = all(square[i * d.stride + j]);
        EACH_PART product.part[p] = isa_multiply_add(factor, difference[j].part[p], product.part[p]);
      }
      EACH_PART error.part[p] += difference[i].part[p] * (product.part[p] - 2.0f * gradient[i].part[p]);
    }
    EACH_PART {
      const Ints better = error.part[p] < least.part[p];
      least.part[p] = better ? error.part[p] : least.part[p];
      chosen[p] = better ? byte[p] : chosen[p];
      for (int i = 0; i < size; ++i) change[i].part[p] = better ? difference[i].part[p] : change[i].part[p];
    }
  }
  for (int i = 0; i < size; ++i) EACH_PART values[i].part[p] += change[i].part[p];
  EACH_PART stored[p] = chosen[p];
}

static void descend(const DescendBlock& d, int64_t begin, int64_t end) {
  const int64_t size = group_of(d.format);
  for (int64_t strip = begin; strip < end; ++strip) {
    const int64_t row = strip * kRows, rows = d.n - row < kRows ? d.n - row : kRows;
    alignas(64) Rows gradient[kMaxBlock], values[32], moved[32];
    for (int64_t i = 0; i < d.count; ++i) gradient[i] = load_rows(d.gradient + i * d.n + row, rows, 0.0f);
    for (int64_t first = 0; first < d.count; first += size) {
      const float* square = d.matrix + first * d.stride + first;
      uint8_t bytes[kRows], *scale = d.scale + first / size * d.n + row;
      for (int64_t i = 0; i < kRows; ++i) bytes[i] = i < rows ? scale[i] : 127;
      Ints stored[kParts];
      load_bytes(bytes, stored);
      const RowSteps steps = row_steps(stored, d.format, d.global);
      for (int64_t i = 0; i < size; ++i) {
        values[i] = load_rows(d.current + (first + i) * d.n + row, rows, 0.0f);
        moved[i] = values[i];
      }
      for (int64_t i = 0; i < size; ++i) {
        const float* factors = square + i * d.stride;
        const float inverse = 1.0f / factors[i];
        Rows risen;
        EACH_PART {
          const Floats best = isa_multiply_add(gradient[first + i].part[p], all(inverse), values[i].part[p]);
          const Floats rounded = round_e2m1(best * steps.inverse.part[p]) * steps.unit.part[p];
          risen.part[p] = rounded - values[i].part[p];
          values[i].part[p] = rounded;
        }
        subtract_products(gradient + first, size, factors, 0, &risen, 1);
      }
      rescale(d, square, values, gradient + first, stored);
      Rows risen[32];
      for (int64_t i = 0; i < size; ++i) EACH_PART {
          risen[i].part[p] = values[i].part[p] - moved[i].part[p];
          moved[i].part[p] = -risen[i].part[p];
        }
      subtract_products(gradient + first + size, d.count - first - size, square + size, d.stride, risen, size);
      for (int64_t i = 0; i < size; ++i) {
        store_rows(d.current + (first + i) * d.n + row, rows, values[i]);
        store_rows(d.moved + (first + i) * d.n + row, rows, moved[i]);
      }
      EACH_PART for (int i = 0; i < kWidth; ++i) bytes[p * kWidth + i] = static_cast<uint8_t>(stored[p][i]);
      __builtin_memcpy(scale, bytes, rows);
    }
  }
}
