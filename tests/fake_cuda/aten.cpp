// The kernels of torch without which no tensor can be filled, made contiguous or cast, and no gradient be added. See fake.h.
//
// torch has two forms of an elementwise kernel (ATen/native/cuda/CUDALoops.cuh):
//   vectorized_elementwise_kernel, unrolled_elementwise_kernel   (int n, functor, char* data[], ...)   all contiguous
//   elementwise_kernel                                           (int n, {offset calculator, char* data[], functor, ...})
// data[0] is the output, the others are inputs. Sums there are of contiguous elements of one dtype alone. Where the input has another dtype than the functor's argument (a "cast"),
// that dtype is an argument too. The layouts are those of torch 2.11.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <optional>
#include <string_view>

#include "fake.h"

namespace fake_cuda {

namespace {

constexpr size_t kMaxDims = 25;

template <size_t Tensors>
struct OffsetCalculator {
  struct Divider {
    unsigned divisor, magic, shift;
  };
  int dims;
  Divider sizes[kMaxDims];
  unsigned strides[kMaxDims][Tensors];  // bytes

  size_t offset(unsigned index, size_t tensor) const {
    size_t result = 0;
    for (int d = 0; d < dims; ++d) {
      result += static_cast<size_t>(index % sizes[d].divisor) * strides[d][tensor];
      index /= sizes[d].divisor;
    }
    return result;
  }
};

// What an elementwise_kernel is given besides n.
struct StridedFill {
  OffsetCalculator<1> offsets;
  char* data[1];
  alignas(8) std::byte value[8];
};
struct StridedCopy {
  OffsetCalculator<2> offsets;
  char* data[2];
  std::byte functor;  // without members
  int8_t dtypes[2];   // only of a cast
};

struct Cast {  // LoadWithCast<1>, StoreWithCast<1>
  int8_t dtype;
  unsigned element_bytes;
};

// The numbers are those of c10::ScalarType.
#define DTYPES(_)                \
  _(0, uint8_t, "unsigned char") \
  _(1, int8_t, "signed char")    \
  _(2, int16_t, "short")         \
  _(3, int32_t, "int")           \
  _(4, int64_t, "long")          \
  _(5, __half, "c10::Half")      \
  _(6, float, "float")           \
  _(7, double, "double")         \
  _(11, bool, "bool")            \
  _(15, __nv_bfloat16, "c10::BFloat16")

constexpr int kHalf = 5, kBFloat16 = 15;

int dtype_named(std::string_view name) {
#define NAMED(number, type, text) \
  if (name == text) return number;
  DTYPES(NAMED)
#undef NAMED
  return -1;
}

template <class F>
bool with_dtype(int dtype, F&& f) {
  switch (dtype) {
#define CASE(number, type, text) \
  case number:                   \
    f(type{});                   \
    return true;
    DTYPES(CASE)
#undef CASE
    default:
      return false;
  }
}

template <class T>
auto plain(T value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half2float(value);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __bfloat162float(value);
  } else {
    return value;
  }
}
template <class To, class From>
To convert(From value) {
  if constexpr (std::is_same_v<To, From>) {
    return value;
  } else if constexpr (std::is_same_v<To, __half>) {
    return __float2half(static_cast<float>(plain(value)));
  } else if constexpr (std::is_same_v<To, __nv_bfloat16>) {
    return __float2bfloat16(static_cast<float>(plain(value)));
  } else {
    return static_cast<To>(plain(value));
  }
}

// offset(i, tensor): of element i in data[tensor], in bytes.
template <class Offset>
int fill(int n, int dtype, char* out, const void* value, Offset&& offset) {
  const bool known = with_dtype(dtype, [&](auto type) {
    for (int i = 0; i < n; ++i) std::memcpy(out + offset(i, 0, sizeof(type)), value, sizeof(type));
  });
  return known ? 0 : kUnknownKernel;
}
template <class Offset>
int copy(int n, int to, int from, char* const* data, Offset&& offset) {
  bool known = false;
  with_dtype(to, [&](auto to_type) {
    known = with_dtype(from, [&](auto from_type) {
      using To = decltype(to_type);
      using From = decltype(from_type);
      for (int i = 0; i < n; ++i) {
        From value;
        std::memcpy(&value, data[1] + offset(i, 1, sizeof(From)), sizeof(From));
        const To result = convert<To>(value);
        std::memcpy(data[0] + offset(i, 0, sizeof(To)), &result, sizeof(To));
      }
    });
  });
  return known ? 0 : kUnknownKernel;
}

// CUDAFunctor_add<T>, of which `alpha` is all.
int add(int n, int dtype, char* const* data, const void* alpha) {
  float factor;
  std::memcpy(&factor, alpha, sizeof factor);
  const bool known = with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    for (int i = 0; i < n; ++i) {
      T a, b;
      std::memcpy(&a, data[1] + i * sizeof(T), sizeof(T));
      std::memcpy(&b, data[2] + i * sizeof(T), sizeof(T));
      const T sum = convert<T>(static_cast<float>(plain(a)) + factor * static_cast<float>(plain(b)));
      std::memcpy(data[0] + i * sizeof(T), &sum, sizeof(T));
    }
  });
  return known ? 0 : kUnknownKernel;
}

size_t contiguous(int i, size_t, size_t element_bytes) { return static_cast<size_t>(i) * element_bytes; }

struct Found {
  enum { kVectorized, kUnrolled, kStrided } form;
  bool fill;
  bool add;
  bool cast;     // the input's dtype is an argument
  int to, from;  // unless it is a cast
};

std::string_view between(std::string_view text, std::string_view begin, std::string_view end) {
  size_t at = text.find(begin);
  if (at == text.npos) return {};
  at += begin.size();
  const size_t stop = text.find(end, at);
  return stop == text.npos ? std::string_view{} : text.substr(at, stop - at);
}

// Of a name that says ...{lambda()#3}...{lambda(float)#1}...: float.
std::string_view lambda_argument(std::string_view name) {
  for (size_t at = 0; (at = name.find("{lambda(", at)) != name.npos; ++at) {
    const std::string_view argument = between(name.substr(at), "{lambda(", ")#");
    if (!argument.empty()) return argument;
  }
  return {};
}

std::optional<Found> recognise(std::string_view name) {
  Found found{};
  if (name.starts_with("void at::native::vectorized_elementwise_kernel<")) {
    found.form = Found::kVectorized;
  } else if (name.starts_with("void at::native::unrolled_elementwise_kernel<")) {
    found.form = Found::kUnrolled;
    found.cast = name.find("LoadWithCast<") != name.npos;
  } else if (name.starts_with("void at::native::elementwise_kernel<")) {
    found.form = Found::kStrided;
    found.cast = name.find("gpu_kernel_impl<") != name.npos;
  } else {
    return {};
  }
  if (name.find("at::native::FillFunctor<") != name.npos) {
    found.fill = true;
    found.to = dtype_named(between(name, "at::native::FillFunctor<", ">"));
    if (found.cast) return {};
  } else if (name.find("at::native::CUDAFunctor_add<") != name.npos) {
    found.add = true;
    found.to = dtype_named(between(name, "at::native::CUDAFunctor_add<", ">"));
    constexpr int kFloat = 6;
    const bool known = found.to == kFloat || found.to == kHalf || found.to == kBFloat16;  // whose alpha is a float
    if (found.form != Found::kVectorized || !known) return {};
  } else if (name.find("copy_kernel_cuda(") != name.npos) {
    found.from = dtype_named(lambda_argument(name));
    found.to = name.find("bfloat16_copy_kernel_cuda(") != name.npos  ? kBFloat16
               : name.find("float16_copy_kernel_cuda(") != name.npos ? kHalf
               : name.find("direct_copy_kernel_cuda(") != name.npos  ? found.from
                                                                     : -1;
    if (found.from < 0) return {};
  } else {
    return {};
  }
  if (found.to < 0) return {};
  return found;
}

size_t dtype_bytes(int dtype) {
  size_t bytes = 0;
  with_dtype(dtype, [&](auto type) { bytes = sizeof(type); });
  return bytes;
}

}  // namespace

int run_aten_kernel(const std::string& name, void** args) {
  const std::optional<Found> found = recognise(name);
  if (!found) return kUnknownKernel;
  const int n = *static_cast<const int*>(args[0]);
  if (found->form == Found::kStrided && found->fill) {
    const auto& a = *static_cast<const StridedFill*>(args[1]);
    return fill(n, found->to, a.data[0], a.value,
                [&](int i, size_t tensor, size_t) { return a.offsets.offset(i, tensor); });
  }
  if (found->form == Found::kStrided) {
    const auto& a = *static_cast<const StridedCopy*>(args[1]);
    return copy(n, found->cast ? a.dtypes[0] : found->to, found->cast ? a.dtypes[1] : found->from, a.data,
                [&](int i, size_t tensor, size_t) { return a.offsets.offset(i, tensor); });
  }
  auto* const data = static_cast<char* const*>(args[2]);
  if (found->fill) return fill(n, found->to, data[0], args[1], contiguous);
  if (found->add) return add(n, found->to, data, args[1]);
  const int from = found->cast ? static_cast<const Cast*>(args[5])->dtype : found->from;
  const int to = found->cast ? static_cast<const Cast*>(args[6])->dtype : found->to;
  return copy(n, to, from, data, contiguous);
}

size_t aten_argument_bytes(const std::string& name, int index) {
  const std::optional<Found> found = recognise(name);
  if (!found) return 0;
  if (index == 0) return sizeof(int);
  if (found->form == Found::kStrided) {
    if (index > 1) return 0;
    return found->fill ? offsetof(StridedFill, value) + dtype_bytes(found->to) : sizeof(StridedCopy);
  }
  if (index == 1) return found->fill ? dtype_bytes(found->to) : found->add ? sizeof(float) : 1;
  if (index == 2) return (found->fill ? 1 : found->add ? 3 : 2) * sizeof(char*);
  if (index > 6 || found->form == Found::kVectorized) return 0;
  return index > 4 && found->cast ? sizeof(Cast) : 1;
}

}  // namespace fake_cuda
