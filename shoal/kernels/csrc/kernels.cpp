// The kernels themselves; compiled once for each instruction set, with SHOAL_SET as its name.
// No header of the C++ library may be used here (see vec.h).
#include "kernels.h"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define TEXT_(a) #a
#define TEXT(a) TEXT_(a)

namespace shoal {
namespace {

#include "vec.h"

// Sums in an order that depends on the number of columns alone, so a row's result is its own.
template <class T>
void rms_norm(const T *x, const T *weight, T *y, int64_t rows, int64_t columns, float eps) {
  const int64_t whole = columns - columns % BLOCK;
  for (int64_t row = 0; row < rows; row++, x += columns, y += columns) {
    vf squares[BLOCK / WIDTH] = {};
    for (int64_t k = 0; k < whole; k += BLOCK)
      for (int64_t j = 0; j < BLOCK / WIDTH; j++) {
        vf v = load(x + k + j * WIDTH);
        squares[j] += v * v;
      }
    float total = sum(squares);
    for (int64_t k = whole; k < columns; k++) total += load_one(x + k) * load_one(x + k);
    const float scale = 1.0f / __builtin_sqrtf(total / (float)columns + eps);
    for (int64_t k = 0; k < whole; k += WIDTH) store(y + k, load(x + k) * splat(scale) * load(weight + k));
    for (int64_t k = whole; k < columns; k++) store_one(y + k, load_one(x + k) * scale * load_one(weight + k));
  }
}

}  // namespace

extern const Kernels JOIN(kernels_, SHOAL_SET);
const Kernels JOIN(kernels_, SHOAL_SET) = {TEXT(SHOAL_SET), rms_norm<float>, rms_norm<bf16>};

}  // namespace shoal
