// The part of the CUDA driver that launches take, on two devices, with its rules for contexts.
#include <dlfcn.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

namespace {
enum { SUCCESS = 0, INVALID_VALUE = 1, NOT_INITIALIZED = 3, INVALID_IMAGE = 200,
       INVALID_CONTEXT = 201, INVALID_HANDLE = 400, NOT_FOUND = 500 };

struct Context { int device; };
struct Module { Context* context; };
struct Function { Context* context; std::string name; };

Context contexts[2] = {{0}, {1}};
bool initialised = false;
thread_local std::vector<Context*> stack;

// Returns a status, for a kernel by its name in the module.
using Launched = int (*)(const char*, int, unsigned, unsigned, unsigned, std::uintptr_t, void**);
Launched launched = nullptr;
}  // namespace

extern "C" {
void stub_reset(Launched callback) { launched = callback; }

int cuGetProcAddress_v2(const char* name, void** found, int, std::uint64_t, void*) {
  *found = dlsym(RTLD_DEFAULT, name);
  return SUCCESS;
}
// NVRTC reads tables of a driver that is loaded.
int cuGetExportTable(const void** table, const void*) { *table = nullptr; return NOT_FOUND; }

// So that others in the process take the driver for none.
int cuDriverGetVersion(int*) { return NOT_INITIALIZED; }

int cuInit(unsigned) { initialised = true; return SUCCESS; }
int cuDeviceGet(int* device, int ordinal) {
  if (!initialised) return NOT_INITIALIZED;
  *device = ordinal;
  return ordinal == 0 || ordinal == 1 ? SUCCESS : INVALID_VALUE;
}
int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = contexts + device;
  return SUCCESS;
}
int cuCtxGetCurrent(void** context) {
  *context = stack.empty() ? nullptr : stack.back();
  return SUCCESS;
}
int cuCtxPushCurrent(void* context) {
  stack.push_back(static_cast<Context*>(context));
  return SUCCESS;
}
int cuCtxPopCurrent(void** context) {
  if (stack.empty()) return INVALID_CONTEXT;
  *context = stack.back();
  stack.pop_back();
  return SUCCESS;
}
int cuModuleLoadData(void** module, const void* image) {
  if (stack.empty()) return INVALID_CONTEXT;
  if (std::memcmp(image, "\177ELF", 4)) return INVALID_IMAGE;
  *module = new Module{stack.back()};
  return SUCCESS;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  *function = new Function{static_cast<Module*>(module)->context, name};
  return SUCCESS;
}
int cuLaunchKernel(void* function, unsigned grid, unsigned y, unsigned z, unsigned threads,
                   unsigned threads_y, unsigned threads_z, unsigned shared, void* stream,
                   void** arguments, void** extra) {
  if (stack.empty()) return INVALID_CONTEXT;
  const Function& called = *static_cast<Function*>(function);
  if (called.context != stack.back()) return INVALID_HANDLE;
  const bool flat = y == 1 && z == 1 && threads_y == 1 && threads_z == 1;
  if (!flat || grid == 0 || threads > 1024 || shared > 48 * 1024 || extra) return INVALID_VALUE;
  return launched(called.name.c_str(), called.context->device, grid, threads, shared,
                  reinterpret_cast<std::uintptr_t>(stream), arguments);
}
int cuGetErrorString(int status, const char** text) {
  *text = status == INVALID_IMAGE ? "device kernel image is invalid" : "a stub's error";
  return SUCCESS;
}
}
