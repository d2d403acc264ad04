// A device named npu in host memory: the CPU's kernels compute its operators, and it refuses what an NPU refuses.
//
// Refused are host tensors of one dimension or more beside device tensors, and arithmetic in float64.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/FakeGuardImpl.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace {

using at::IntArrayRef;
using at::Tensor;
using c10::Storage;

constexpr c10::DeviceType kDevice = c10::DeviceType::PrivateUse1;
constexpr c10::DeviceIndex kNumDevices = 8;

// Nothing is asynchronous here, so a guard has nothing to do.
using Guard = c10::impl::FakeGuardImpl<kDevice>;
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = c10::alloc_cpu(bytes);
    return {memory, memory, &c10::free_cpu, c10::Device(kDevice, 0)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* target, const void* source, std::size_t bytes) const override {
    default_copy_data(target, source, bytes);
  }
};

DeviceAllocator allocator;
REGISTER_ALLOCATOR(kDevice, &allocator)

struct DeviceHooks final : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  c10::DeviceIndex deviceCount() const override { return kNumDevices; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  bool isPinnedPtr(const void*) const override { return false; }
};

bool is_on_device(const Tensor& tensor) { return tensor.defined() && tensor.device().type() == kDevice; }

void release(void* storage) { delete static_cast<Storage*>(storage); }

// Returns the same memory as that of another device; it lives as long as either is used.
Storage share(const Storage& storage, c10::Device device, c10::Allocator* resizing) {
  auto* kept = new Storage(storage);
  c10::DataPtr data(const_cast<void*>(storage.data()), kept, &release, device);
  return Storage(Storage::use_byte_size_t(), storage.nbytes(), std::move(data), resizing, /*resizable=*/true);
}

// Returns a tensor like another one, on another storage.
Tensor place(const Tensor& tensor, const Storage& storage, c10::DispatchKey key) {
  auto placed = at::detail::make_tensor<at::TensorImpl>(Storage(storage), c10::DispatchKeySet(key), tensor.dtype());
  placed.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  placed._set_conj(tensor.is_conj());
  placed._set_neg(tensor.is_neg());
  return placed;
}

Tensor on_host(const Tensor& tensor) {
  if (!is_on_device(tensor)) {
    return tensor;
  }
  auto storage = share(tensor.storage(), c10::Device(c10::kCPU), c10::GetCPUAllocator());
  return place(tensor, storage, c10::DispatchKey::CPU);
}

Storage on_device(const Storage& storage) { return share(storage, c10::Device(kDevice, 0), &allocator); }

// One call of an operator: its tensors as those of the host, and its results as those of the device.
class Call {
 public:
  explicit Call(std::string name) : name_(std::move(name)) {}

  Tensor take(const Tensor& tensor) {
    if (!is_on_device(tensor)) {
      // A number may come from the host as a tensor of no dimension.
      has_host_tensor_ |= tensor.defined() && tensor.dim() > 0;
      return tensor;
    }
    TORCH_CHECK(tensor.scalar_type() != at::kDouble, name_, ": an NPU does not compute in float64");
    taken_.emplace_back(tensor, on_host(tensor));
    return taken_.back().second;
  }

  void check() const {
    TORCH_CHECK(taken_.empty() || !has_host_tensor_, name_, ": tensors of npu and cpu are mixed");
  }

  // What an operator has resized, such as its output, has other memory now.
  void follow() const {
    for (const auto& [device, host] : taken_) {
      if (host.storage().data() != device.storage().data()) {
        device.unsafeGetTensorImpl()->set_storage_keep_dtype(on_device(host.storage()));
      }
      device.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
    }
  }

  Tensor give(const Tensor& result) const {
    if (!result.defined()) {
      return result;
    }
    for (const auto& [device, host] : taken_) {
      if (host.is_same(result)) {
        return device;
      }
    }
    for (const auto& [device, host] : taken_) {
      if (result.storage().nbytes() > 0 && host.storage().data() == result.storage().data()) {
        return place(result, device.storage(), c10::DispatchKey::PrivateUse1);
      }
    }
    return place(result, on_device(result.storage()), c10::DispatchKey::PrivateUse1);
  }

 private:
  std::string name_;
  std::vector<std::pair<Tensor, Tensor>> taken_;
  bool has_host_tensor_ = false;
};

c10::IValue take_argument(Call& call, const c10::IValue& argument) {
  if (argument.isTensor()) {
    return call.take(argument.toTensor());
  }
  if (argument.isTensorList()) {
    auto tensors = argument.toTensorVector();
    for (auto& tensor : tensors) {
      tensor = call.take(tensor);
    }
    return tensors;
  }
  if (argument.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> tensors;
    for (const std::optional<Tensor>& tensor : argument.toOptionalTensorVector()) {
      tensors.push_back(tensor.has_value() ? std::optional<Tensor>(call.take(*tensor)) : std::nullopt);
    }
    return tensors;
  }
  return argument.isDevice() ? c10::IValue(c10::Device(c10::kCPU)) : argument;
}

c10::IValue give_result(const Call& call, const c10::IValue& result) {
  if (result.isTensor()) {
    return call.give(result.toTensor());
  }
  if (result.isTensorList()) {
    auto tensors = result.toTensorVector();
    for (auto& tensor : tensors) {
      tensor = call.give(tensor);
    }
    return tensors;
  }
  return result;
}

void compute(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  Call call(schema.operator_name().name);
  const size_t first = stack->size() - schema.arguments().size();
  // The tensors that came have to live on until their results are given back.
  const std::vector<c10::IValue> arguments(stack->begin() + static_cast<std::ptrdiff_t>(first), stack->end());
  for (size_t number = 0; number < arguments.size(); ++number) {
    (*stack)[first + number] = take_argument(call, arguments[number]);
  }
  call.check();
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  call.follow();
  for (size_t number = stack->size() - schema.returns().size(); number < stack->size(); ++number) {
    (*stack)[number] = give_result(call, (*stack)[number]);
  }
}

Tensor empty(IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

// The one way between host and device.
Tensor copy_between(const Tensor& source, const Tensor& target, bool) {
  on_host(target).copy_(on_host(source));
  return target;
}

Tensor copy_and_resize(const Tensor& source, const Tensor& target) {
  at::native::resize_output(target, source.sizes());
  return copy_between(source, target, false);
}

const Tensor& resize(const Tensor& self, IntArrayRef size, std::optional<at::MemoryFormat>) {
  auto host = on_host(self);
  host.resize_(size);
  if (host.storage().data() != self.storage().data()) {
    self.unsafeGetTensorImpl()->set_storage_keep_dtype(on_device(host.storage()));
  }
  self.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
  return self;
}

Tensor& set_storage(Tensor& self, Storage storage, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  auto* tensor = self.unsafeGetTensorImpl();
  tensor->set_storage_keep_dtype(std::move(storage));
  std::vector<int64_t> contiguous(size.size(), 1);
  for (size_t axis = size.size(); axis-- > 1;) {
    contiguous[axis - 1] = contiguous[axis] * size[axis];
  }
  tensor->set_sizes_and_strides(size, stride.empty() ? IntArrayRef(contiguous) : stride, offset);
  return self;
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

Tensor as_strided(const Tensor& self, IntArrayRef size, IntArrayRef stride, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, size, stride, offset);
}

// Modules move their parameters by exchanging what is in them, which torch allows among devices that it knows.
bool can_exchange(const Tensor& self, const Tensor& other) {
  auto is_plain = [](const Tensor& tensor) {
    return tensor.key_set().has(c10::DispatchKey::CPU) || tensor.key_set().has(c10::DispatchKey::PrivateUse1);
  };
  return self.key_set() == other.key_set() || (is_plain(self) && is_plain(other));
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&compute>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("_copy_from", copy_between);
  library.impl("_copy_from_and_resize", copy_and_resize);
  library.impl("resize_", resize);
  library.impl("set_.source_Storage_storage_offset", set_storage);
  library.impl("set_.source_Tensor", set_tensor);
  library.impl("as_strided", as_strided);
  library.impl("view", at::native::view);
  library.impl("_reshape_alias", at::native::_reshape_alias);
}

TORCH_LIBRARY_IMPL(aten, CatchAll, library) {
  library.impl("_has_compatible_shallow_copy_type", TORCH_FN(can_exchange));
}

TORCH_LIBRARY(simulated_npu, library) { library.def("on_host(Tensor tensor) -> Tensor", on_host); }

const bool is_registered = [] {
  static DeviceHooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  return true;
}();

}  // namespace
