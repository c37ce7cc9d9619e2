// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
//
// Kernels over those that torch_npu registers for its device: one that computes any
// operator on the CPU, and a few around torch_npu's own.
#include <torch/library.h>

#include <algorithm>
#include <deque>
#include <map>
#include <mutex>

#include "../hccl/comm.h"
#include "layout.h"
#include "torch_npu/csrc/core/npu/NPUStream.h"

namespace soft_npu {
namespace {

using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::OperatorHandle;
using Kernel = void(const OperatorHandle &, DispatchKeySet, Stack *);

struct Functor : c10::OperatorKernel {
  explicit Functor(Kernel *kernel) : kernel(kernel) {}
  void operator()(const OperatorHandle &op, DispatchKeySet keys, Stack *stack) {
    kernel(op, keys, stack);
  }
  Kernel *kernel;
};

std::mutex lock;
std::deque<torch::Library> libraries;
// What torch_npu registered, of the operators that are wrapped.
std::map<std::string, c10::SafeKernelFunction> originals;
// Torch's own, of those that it composes of other operators.
std::map<std::string, c10::SafeKernelFunction> composed;
// Memory of the graphs' pools.
std::unordered_set<const void *> pools;
// Results are written at once: they need no poison.
thread_local bool fills = false;

aclrtStream current_stream() { return c10_npu::getCurrentNPUStream().stream(false); }

void push(Stack *stack, std::vector<c10::IValue> values) {
  for (auto &value : values) stack->push_back(std::move(value));
}

const c10::IValue *argument(const OperatorHandle &op, const std::vector<c10::IValue> &given,
                            const char *name) {
  const auto index = op.schema().argumentIndexWithName(name);
  return index ? &given[*index] : nullptr;
}

bool is_true(const c10::IValue *value) {
  return value && value->isBool() && value->toBool();
}

// Whether an index has a mask, whose number of elements decides on sizes.
bool has_mask(const c10::IValue &value) {
  bool found = false;
  if (value.isOptionalTensorList())
    map_tensors(value, [&](const at::Tensor &t) {
      found |= t.defined() && (t.scalar_type() == at::kBool || t.scalar_type() == at::kByte);
      return t;
    });
  return found;
}

bool waits(const Call &call) {
  const auto &given = call.given();
  return rules().synchronize.count(call.name()) || std::any_of(given.begin(), given.end(), has_mask);
}

// A graph holds what the device does by itself.
void check_capturable(const OperatorHandle &op, const std::string &name,
                      const std::vector<c10::IValue> &given) {
  const std::string cannot = name + " cannot be captured in a graph: ";
  TORCH_CHECK(!rules().synchronize.count(name), cannot, "it waits for the device");
  const bool asynchronous = is_true(argument(op, given, "non_blocking"));
  for (size_t i = 0; i < given.size(); i++) {
    if (given[i].isDevice())
      TORCH_CHECK(!given[i].toDevice().is_cpu(), cannot, "a copy to the host waits for it");
    map_tensors(given[i], [&](const at::Tensor &t) {
      if (!t.defined() || !t.device().is_cpu() || t.dim() == 0 || takes_host(name)) return t;
      TORCH_CHECK(asynchronous && t.is_pinned(), cannot,
                  "a copy between host and device waits for it, unless it is non_blocking "
                  "and the host's memory pinned");
      return t;
    });
    TORCH_CHECK(!has_mask(given[i]), cannot, "an index that is a mask waits for the device");
  }
}

void exchange(TaskGroup *group, Call &&call) {
  for (size_t i = group->next; i < group->end; i++) {
    auto *task = dynamic_cast<Call *>(group->graph->tasks[i].get());
    if (!task || task->name() != call.name()) continue;
    task->exchange(std::move(call));
    group->next = i + 1;
    counters().updates++;
    return;
  }
  TORCH_CHECK(false, call.name(), " is not in the task group that is updated");
}

void compute(const OperatorHandle &op, DispatchKeySet, Stack *stack) {
  const auto stream = current_stream();
  auto call = std::make_shared<Call>(op, stack);
  if (auto *group = updating(stream)) {
    push(stack, call->written());
    return exchange(group, std::move(*call));
  }
  auto *graph = capturing(stream);
  if (graph) check_capturable(op, call->name(), call->given());
  else
    TORCH_CHECK(settles(stream), call->name(),
                " after a graph that waits for an event, on its stream: not emulated");
  if (waits(*call)) counters().synchronizations++;
  const auto results = call->compute();
  fills = true;
  const auto converted = call->on_device(results);
  fills = false;
  if (graph) {
    call->record(graph, converted);
    graph->tasks.push_back(std::move(call));
  }
  push(stack, converted);
}

void call_original(const OperatorHandle &op, DispatchKeySet keys, Stack *stack) {
  originals.at(toString(op.operator_name())).callBoxed(op, keys, stack);
}

void call_composed(const OperatorHandle &op, DispatchKeySet keys, Stack *stack) {
  composed.at(toString(op.operator_name())).callBoxed(op, keys, stack);
}

// torch_npu allocates; what it does not write is poison.
void allocate(const OperatorHandle &op, DispatchKeySet keys, Stack *stack) {
  call_original(op, keys, stack);
  const auto &result = stack->back().toTensor();
  if (!on_npu(result) || result.storage().nbytes() == 0) return;
  if (capturing(current_stream())) {
    std::lock_guard<std::mutex> guard(lock);
    pools.insert(result.storage().data());
  }
  if (!fills) poison(result.storage().mutable_data(), result.storage().nbytes());
}

// Without writing to each page, as large caches are mostly zeros.
bool zero_fast(const at::Tensor &t) {
  if (!on_npu(t) || !t.is_non_overlapping_and_dense() || is_nz(t) || capturing(current_stream()))
    return false;
  zero(t.mutable_data_ptr(), t.nbytes());
  return true;
}

void zero_(const OperatorHandle &op, DispatchKeySet keys, Stack *stack) {
  if (!zero_fast(stack->back().toTensor())) compute(op, keys, stack);
}

void fill_(const OperatorHandle &op, DispatchKeySet keys, Stack *stack) {
  const auto &value = stack->back();
  if (value.isScalar() && value.toScalar().equal(0) && zero_fast((*stack)[stack->size() - 2].toTensor()))
    stack->pop_back();
  else
    compute(op, keys, stack);
}

// op-plugin's ignores pin_memory (ZerosKernelNpuOpApi.cpp), which its `empty` refuses.
void zeros(const OperatorHandle &, DispatchKeySet, Stack *stack) {
  static const auto empty =
      c10::Dispatcher::singleton().findSchemaOrThrow("aten::empty", "memory_format");
  stack->back() = c10::IValue();
  stack->emplace_back();
  empty.callBoxed(stack);
  stack->back().toTensor().zero_();
}

// Between host and device torch_npu copies, and between layouts.
void copy_(const OperatorHandle &op, DispatchKeySet keys, Stack *stack) {
  const auto &self = stack->end()[-3].toTensor(), &source = stack->end()[-2].toTensor();
  const bool devices = on_npu(self) && on_npu(source);
  if (devices && !is_nz(self) && !is_nz(source)) return compute(op, keys, stack);
  if (capturing(current_stream()))
    check_capturable(op, "aten::copy_", {stack->end() - 3, stack->end()});
  call_original(op, keys, stack);
}

// To the host, or from a layout, torch_npu would first convert into rows.
void to_copy(const OperatorHandle &op, DispatchKeySet keys, Stack *stack) {
  auto &source = stack->end()[-long(op.schema().arguments().size())];
  const auto &device = (&source)[*op.schema().argumentIndexWithName("device")];
  const auto &tensor = source.toTensor();
  if (device.isDevice() && device.toDevice().type() != tensor.device().type()) {
    const bool to_host = on_npu(tensor);
    count_copy(tensor.nbytes(), to_host ? ACL_MEMCPY_DEVICE_TO_HOST : ACL_MEMCPY_HOST_TO_DEVICE);
    const std::vector<c10::IValue> given(&source, stack->data() + stack->size());
    if (!is_true(argument(op, given, "non_blocking"))) counters().synchronizations++;
  }
  if (on_npu(source.toTensor()) && is_nz(source.toTensor())) {
    static auto cast = c10::Dispatcher::singleton().findSchemaOrThrow("npu::npu_format_cast", "");
    Stack rows{source, int64_t(ACL_FORMAT_ND), c10::IValue(), c10::IValue()};
    cast.callBoxed(&rows);
    source = rows.back();
  }
  compute(op, keys, stack);
}

// Runs torch_npu's own, which asks the runtime for an operator that a graph cannot hold.
void own_kernel(const OperatorHandle &op, DispatchKeySet keys, Stack *stack) {
  try {
    call_original(op, keys, stack);
  } catch (const c10::Error &) {
    TORCH_CHECK(!capturing(current_stream()), toString(op.operator_name()),
                " cannot be captured in a graph: it is an aclop operator");
    throw;
  }
}

const std::map<std::string, Kernel *> kWrapped = {
    {"aten::empty.memory_format", allocate},
    {"aten::empty_strided", allocate},
    {"aten::empty_like", allocate},
    {"aten::new_empty_strided", allocate},
    {"npu::empty_with_format", allocate},
    {"npu::unsafe_empty_with_format", allocate},
    {"aten::zero_", zero_},
    {"aten::fill_.Scalar", fill_},
    {"aten::zeros", zeros},
    {"aten::copy_", copy_},
    {"aten::_to_copy", to_copy},
    {"npu::npu_format_cast", own_kernel},
    {"npu::npu_format_cast.Tensor", own_kernel},
    {"npu::npu_format_cast_", own_kernel},
    {"npu::npu_format_cast_.acl_format", own_kernel},
    {"npu::_npu_format_cast", own_kernel},
    {"npu::_npu_format_cast.aclnn", own_kernel},
    {"npu::_npu_format_cast.input_dtype", own_kernel},
};

bool is_view(const c10::FunctionSchema &schema) {
  for (const auto &result : schema.returns())
    if (result.alias_info() && !result.alias_info()->isWrite()) return true;
  return false;
}

void implement(const std::string &full, Kernel *kernel,
               DispatchKey key = DispatchKey::PrivateUse1) {
  const auto colon = full.find("::");
  const auto space = full.substr(0, colon), name = full.substr(colon + 2);
  static std::map<std::pair<std::string, DispatchKey>, torch::Library *> known;
  auto &library = known[{space, key}];
  if (!library) {
    libraries.emplace_back(torch::Library::IMPL, space, key, __FILE__, __LINE__);
    library = &libraries.back();
  }
  auto boxed = c10::BoxedKernel::makeFromFunctor(std::make_unique<Functor>(kernel));
  library->impl(name.c_str(), torch::CppFunction::makeFromBoxedKernel(std::move(boxed)));
}

std::optional<OperatorHandle> find(const std::string &full) {
  const auto dot = full.find('.');
  return c10::Dispatcher::singleton().findSchema(
      {full.substr(0, dot), dot == std::string::npos ? "" : full.substr(dot + 1)});
}

// Of operators that torch composes of others, but torch_npu computes itself above the
// dispatcher if it records for gradients: composes them again.
void compose(std::vector<std::string> names) {
  for (const auto &full : names) {
    // As on a device that nobody has registered kernels for.
    const auto key = DispatchKey::AutogradPrivateUse2;
    composed.emplace(full, find(full)->getComputedKernelForDispatchKey(key));
    implement(full, call_composed, DispatchKey::AutogradPrivateUse1);
  }
}

// Takes over operators, and returns the names of those that stay as they are.
std::vector<std::string> install(std::vector<std::string> names, std::vector<std::string> read_nz,
                                 std::vector<std::string> packed_int4,
                                 std::vector<std::string> synchronize) {
  rules().read_nz.insert(read_nz.begin(), read_nz.end());
  rules().packed_int4.insert(packed_int4.begin(), packed_int4.end());
  rules().synchronize.insert(synchronize.begin(), synchronize.end());
  std::vector<std::string> left;
  for (const auto &full : names) {
    const auto op = find(full);
    const auto wrapped = kWrapped.find(full);
    if (!op || (wrapped == kWrapped.end() && is_view(op->schema()))) {
      left.push_back(full);
      continue;
    }
    if (wrapped != kWrapped.end())
      originals.emplace(full, op->getComputedKernelForDispatchKey(DispatchKey::PrivateUse1));
    implement(full, wrapped == kWrapped.end() ? compute : wrapped->second);
  }
  return left;
}

std::vector<std::string> graph_report() {
  const auto &c = counters();
  return {std::to_string(c.replays) + " replays", std::to_string(c.replayed) + " replayed",
          std::to_string(c.waits) + " waits", std::to_string(c.updates) + " updates"};
}

std::vector<int64_t> transfers() {
  const auto &c = counters();
  return {int64_t(c.synchronizations), int64_t(c.to_host), int64_t(c.to_host_bytes),
          int64_t(c.to_device), int64_t(c.to_device_bytes)};
}

std::vector<int64_t> memory(int64_t device) {
  const auto info = memory_info(int32_t(device));
  return {int64_t(info.total), int64_t(info.used), int64_t(info.peak)};
}

at::Tensor storage_bytes(const at::Tensor &tensor) {
  auto bytes = at::empty({int64_t(tensor.storage().nbytes())}, at::kByte);
  memcpy(bytes.mutable_data_ptr(), tensor.storage().data(), bytes.nbytes());
  return bytes;
}

// What the ranks of HCCL's group have each, of the same sizes: [ranks, ...].
at::Tensor all_gather(const std::string &group, const at::Tensor &tensor) {
  auto *comm = find_comm(group);
  TORCH_CHECK(comm, "soft_npu: there is no HCCL group ", group);
  const auto own = tensor.contiguous();
  std::vector<int64_t> sizes{int64_t(comm->ranks)};
  sizes.insert(sizes.end(), own.sizes().begin(), own.sizes().end());
  auto all = at::empty(sizes, own.options());
  comm->exchange("all_gather", own.const_data_ptr(), own.nbytes(), [&] {
    for (uint32_t rank = 0; rank < comm->ranks; rank++)
      comm->fetch(rank, 0, static_cast<char *>(all.mutable_data_ptr()) + rank * own.nbytes(),
                  own.nbytes());
  });
  return all;
}

}  // namespace

bool in_pool(const void *memory) {
  std::lock_guard<std::mutex> guard(lock);
  return pools.count(memory);
}

}  // namespace soft_npu

TORCH_LIBRARY(soft_npu, m) {
  m.def("install(str[] names, str[] read_nz, str[] packed_int4, str[] synchronize) -> str[]",
        soft_npu::install);
  m.def("compose(str[] names) -> ()", soft_npu::compose);
  m.def("report() -> str[]", soft_npu::report);
  m.def("graph_report() -> str[]", soft_npu::graph_report);
  // Synchronizations; copies to the host and their bytes, to the device and their bytes.
  m.def("transfers() -> int[]", soft_npu::transfers);
  // Bytes of a device: in all, used now, used at most.
  m.def("memory(int device) -> int[]", soft_npu::memory);
  m.def("reset_peak(int device) -> ()",
        [](int64_t device) { soft_npu::reset_peak(int32_t(device)); });
  m.def("all_gather(str group, Tensor t) -> Tensor");
  m.def("set_faults(str list) -> ()", [](std::string list) { soft_npu::set_faults(list); });
  m.def("alias(Tensor t) -> Tensor");
  m.def("storage_bytes(Tensor t) -> Tensor");
  // In Python: what came from FRACTAL_NZ, and a kernel of Triton.
  m.def("decoded(Tensor t) -> ()");
  m.def("launch_triton(Tensor(a!)[] tensors, int number) -> ()");
}

TORCH_LIBRARY_IMPL(soft_npu, CompositeExplicitAutograd, m) {
  m.impl("alias", soft_npu::cpu_alias);
  m.impl("storage_bytes", soft_npu::storage_bytes);
}
TORCH_LIBRARY_IMPL(soft_npu, CPU, m) { m.impl("all_gather", soft_npu::all_gather); }
