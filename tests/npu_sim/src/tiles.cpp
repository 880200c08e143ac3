// Matrices in tiles (FRACTAL_NZ), and the two operators by which torch_npu changes formats: it calls
// them by name, with descriptions of tensors, where all others are functions of their own.

#include <acl/acl_op_compiler.h>
#include <cstring>
#include <string>
#include <vector>

#include "numbers.h"
#include "sim.h"

struct aclTensorDesc {
  aclDataType type;
  std::vector<int64_t> shape;  // as the host sees it
  aclFormat format;            // of what is in memory
  std::vector<int64_t> stored;
};

struct aclDataBuffer {
  void* data;
  size_t size;
};

namespace {

// Where an element of matrices [..., rows, columns] lies in tiles [..., C, R, 16, width]: column
// by column of tiles, each of 16 rows and 32 bytes.
class Tiles {
 public:
  explicit Tiles(const aclTensorDesc& desc) {
    size_t dims = desc.shape.size(), stored = desc.stored.size();
    rows_ = dims > 1 ? desc.shape[dims - 2] : 1;
    columns_ = desc.shape[dims - 1];
    for (size_t dim = 0; dim + 2 < dims; dim++) matrices_ *= desc.shape[dim];
    width_ = desc.stored[stored - 1], height_ = desc.stored[stored - 2];
    down_ = desc.stored[stored - 3], across_ = desc.stored[stored - 4];
  }

  int64_t elements() const { return matrices_ * rows_ * columns_; }

  int64_t place(int64_t element) const {
    int64_t column = element % columns_, row = element / columns_ % rows_;
    int64_t matrix = element / columns_ / rows_;
    int64_t tile = (matrix * across_ + column / width_) * down_ + row / height_;
    return (tile * height_ + row % height_) * width_ + column % width_;
  }

 private:
  int64_t matrices_ = 1, rows_, columns_, width_, height_, down_, across_;
};

bool in_tiles(const aclTensorDesc& desc) { return desc.format == ACL_FORMAT_FRACTAL_NZ; }

void cast_format(const aclTensorDesc& from, const char* source, const aclTensorDesc& to,
                 char* target) {
  size_t size = sim::element_size(from.type);
  const Tiles tiles(in_tiles(from) ? from : to);
  for (int64_t element = 0; element < tiles.elements(); element++) {
    int64_t place = tiles.place(element);
    memcpy(target + (in_tiles(to) ? place : element) * size,
           source + (in_tiles(from) ? place : element) * size, size);
  }
}

}  // namespace

extern "C" {

aclTensorDesc* aclCreateTensorDesc(aclDataType type, int dims, const int64_t* shape,
                                   aclFormat format) {
  std::vector<int64_t> sizes(shape, shape + dims);
  return new aclTensorDesc{type, sizes, format, sizes};
}

void aclDestroyTensorDesc(const aclTensorDesc* desc) { delete desc; }

aclError aclSetTensorFormat(aclTensorDesc* desc, aclFormat format) {
  desc->format = format;
  return ACL_SUCCESS;
}

aclError aclSetTensorShape(aclTensorDesc* desc, int dims, const int64_t* shape) {
  desc->stored.assign(shape, shape + dims);
  return ACL_SUCCESS;
}

aclDataType aclGetTensorDescType(const aclTensorDesc* desc) { return desc->type; }

aclFormat aclGetTensorDescFormat(const aclTensorDesc* desc) { return desc->format; }

size_t aclGetTensorDescNumDims(const aclTensorDesc* desc) { return desc->shape.size(); }

aclError aclGetTensorDescDimV2(const aclTensorDesc* desc, size_t index, int64_t* size) {
  if (index >= desc->shape.size()) return ACL_ERROR_INVALID_PARAM;
  *size = desc->shape[index];
  return ACL_SUCCESS;
}

aclDataBuffer* aclCreateDataBuffer(void* data, size_t size) {
  return new aclDataBuffer{data, size};
}

aclError aclDestroyDataBuffer(const aclDataBuffer* buffer) {
  delete buffer;
  return ACL_SUCCESS;
}

aclError aclopCompileAndExecute(const char* name, int, const aclTensorDesc* const inputs[],
                                const aclDataBuffer* const sources[], int,
                                const aclTensorDesc* const outputs[],
                                aclDataBuffer* const targets[], const aclopAttr*, aclopEngineType,
                                aclopCompileType, const char*, aclrtStream stream) {
  std::string operation = name;
  if (operation != "TransData" && operation != "Identity") {
    fprintf(stderr, "[npu_sim] operator %s is not simulated\n", name);
    return ACL_ERROR_OP_NOT_FOUND;
  }
  aclTensorDesc from = *inputs[0], to = *outputs[0];
  aclDataBuffer source = *sources[0], target = *targets[0];
  sim::post(stream, sim::Work::kDeviceCopy, [=] {
    const char* read = sim::reach(source.data);
    char* write = sim::reach(target.data);
    if (in_tiles(from) == in_tiles(to)) {
      memmove(write, read, std::min(source.size, target.size));
    } else {
      cast_format(from, read, to, write);
    }
  });
  return ACL_SUCCESS;
}

}  // extern "C"
