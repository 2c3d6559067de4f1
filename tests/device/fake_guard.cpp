// A device guard for IPU in a torch that was built for CPUs, so that fake tensors on ipu:0 can be indexed and differentiated.
#include <c10/core/impl/FakeGuardImpl.h>
C10_REGISTER_GUARD_IMPL(IPU, c10::impl::FakeGuardImpl<c10::DeviceType::IPU>)
