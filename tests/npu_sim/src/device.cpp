// What the device says about itself, and the settings that it takes and ignores.

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <acl/acl_op_compiler.h>

#include "sim.h"

namespace {

constexpr int kDevices = 8;

thread_local int32_t current_device = 0;
thread_local aclrtContext current_context = nullptr;
// A context per device; only their addresses matter.
char contexts[kDevices];

// The device and the version of CANN decide which of its ways torch_npu takes, so tests choose them.
const char* setting(const char* name, const char* otherwise) {
  const char* value = getenv(name);
  return value != nullptr ? value : otherwise;
}

}  // namespace

extern "C" {

aclError aclInit(const char*) { return ACL_SUCCESS; }
aclError aclFinalize() { return ACL_SUCCESS; }

aclError aclrtGetDeviceCount(uint32_t* count) {
  *count = kDevices;
  return ACL_SUCCESS;
}

aclError aclrtSetDevice(int32_t device) {
  if (device < 0 || device >= kDevices) return ACL_ERROR_RT_INVALID_DEVICEID;
  current_device = device;
  current_context = &contexts[device];
  return ACL_SUCCESS;
}

aclError aclrtGetDevice(int32_t* device) {
  if (current_context == nullptr) return ACL_ERROR_RT_CONTEXT_NULL;
  *device = current_device;
  return ACL_SUCCESS;
}

aclError aclrtResetDevice(int32_t) { return ACL_SUCCESS; }

aclError aclrtGetCurrentContext(aclrtContext* context) {
  *context = current_context;
  return current_context != nullptr ? ACL_SUCCESS : ACL_ERROR_RT_CONTEXT_NULL;
}

aclError aclrtSetCurrentContext(aclrtContext context) {
  current_context = context;
  current_device = static_cast<int32_t>(static_cast<char*>(context) - contexts);
  return ACL_SUCCESS;
}

const char* aclrtGetSocName() { return setting("NPU_SIM_SOC", "Ascend910B1"); }

aclError aclsysGetVersionStr(char*, char* version) {
  strncpy(version, setting("NPU_SIM_CANN", "9.0.0"), ACL_PKG_VERSION_MAX_SIZE - 1);
  return ACL_SUCCESS;
}

aclError aclGetDeviceCapability(uint32_t, aclDeviceInfo, int64_t* value) {
  *value = 24;  // cores; tilings of real kernels would depend on it
  return ACL_SUCCESS;
}

aclError aclrtDeviceCanAccessPeer(int32_t* can, int32_t, int32_t) {
  *can = 1;
  return ACL_SUCCESS;
}

aclError aclrtDeviceGetBareTgid(int32_t* process) {
  *process = getpid();
  return ACL_SUCCESS;
}

size_t aclGetCompileoptSize(aclCompileOpt) { return 1; }

aclError aclGetCompileopt(aclCompileOpt, char* value, size_t length) {
  if (length == 0) return ACL_ERROR_INVALID_PARAM;
  value[0] = '\0';
  return ACL_SUCCESS;
}

aclError aclrtGetSysParamOpt(aclSysParamOpt, int64_t* value) {
  *value = 0;
  return ACL_SUCCESS;
}

aclError aclrtCtxGetSysParamOpt(aclSysParamOpt, int64_t* value) {
  *value = 0;
  return ACL_SUCCESS;
}

void aclAppLog(aclLogLevel, const char*, const char*, uint32_t, const char*, ...) {}

// Looked up by name, so the linker does not ask for them; their absence would be an error.
aclError aclrtSetSysParamOpt(aclSysParamOpt, int64_t) { return ACL_SUCCESS; }
aclError aclrtCtxSetSysParamOpt(aclSysParamOpt, int64_t) { return ACL_SUCCESS; }
aclError aclSetCompileopt(aclCompileOpt, const char*) { return ACL_SUCCESS; }
aclError aclrtSetDeviceSatMode(aclrtFloatOverflowMode) { return ACL_SUCCESS; }
aclError aclrtSetOpWaitTimeout(uint32_t) { return ACL_SUCCESS; }
aclError aclrtSetOpExecuteTimeOut(uint32_t) { return ACL_SUCCESS; }
aclError aclrtSetStreamFailureMode(aclrtStream, uint64_t) { return ACL_SUCCESS; }

}  // extern "C"
