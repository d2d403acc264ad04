// What a CPU build of torch lacks to take tensors on CUDA through autograd: a device guard, and hooks that say that
// there are devices. Nothing here allocates memory or launches anything: it is for FakeTensors alone.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>

using FakeCudaGuard = c10::impl::FakeGuardImpl<c10::DeviceType::CUDA>;

namespace at {

// Torch asks for hooks of this name.
struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}

  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }

  DeviceIndex deviceCount() const override { return c10::impl::kFakeGuardImplMaxDevices; }
  int getNumGPUs() const override { return c10::impl::kFakeGuardImplMaxDevices; }

  DeviceIndex current_device() const override { return FakeCudaGuard::getDeviceIndex(); }
  DeviceIndex getCurrentDevice() const override { return FakeCudaGuard::getDeviceIndex(); }
  void setCurrentDevice(DeviceIndex index) const override { FakeCudaGuard::setDeviceIndex(index); }
  DeviceIndex exchangeDevice(DeviceIndex index) const override {
    const DeviceIndex before = FakeCudaGuard::getDeviceIndex();
    FakeCudaGuard::setDeviceIndex(index);
    return before;
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override { return exchangeDevice(index); }
};

// The registry's macro names things of this namespace without saying so.
REGISTER_CUDA_HOOKS(CUDAHooks)

}  // namespace at

namespace c10::impl {

C10_REGISTER_GUARD_IMPL(CUDA, FakeCudaGuard)

}  // namespace c10::impl
