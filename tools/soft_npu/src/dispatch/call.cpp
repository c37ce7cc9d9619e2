// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
#include "call.h"

#include <ATen/CPUGeneratorImpl.h>

#include <map>
#include <mutex>

#include "layout.h"
#include "torch_npu/csrc/aten/NPUGeneratorImpl.h"

namespace soft_npu {
namespace {

struct Storage {
  c10::weak_intrusive_ptr<c10::StorageImpl> npu;
  c10::Storage cpu;
};
std::mutex lock;
std::unordered_map<const c10::StorageImpl *, Storage> storages;
size_t purge_at = 1024;
std::map<std::string, int64_t> counts;

c10::weak_intrusive_ptr<c10::StorageImpl> weak(const c10::Storage &storage) {
  return c10::weak_intrusive_ptr<c10::StorageImpl>(storage.getWeakStorageImpl());
}

c10::Storage cpu_storage(const c10::Storage &npu) {
  const auto *impl = npu.unsafeGetStorageImpl();
  void *memory = npu.mutable_data();
  std::lock_guard<std::mutex> guard(lock);
  auto it = storages.find(impl);
  if (it != storages.end()) {
    const auto &known = it->second;
    if (!known.npu.expired() && known.cpu.data() == memory && known.cpu.nbytes() == npu.nbytes())
      return known.cpu;
    storages.erase(it);
  }
  if (storages.size() > purge_at) {
    for (auto i = storages.begin(); i != storages.end();)
      i = i->second.npu.expired() ? storages.erase(i) : std::next(i);
    purge_at = 2 * storages.size() + 1024;
  }
  c10::Storage cpu(c10::Storage::use_byte_size_t(), npu.nbytes(),
                   c10::DataPtr(memory, c10::Device(c10::kCPU)), nullptr, false);
  storages.emplace(impl, Storage{weak(npu), cpu});
  return cpu;
}

uint64_t mix(uint64_t seed, uint64_t offset) {
  uint64_t z = seed + 0x9E3779B97F4A7C15ull * (offset + 1);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

// A generator of the CPU's for one call, which depends on the NPU's and moves that on.
at::Generator cpu_generator(const c10::IValue &given, bool captured) {
  static std::atomic<uint64_t> captured_calls{0};
  if (captured) return at::make_generator<at::CPUGeneratorImpl>(mix(0, captured_calls++));
  auto *npu = at::get_generator_or_default<at_npu::NPUGeneratorImpl>(
      given.isNone() ? c10::optional<at::Generator>() : given.toGenerator(),
      at_npu::detail::getDefaultNPUGenerator());
  const uint64_t offset = npu->philox_offset_per_thread();
  npu->set_philox_offset_per_thread(offset + 4);
  return at::make_generator<at::CPUGeneratorImpl>(mix(npu->current_seed(), offset));
}

// Writes what a replay computed to where the results of the capture are.
void overwrite(const c10::IValue &to, const c10::IValue &from) {
  if (to.isTensor()) {
    const auto &a = to.toTensor(), &b = from.toTensor();
    if (a.defined() && a.numel() && a.const_data_ptr() != b.const_data_ptr()) a.copy_(b);
  } else if (to.isTensorList()) {
    const auto a = to.toTensorVector(), b = from.toTensorVector();
    for (size_t i = 0; i < a.size(); i++) overwrite(a[i], b[i]);
  }
}

at::Tensor to_device(const at::Tensor &t, c10::Device device,
                     const std::vector<at::Tensor> &inputs) {
  if (!t.defined() || !t.device().is_cpu() || t.layout() != at::kStrided) return t;
  // What is a view of an argument stays one.
  if (t.has_storage() && t.storage().data())
    for (const auto &input : inputs)
      if (input.storage().data() == t.storage().data())
        return at::as_strided(input, t.sizes(), t.strides(), t.storage_offset());
  const auto dense = t.is_non_overlapping_and_dense() ? t : t.contiguous();
  auto result = at::empty_strided(dense.sizes(), dense.strides(),
                                  dense.options().device(device).pinned_memory(false));
  if (dense.numel()) memcpy(result.mutable_data_ptr(), dense.const_data_ptr(), dense.nbytes());
  return result;
}

}  // namespace

Rules &rules() {
  static Rules all;
  return all;
}

bool takes_host(const std::string &name) { return name.rfind("atb::", 0) == 0; }

bool on_npu(const at::Tensor &t) { return t.defined() && t.device().is_privateuseone(); }

at::Tensor cpu_alias(const at::Tensor &t) {
  if (!on_npu(t)) return t;
  const auto options = t.options().device(at::kCPU);
  // One that the CPU kernel can resize.
  if (t.storage().nbytes() == 0) return at::empty_strided(t.sizes(), t.strides(), options);
  auto result = at::detail::make_tensor<c10::TensorImpl>(
      cpu_storage(t.storage()), c10::DispatchKeySet(c10::DispatchKey::CPU), t.dtype());
  auto *impl = result.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  if (!t.is_inference() && !result.is_inference())
    impl->set_version_counter(t.unsafeGetTensorImpl()->version_counter());
  if (t.is_conj()) result._set_conj(true);
  if (t.is_neg()) result._set_neg(true);
  if (t.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  return result;
}

c10::IValue map_tensors(const c10::IValue &value,
                        const std::function<at::Tensor(const at::Tensor &)> &function) {
  if (value.isTensor()) return function(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor &t : value.toTensorVector()) list.push_back(function(t));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const std::optional<at::Tensor> &t : value.toOptionalTensorVector())
      list.push_back(t ? std::optional<at::Tensor>(function(*t)) : std::nullopt);
    return list;
  }
  return value;
}

Call::Call(const c10::OperatorHandle &op, Stack *stack)
    : op_(op), name_(toString(op.operator_name())) {
  const size_t count = op.schema().arguments().size();
  given_.assign(stack->end() - count, stack->end());
  stack->resize(stack->size() - count);
  for (size_t i = 0; i < count; i++) arguments_.push_back(take(i, given_[i]));
}

c10::IValue Call::take(size_t index, const c10::IValue &value) {
  const auto &argument = op_.schema().arguments()[index];
  const auto type = argument.type()->str();
  if (type.find("Generator") != std::string::npos) {
    generator_ = int(index);
    return value;
  }
  if (value.isDevice()) {
    device_ = value.toDevice();
    return c10::Device(c10::kCPU);
  }
  if (argument.name() == "pin_memory") return c10::IValue();
  size_t element = 0;
  return map_tensors(value,
                     [&](const at::Tensor &t) { return take_tensor(index, element++, t); });
}

at::Tensor Call::take_tensor(size_t index, size_t element, const at::Tensor &t) {
  if (!on_npu(t)) return t.defined() && takes_host(name_) ? t.clone() : t;
  if (!device_ || inputs_.empty()) device_ = device_.value_or(t.device());
  inputs_.push_back(t);
  const auto &argument = op_.schema().arguments()[index].name();
  if (is_nz(t)) {
    TORCH_CHECK(rules().read_nz.count(name_), name_, "(", argument, "): FRACTAL_NZ of ",
                t.sizes(), "; the software NPU has it for matrices of products only");
    TORCH_CHECK(t.storage_offset() == 0, name_, "(", argument, "): a slice of FRACTAL_NZ");
    layouts_.push_back({index, element, static_cast<char *>(t.storage().mutable_data()),
                        t.storage().nbytes(), t.sizes().vec(), t.strides().vec(),
                        t.scalar_type()});
    return at::Tensor();
  }
  if (t.scalar_type() == at::kInt && t.storage_offset() != 0 &&
      rules().packed_int4.count(name_ + " " + argument))
    return misread_int4(t);
  return cpu_alias(t);
}

std::vector<c10::IValue> Call::compute() {
  {
    std::lock_guard<std::mutex> guard(lock);
    counts[name_]++;
  }
  if (faulted("operator", name_))
    TORCH_CHECK(false, name_, ": the kernel failed (planted), error code is 507015");
  Stack stack(arguments_);
  for (const auto &layout : layouts_) {
    const auto value = read(name_, layout);
    size_t element = 0;
    stack[layout.argument] = map_tensors(stack[layout.argument], [&](const at::Tensor &t) {
      return element++ == layout.element ? value : t;
    });
  }
  if (generator_ >= 0)
    stack[generator_] = cpu_generator(given_.empty() ? c10::IValue() : given_[generator_],
                                      given_.empty());
  TORCH_CHECK(op_.hasComputedKernelForDispatchKey(c10::DispatchKey::CPU), name_,
              " is not emulated by the software NPU: see tools/soft_npu/ops");
  op_.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &stack);
  return stack;
}

// What an out= call has resized, and what it wrote elsewhere.
void Call::write_back() {
  const auto &arguments = op_.schema().arguments();
  for (size_t i = 0; i < arguments.size(); i++) {
    const auto *info = arguments[i].alias_info();
    if (!info || !info->isWrite() || !given_[i].isTensor()) continue;
    const auto &npu = given_[i].toTensor(), &cpu = arguments_[i].toTensor();
    if (!on_npu(npu) || !cpu.defined()) continue;
    if (npu.sizes() != cpu.sizes()) npu.resize_(cpu.sizes());
    if (cpu.numel() && cpu.const_data_ptr() != npu.const_data_ptr()) cpu_alias(npu).copy_(cpu);
  }
}

std::vector<c10::IValue> Call::written() const {
  const auto &schema = op_.schema();
  std::vector<c10::IValue> values;
  // torch_npu's out= variants do not say that they write to it.
  const auto out = schema.argumentIndexWithName("out");
  if (out && given_[*out].isTensorList()) {
    for (const at::Tensor &t : given_[*out].toTensorVector()) values.push_back(t);
    return values;
  }
  for (const auto &result : schema.returns()) {
    const auto *info = result.alias_info();
    TORCH_CHECK(info && info->isWrite(), name_,
                ": its arguments in a graph are exchanged, but it allocates its result");
    for (size_t j = 0; j < given_.size(); j++) {
      const auto *other = schema.arguments()[j].alias_info();
      if (other && *other == *info) values.push_back(given_[j]);
    }
  }
  return values;
}

std::vector<c10::IValue> Call::on_device(const std::vector<c10::IValue> &results) {
  write_back();
  const auto &schema = op_.schema();
  const auto device = device_.value_or(c10::Device(c10::kPrivateUse1, 0));
  std::vector<c10::IValue> converted;
  for (size_t i = 0; i < results.size(); i++) {
    const auto *info = schema.returns()[i].alias_info();
    c10::IValue value = results[i];
    if (info && info->isWrite()) {
      for (size_t j = 0; j < given_.size(); j++) {
        const auto *other = schema.arguments()[j].alias_info();
        if (other && *other == *info) value = given_[j];
      }
    } else if (!device.is_cpu()) {
      value = map_tensors(
          value, [&](const at::Tensor &t) { return to_device(t, device, inputs_); });
    }
    converted.push_back(value);
  }
  return converted;
}

void Call::record(Graph *graph, const std::vector<c10::IValue> &results) {
  std::unordered_set<const void *> read;
  for (const auto &t : inputs_) read.insert(t.storage().data());
  for (const auto &result : results)
    results_.push_back(map_tensors(result, [&](const at::Tensor &t) {
      const auto cpu = cpu_alias(t);
      // On a chip it is computed by a replay only.
      if (on_npu(t) && t.nbytes() && !read.count(t.storage().data()))
        graph->at_end.push_back([cpu] { poison(cpu.mutable_data_ptr(), cpu.nbytes()); });
      return cpu;
    }));
  for (const auto &t : inputs_)
    if (!in_pool(t.storage().data())) needed_.push_back(weak(t.storage()));
  given_.clear();
  inputs_.clear();
}

void Call::exchange(Call &&other) {
  arguments_ = std::move(other.arguments_);
  layouts_ = std::move(other.layouts_);
  needed_.clear();
  for (const auto &t : other.inputs_)
    if (!in_pool(t.storage().data())) needed_.push_back(weak(t.storage()));
}

bool Call::run() {
  for (const auto &storage : needed_)
    TORCH_CHECK(!storage.expired(), name_,
                ": a graph is replayed that uses memory freed since it was captured");
  const auto computed = compute();
  for (size_t i = 0; i < results_.size(); i++) overwrite(results_[i], computed[i]);
  return true;
}

std::vector<std::string> report() {
  std::lock_guard<std::mutex> guard(lock);
  std::vector<std::string> lines;
  for (const auto &[name, count] : counts) lines.push_back(std::to_string(count) + " " + name);
  return lines;
}

}  // namespace soft_npu
