// The few operators that torch_npu itself calls, beneath its copies and when it gathers tensors of
// different sizes: they cannot be replaced from Python. All others are Python kernels.
//
// An operator is called in two steps: ...GetWorkspaceSize prepares an executor, the second function
// runs it on a stream.

#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "numbers.h"
#include "sim.h"

struct aclTensor {
  std::vector<int64_t> shape, strides;
  aclDataType type;
  int64_t offset;  // in elements
  char* storage;
};

struct aclScalar {
  sim::Number value;
};

struct aclIntArray {
  std::vector<int64_t> values;
};

struct aclOpExecutor {
  aclTensor target, source;
  std::vector<std::pair<aclTensor, sim::Number>> filled;  // before the copy
};

namespace {

// Strides of `source` broadcast to the target's shape.
std::vector<int64_t> broadcast_strides(const aclTensor& source, const aclTensor& target) {
  std::vector<int64_t> strides(target.shape.size(), 0);
  size_t missing = target.shape.size() - source.shape.size();
  for (size_t dim = 0; dim < source.shape.size(); dim++) {
    if (source.shape[dim] != 1) strides[missing + dim] = source.strides[dim];
  }
  return strides;
}

void copy_strided(const aclTensor& target, const aclTensor& source) {
  bool convert = target.type != source.type;
  if (convert && !(sim::can_convert(target.type) && sim::can_convert(source.type))) {
    return sim::fail("no conversion from ACL type " + std::to_string(source.type) + " to " +
                     std::to_string(target.type));
  }
  size_t target_size = sim::element_size(target.type), dims = target.shape.size();
  size_t source_size = sim::element_size(source.type);
  char* to = sim::reach(target.storage) + target.offset * target_size;
  const char* from = sim::reach(source.storage) + source.offset * source_size;
  std::vector<int64_t> from_strides = broadcast_strides(source, target), index(dims, 0);
  int64_t elements = 1;
  for (int64_t length : target.shape) elements *= length;
  for (int64_t element = 0; element < elements; element++) {
    int64_t to_offset = 0, from_offset = 0;
    for (size_t dim = 0; dim < dims; dim++) {
      to_offset += index[dim] * target.strides[dim];
      from_offset += index[dim] * from_strides[dim];
    }
    char* to_element = to + to_offset * target_size;
    const char* from_element = from + from_offset * source_size;
    if (convert) {
      sim::store(target.type, to_element, sim::load(source.type, from_element));
    } else {
      memcpy(to_element, from_element, target_size);
    }
    for (size_t dim = dims; dim-- > 0;) {
      if (++index[dim] < target.shape[dim]) break;
      index[dim] = 0;
    }
  }
}

void fill(const aclTensor& target, const sim::Number& value) {
  // A tensor of one element that is broadcast.
  std::vector<char> element(sim::element_size(target.type));
  sim::store(target.type, element.data(), value);
  copy_strided(target, aclTensor{{}, {}, target.type, 0, element.data()});
}

int prepare(const aclTensor* target, const aclTensor* source, uint64_t* workspace,
            aclOpExecutor** executor) {
  *workspace = 0;
  *executor = new aclOpExecutor{*target, *source, {}};
  return ACL_SUCCESS;
}

}  // namespace

extern "C" {

aclTensor* aclCreateTensor(const int64_t* shape, uint64_t dims, aclDataType type,
                           const int64_t* strides, int64_t offset, aclFormat, const int64_t*,
                           uint64_t, void* storage) {
  return new aclTensor{{shape, shape + dims}, {strides, strides + dims}, type, offset,
                       static_cast<char*>(storage)};
}

int aclDestroyTensor(const aclTensor* tensor) {
  delete tensor;
  return ACL_SUCCESS;
}

int aclnnInplaceCopyGetWorkspaceSize(const aclTensor* target, const aclTensor* source,
                                     uint64_t* workspace, aclOpExecutor** executor) {
  return prepare(target, source, workspace, executor);
}

int aclnnInplaceCopy(void*, uint64_t, aclOpExecutor* executor, aclrtStream stream) {
  sim::post(stream, sim::Work::kDeviceCopy, [copied = *executor] {
    for (auto& [target, value] : copied.filled) fill(target, value);
    copy_strided(copied.target, copied.source);
  });
  delete executor;
  return ACL_SUCCESS;
}

int aclnnCastGetWorkspaceSize(const aclTensor* source, aclDataType, aclTensor* target,
                              uint64_t* workspace, aclOpExecutor** executor) {
  return prepare(target, source, workspace, executor);
}

int aclnnCast(void* workspace, uint64_t size, aclOpExecutor* executor, aclrtStream stream) {
  return aclnnInplaceCopy(workspace, size, executor, stream);
}

aclScalar* aclCreateScalar(void* value, aclDataType type) {
  return new aclScalar{sim::load(type, static_cast<const char*>(value))};
}

int aclDestroyScalar(const aclScalar* scalar) {
  delete scalar;
  return ACL_SUCCESS;
}

aclIntArray* aclCreateIntArray(const int64_t* values, uint64_t size) {
  return new aclIntArray{{values, values + size}};
}

int aclDestroyIntArray(const aclIntArray* array) {
  delete array;
  return ACL_SUCCESS;
}

// `pads`: elements before and after, of the last dimension first.
int aclnnConstantPadNdGetWorkspaceSize(const aclTensor* source, const aclIntArray* pads,
                                       const aclScalar* value, aclTensor* target,
                                       uint64_t* workspace, aclOpExecutor** executor) {
  aclTensor inner = *target;
  inner.shape = source->shape;
  for (size_t pair = 0; pair < pads->values.size() / 2; pair++) {
    int64_t before = pads->values[2 * pair], after = pads->values[2 * pair + 1];
    if (before < 0 || after < 0) return ACL_ERROR_RT_FEATURE_NOT_SUPPORT;
    inner.offset += before * target->strides[target->shape.size() - 1 - pair];
  }
  prepare(&inner, source, workspace, executor);
  (*executor)->filled.push_back({*target, value->value});
  return ACL_SUCCESS;
}

int aclnnConstantPadNd(void* workspace, uint64_t size, aclOpExecutor* executor,
                       aclrtStream stream) {
  return aclnnInplaceCopy(workspace, size, executor, stream);
}

}  // extern "C"
