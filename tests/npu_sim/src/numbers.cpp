#include "numbers.h"

#include <cmath>
#include <cstring>

namespace {

template <class T>
T read(const char* from) {
  T value;
  memcpy(&value, from, sizeof value);
  return value;
}

template <class T>
void write(char* to, T value) {
  memcpy(to, &value, sizeof value);
}

double from_half(uint16_t bits) {
  int exponent = bits >> 10 & 31, fraction = bits & 1023;
  double size = exponent == 31  ? (fraction != 0 ? NAN : INFINITY)
                : exponent == 0 ? std::ldexp(fraction, -24)
                                : std::ldexp(fraction + 1024, exponent - 25);
  return bits >> 15 != 0 ? -size : size;
}

uint16_t to_half(double value) {
  uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  double size = std::fabs(value);
  if (std::isnan(size)) return sign | 0x7E00;
  if (size >= 65520.0) return sign | 0x7C00;
  int exponent = size > 0 ? std::ilogb(size) : -15;
  if (exponent < -14) return sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(size, 24)));
  // A fraction that rounds up to 2048 carries into the exponent, as it should.
  auto fraction = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent))) - 1024;
  return static_cast<uint16_t>(sign | (((exponent + 15) << 10) + fraction));
}

double from_bfloat(uint16_t bits) {
  uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  memcpy(&value, &wide, sizeof value);
  return value;
}

uint16_t to_bfloat(double value) {
  auto narrow = static_cast<float>(value);
  uint32_t wide;
  memcpy(&wide, &narrow, sizeof wide);
  if (std::isnan(narrow)) return static_cast<uint16_t>(wide >> 16 | 64);
  return static_cast<uint16_t>((wide + 0x7FFF + (wide >> 16 & 1)) >> 16);  // ties to even
}

}  // namespace

namespace sim {

size_t element_size(aclDataType type) {
  switch (type) {
    case ACL_INT8:
    case ACL_UINT8:
    case ACL_BOOL:
    case ACL_HIFLOAT8:
    case ACL_FLOAT8_E5M2:
    case ACL_FLOAT8_E4M3FN:
    case ACL_FLOAT8_E8M0:
      return 1;
    case ACL_FLOAT16:
    case ACL_BF16:
    case ACL_INT16:
    case ACL_UINT16:
      return 2;
    case ACL_FLOAT:
    case ACL_INT32:
    case ACL_UINT32:
      return 4;
    case ACL_INT64:
    case ACL_UINT64:
    case ACL_DOUBLE:
    case ACL_COMPLEX64:
      return 8;
    case ACL_COMPLEX128:
      return 16;
    default:
      return 0;
  }
}

bool can_convert(aclDataType type) {
  switch (type) {
    case ACL_HIFLOAT8:
    case ACL_FLOAT8_E5M2:
    case ACL_FLOAT8_E4M3FN:
    case ACL_FLOAT8_E8M0:
    case ACL_COMPLEX64:
    case ACL_COMPLEX128:
      return false;
    default:
      return element_size(type) != 0;
  }
}

Number load(aclDataType type, const char* from) {
  switch (type) {
    case ACL_FLOAT: return {false, 0, read<float>(from)};
    case ACL_DOUBLE: return {false, 0, read<double>(from)};
    case ACL_FLOAT16: return {false, 0, from_half(read<uint16_t>(from))};
    case ACL_BF16: return {false, 0, from_bfloat(read<uint16_t>(from))};
    case ACL_BOOL: return {true, read<uint8_t>(from) != 0, 0};
    case ACL_INT8: return {true, read<int8_t>(from), 0};
    case ACL_UINT8: return {true, read<uint8_t>(from), 0};
    case ACL_INT16: return {true, read<int16_t>(from), 0};
    case ACL_UINT16: return {true, read<uint16_t>(from), 0};
    case ACL_INT32: return {true, read<int32_t>(from), 0};
    case ACL_UINT32: return {true, read<uint32_t>(from), 0};
    default: return {true, read<int64_t>(from), 0};
  }
}

void store(aclDataType type, char* to, const Number& number) {
  switch (type) {
    case ACL_FLOAT: return write(to, static_cast<float>(number.as_real()));
    case ACL_DOUBLE: return write(to, number.as_real());
    case ACL_FLOAT16: return write(to, to_half(number.as_real()));
    case ACL_BF16: return write(to, to_bfloat(number.as_real()));
    case ACL_BOOL: return write(to, static_cast<uint8_t>(number.as_real() != 0));
    case ACL_INT8:
    case ACL_UINT8: return write(to, static_cast<uint8_t>(number.as_whole()));
    case ACL_INT16:
    case ACL_UINT16: return write(to, static_cast<uint16_t>(number.as_whole()));
    case ACL_INT32:
    case ACL_UINT32: return write(to, static_cast<uint32_t>(number.as_whole()));
    default: return write(to, number.as_whole());
  }
}

}  // namespace sim
