// Element types of tensors and messages, and conversions between them.
#pragma once

#include <acl/acl.h>
#include <cstddef>
#include <cstdint>

namespace sim {

// A number of any type without loss: integers up to 64 bits as such.
struct Number {
  bool integer = true;
  int64_t whole = 0;
  double real = 0.0;

  double as_real() const { return integer ? static_cast<double>(whole) : real; }
  int64_t as_whole() const { return integer ? whole : static_cast<int64_t>(real); }
};

// Bytes of an element; 0 for types that are not simulated.
size_t element_size(aclDataType type);

// Whether `load` and `store` know the type. Others can be moved, not computed with.
bool can_convert(aclDataType type);
Number load(aclDataType type, const char* from);
void store(aclDataType type, char* to, const Number& number);

}  // namespace sim
