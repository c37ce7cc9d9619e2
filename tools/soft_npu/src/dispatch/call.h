// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
//
// A call of an operator: CPU kernels over the memory of NPU tensors.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <string>
#include <unordered_set>
#include <vector>

#include "../runtime/runtime.h"

namespace soft_npu {

using torch::jit::Stack;

// What operators do beyond reading rows; set when they are installed.
struct Rules {
  // Read matrices in FRACTAL_NZ.
  std::unordered_set<std::string> read_nz;
  // "operator argument": int32 that holds int4, whose offset the NPU takes in int4.
  std::unordered_set<std::string> packed_int4;
  // Wait for the device: they return a number, or sizes that depend on values.
  std::unordered_set<std::string> synchronize;
};
Rules &rules();

bool on_npu(const at::Tensor &tensor);

// Operators of ATB take tensors of the host, whose values they read when they are called.
bool takes_host(const std::string &name);

// A CPU tensor over the same memory, which it does not own. The same memory gets the same
// storage as long as the NPU tensor's lives.
at::Tensor cpu_alias(const at::Tensor &tensor);

// Replaces each tensor of an argument, in lists as well.
c10::IValue map_tensors(const c10::IValue &value,
                        const std::function<at::Tensor(const at::Tensor &)> &function);

// What is read otherwise than by rows.
struct Layout {
  size_t argument;
  // In a list.
  size_t element;
  char *memory;
  size_t bytes;
  std::vector<int64_t> sizes, strides;
  at::ScalarType dtype;
};

class Call : public Task {
 public:
  // Takes the arguments off the stack.
  Call(const c10::OperatorHandle &op, Stack *stack);

  // Computes, and returns what the CPU kernel returned.
  std::vector<c10::IValue> compute();
  // As results of the NPU's operator.
  std::vector<c10::IValue> on_device(const std::vector<c10::IValue> &results);
  // Keeps where results are, to write there when the graph is replayed.
  void record(Graph *graph, const std::vector<c10::IValue> &results);
  // The same call with other arguments.
  void exchange(Call &&other);
  bool run() override;

  // The arguments that are the results, of a call that allocates none.
  std::vector<c10::IValue> written() const;
  const std::string &name() const { return name_; }
  const std::vector<at::Tensor> &inputs() const { return inputs_; }
  const std::vector<c10::IValue> &given() const { return given_; }

 private:
  c10::IValue take(size_t index, const c10::IValue &value);
  at::Tensor take_tensor(size_t index, size_t element, const at::Tensor &tensor);
  void write_back();

  c10::OperatorHandle op_;
  std::string name_;
  // As they were given, until the call is recorded.
  std::vector<c10::IValue> given_;
  std::vector<at::Tensor> inputs_;
  // For the CPU kernel.
  std::vector<c10::IValue> arguments_, results_;
  std::vector<Layout> layouts_;
  std::vector<c10::weak_intrusive_ptr<c10::StorageImpl>> needed_;
  c10::optional<c10::Device> device_;
  int generator_ = -1;
};

// Whether memory was allocated for a graph: it stays, for that one and those that follow.
bool in_pool(const void *memory);

// Counts of calls, by name.
std::vector<std::string> report();

}  // namespace soft_npu
