#include "hccl/reduce.h"

#include <algorithm>

namespace softnpu::hccl {
namespace {

uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Element types: how they lie in memory (Stored), what they are reduced in (Value), and the way between.
template <class T>
struct Plain {
  using Stored = T;
  using Value = T;
  static Value load(Stored stored) { return stored; }
  static Stored store(Value value) { return value; }
};

struct Bfloat16 {
  using Stored = uint16_t;
  using Value = float;
  static Value load(Stored stored) { return float_of(static_cast<uint32_t>(stored) << 16); }
  static Stored store(Value value) {
    uint32_t bits = bits_of(value);
    if (value != value) return static_cast<Stored>((bits >> 16) | 0x40);
    return static_cast<Stored>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // to nearest, ties to even
  }
};

struct Float16 {
  using Stored = uint16_t;
  using Value = float;

  static Value load(Stored stored) {
    uint32_t sign = (stored & 0x8000u) << 16, exponent = (stored >> 10) & 0x1f, fraction = stored & 0x3ffu;
    if (exponent == 0x1f) return float_of(sign | 0x7f800000u | fraction << 13);
    if (exponent == 0) return float_of(sign | bits_of(static_cast<float>(fraction) * 0x1p-24f));
    return float_of(sign | (exponent + 112) << 23 | fraction << 13);
  }

  static Stored store(Value value) {
    uint32_t bits = bits_of(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<Stored>(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return static_cast<Stored>(sign | 0x7c00u);  // rounds to 65536 or more
    // Below 2^-14 the result is subnormal: adding 0.5 leaves its bits, rounded, at the end of the sum.
    if (magnitude < 0x38800000u)
      return static_cast<Stored>(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)));
    return static_cast<Stored>(sign | (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13);
  }
};

// NaN wins in max and min, wherever it stands.
struct Sum {
  template <class T>
  static T apply(T a, T b) {
    return static_cast<T>(a + b);
  }
};
struct Prod {
  template <class T>
  static T apply(T a, T b) {
    return static_cast<T>(a * b);
  }
};
struct Max {
  template <class T>
  static T apply(T a, T b) {
    return a < b || b != b ? b : a;
  }
};
struct Min {
  template <class T>
  static T apply(T a, T b) {
    return b < a || b != b ? b : a;
  }
};

template <class Element, class Op>
void run(void* out, const std::vector<const char*>& in, uint64_t count) {
  using Stored = typename Element::Stored;
  constexpr uint64_t kBlock = 1024;
  typename Element::Value sums[kBlock];
  for (uint64_t start = 0; start < count; start += kBlock) {
    uint64_t size = std::min(kBlock, count - start);
    auto* first = reinterpret_cast<const Stored*>(in[0]) + start;
    for (uint64_t i = 0; i < size; i++) sums[i] = Element::load(first[i]);
    for (size_t k = 1; k < in.size(); k++) {
      auto* next = reinterpret_cast<const Stored*>(in[k]) + start;
      for (uint64_t i = 0; i < size; i++) sums[i] = Op::apply(sums[i], Element::load(next[i]));
    }
    auto* result = static_cast<Stored*>(out) + start;
    for (uint64_t i = 0; i < size; i++) result[i] = Element::store(sums[i]);
  }
}

using Reduction = void (*)(void*, const std::vector<const char*>&, uint64_t);

template <class Element>
Reduction pick(HcclReduceOp op) {
  switch (op) {
    case HCCL_REDUCE_SUM:
      return run<Element, Sum>;
    case HCCL_REDUCE_PROD:
      return run<Element, Prod>;
    case HCCL_REDUCE_MAX:
      return run<Element, Max>;
    case HCCL_REDUCE_MIN:
      return run<Element, Min>;
    default:
      return nullptr;
  }
}

Reduction pick(HcclDataType type, HcclReduceOp op) {
  switch (type) {
    case HCCL_DATA_TYPE_INT8:
      return pick<Plain<int8_t>>(op);
    case HCCL_DATA_TYPE_UINT8:
      return pick<Plain<uint8_t>>(op);
    case HCCL_DATA_TYPE_INT16:
      return pick<Plain<int16_t>>(op);
    case HCCL_DATA_TYPE_INT32:
      return pick<Plain<int32_t>>(op);
    case HCCL_DATA_TYPE_INT64:
      return pick<Plain<int64_t>>(op);
    case HCCL_DATA_TYPE_UINT64:
      return pick<Plain<uint64_t>>(op);
    case HCCL_DATA_TYPE_FP16:
      return pick<Float16>(op);
    case HCCL_DATA_TYPE_FP32:
      return pick<Plain<float>>(op);
    case HCCL_DATA_TYPE_FP64:
      return pick<Plain<double>>(op);
    case HCCL_DATA_TYPE_BFP16:
      return pick<Bfloat16>(op);
    default:
      return nullptr;
  }
}

struct TypeFacts {
  HcclDataType type;
  size_t size;
  const char* name;
};

const TypeFacts* facts_of(HcclDataType type) {
  static const TypeFacts all[] = {
      {HCCL_DATA_TYPE_INT8, 1, "int8"},       {HCCL_DATA_TYPE_INT16, 2, "int16"},
      {HCCL_DATA_TYPE_INT32, 4, "int32"},     {HCCL_DATA_TYPE_FP16, 2, "float16"},
      {HCCL_DATA_TYPE_FP32, 4, "float32"},    {HCCL_DATA_TYPE_INT64, 8, "int64"},
      {HCCL_DATA_TYPE_UINT64, 8, "uint64"},   {HCCL_DATA_TYPE_UINT8, 1, "uint8"},
      {HCCL_DATA_TYPE_UINT16, 2, "uint16"},   {HCCL_DATA_TYPE_UINT32, 4, "uint32"},
      {HCCL_DATA_TYPE_FP64, 8, "float64"},    {HCCL_DATA_TYPE_BFP16, 2, "bfloat16"},
      {HCCL_DATA_TYPE_INT128, 16, "int128"},  {HCCL_DATA_TYPE_HIF8, 1, "hif8"},
      {HCCL_DATA_TYPE_FP8E4M3, 1, "fp8e4m3"}, {HCCL_DATA_TYPE_FP8E5M2, 1, "fp8e5m2"},
      {HCCL_DATA_TYPE_FP8E8M0, 1, "fp8e8m0"},
  };
  for (const auto& each : all)
    if (each.type == type) return &each;
  return nullptr;
}

}  // namespace

size_t size_of(HcclDataType type) {
  auto* facts = facts_of(type);
  return facts ? facts->size : 0;
}

std::string type_name(HcclDataType type) {
  auto* facts = facts_of(type);
  return facts ? facts->name : "type " + std::to_string(static_cast<int>(type));
}

bool can_reduce(HcclDataType type) { return pick(type, HCCL_REDUCE_SUM) != nullptr; }

void reduce(void* out, const std::vector<const char*>& in, uint64_t count, HcclDataType type, HcclReduceOp op) {
  pick(type, op)(out, in, count);
}

}  // namespace softnpu::hccl
