# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Run Triton kernels with triton-ascend's interpreter on the software NPU's memory.

A launch is an operator of the software NPU, so that graphs can capture it.
"""

import functools
import importlib
import re
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

_launches: dict[int, tuple[Any, str, dict[str, Any]]] = {}
_TENSOR = object()
_BFLOAT16_NAN = 0x7FC0


def install() -> None:
    """Replace the driver and the launcher of the imported `triton`."""
    from triton.backends import backends
    from triton.runtime import interpreter
    from triton.runtime.driver import driver

    backends["ascend"].driver.is_active = classmethod(lambda _: True)
    driver.set_active(_Driver())
    original = interpreter.GridExecutor
    compiler = backends["ascend"].compiler
    # Options of the compiler, which the interpreter does not accept.
    names = compiler.parse_options.__globals__
    options = names["NPUOptions"].__dataclass_fields__

    class Executor(original):  # type: ignore[misc, valid-type]
        """Launches through the dispatcher."""

        def __call__(self, *args: Any, **kwargs: Any) -> None:
            for name in options.keys() - {*self.arg_names}:
                kwargs.pop(name, None)
            named = dict(zip(self.arg_names, args)) | kwargs
            tensors = [x for x in named.values() if isinstance(x, torch.Tensor)]
            blanks = {
                name: _TENSOR if isinstance(x, torch.Tensor) else x
                for name, x in named.items()
            }
            number = len(_launches)
            _launches[number] = super().__call__, self.fn.__name__, blanks
            torch.ops.soft_npu.launch_triton(tensors, number)

    interpreter.GridExecutor = Executor
    builder = interpreter.InterpreterBuilder
    builder.create_gather = _gather
    builder.create_extern_elementwise = _libdevice
    builder.cast_impl = _with_bfloat16(builder.cast_impl)
    builder.get_bf16 = _get_bf16
    builder.get_int1_ty = _get_int1_ty
    builder.get_all_ones_value = _with_bool(builder.get_all_ones_value)
    for name in _ARITHMETIC:
        setattr(builder, name, _in_float32(getattr(builder, name)))
    along_axis = interpreter.ReduceScanOpIneterface
    along_axis.apply = _from_the_end(along_axis.apply)
    # The smallest sizes of a product, which are the same for all targets.
    functions = interpreter.interpreter_builder.codegen_fns
    functions["min_dot_size"] = names["min_dot_size"](None)
    # The interpreter gives its builder to functions of `triton.language`, and only when
    # it launches a kernel. Modules have taken some of them by then.
    language: Any = importlib.import_module("triton.language")
    language.cast = language.tensor.cast = _saturating(language.cast)
    interpreter._patch_lang(types.SimpleNamespace(__globals__={"tl": language}))
    libdevice = importlib.import_module("triton.language.extra.ascend.libdevice")
    interpreter._patch_builtin(libdevice, interpreter.interpreter_builder)


def _from_the_end(apply: Callable[..., Any]) -> Callable[..., Any]:
    """Reduce and scan along an axis counted from the end, as compiled kernels do."""

    def applied(operation: Any, values: Any) -> Any:
        first = values[0] if isinstance(values, tuple) else values
        if operation.axis is not None:
            operation.axis %= first.handle.data.ndim
        return apply(operation, values)

    return applied


def _gather(_: Any, src: Any, index: Any, axis: int) -> Any:
    """`gather`, which upstream's interpreter has and triton-ascend's lacks."""
    import numpy as np
    from triton.runtime.interpreter import TensorHandle

    return TensorHandle(np.take_along_axis(src.data, index.data, axis), src.dtype)


# Functions of triton-ascend's libdevice that numpy has by the same name.
_LIBDEVICE = re.compile("__hmf_(isinf|isnan|log1p|tanh?)(f|Dh)?")


def _libdevice(
    builder: Any, _: str, __: str, symbol: str, args: list[Any], kind: Any, ___: bool
) -> Any:
    """An elementwise function of a library, which the interpreter cannot call."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    function = _LIBDEVICE.fullmatch(symbol)
    if function is None:
        raise NotImplementedError(
            f"{symbol} is not emulated by the software NPU: see `_LIBDEVICE` in "
            "tools/soft_npu/triton_kernels.py"
        )
    values = [
        (builder.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x).data
        for x in args
    ]
    return TensorHandle(getattr(np, function[1])(*values), kind.scalar)


def _get_int1_ty(_: Any) -> Any:
    """The type of booleans, which triton-ascend's interpreter lacks."""
    import triton.language as tl

    return tl.int1


def _with_bool(get_all_ones: Callable[..., Any]) -> Callable[..., Any]:
    """Know what all ones are of a boolean, with which `~` inverts it."""
    import triton.language as tl

    def get_all_ones_value(builder: Any, kind: Any) -> Any:
        if kind.scalar == tl.int1:
            return builder.get_int1(True)
        return get_all_ones(builder, kind)

    return get_all_ones_value


def _with_bfloat16(cast: Callable[..., Any]) -> Callable[..., Any]:
    """Round to nearest even in casts to bfloat16; triton's interpreter truncates.

    It casts the bits of bfloat16 instead of the values, except to and from float32.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def cast_impl(builder: Any, src: Any, dst_type: Any) -> Any:
        pair = src.dtype.scalar, dst_type.scalar
        if pair == (tl.bfloat16, tl.float32):
            data = (src.data.astype(np.uint32) << 16).view(np.float32)
        elif pair == (tl.float32, tl.bfloat16):
            bits = np.ascontiguousarray(src.data).view(np.uint32)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            data = np.where(np.isnan(src.data), _BFLOAT16_NAN, rounded).astype(
                np.uint16
            )
        elif pair[0] == pair[1] or tl.bfloat16 not in pair:
            return cast(builder, src, dst_type)
        else:
            return cast_impl(builder, cast_impl(builder, src, tl.float32), dst_type)
        return TensorHandle(data, dst_type.scalar)

    return cast_impl


def _saturating(cast: Callable[..., Any]) -> Callable[..., Any]:
    """Know triton-ascend's `overflow_mode`, which it gives to its compiler as a hint.

    Like the compiler, it casts integers to or from unsigned ones by way of float32.
    Source: triton-ascend `triton_patch/language/core.py` and `semantic.py`.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    @functools.wraps(cast)
    def saturating(
        input: Any,
        dtype: Any,
        *args: Any,
        overflow_mode: str | None = None,
        _builder: Any,
        **options: Any,
    ) -> Any:
        if overflow_mode == "trunc" or dtype == tl.int1:
            overflow_mode = None
        if overflow_mode != "saturate" or not dtype.is_int():
            options["overflow_mode"] = overflow_mode
            return cast(input, dtype, *args, _builder=_builder, **options)
        source, scalar = input.handle, input.dtype
        narrower = scalar.primitive_bitwidth >= dtype.primitive_bitwidth
        unsigned = scalar.is_int_unsigned() or dtype.is_int_unsigned()
        if scalar == tl.bfloat16 or (scalar.is_int() and unsigned and narrower):
            source = _builder.cast_impl(source, tl.float32)
        data = _builder.cast_impl(source, dtype).data
        limits = np.iinfo(data.dtype)
        for limit, over in (
            (limits.min, np.less_equal),
            (limits.max, np.greater_equal),
        ):
            data = np.where(over(source.data, limit), data.dtype.type(limit), data)
        kind = tl.block_type(dtype, input.shape) if input.type.is_block() else dtype
        return tl.tensor(TensorHandle(data, dtype), kind)

    return saturating


def _get_bf16(builder: Any, value: float) -> Any:
    """A constant, which triton-ascend's interpreter lacks for bfloat16."""
    import triton.language as tl

    return builder.cast_impl(builder.get_fp32(value), tl.bfloat16)


# Methods of the interpreter that compute with the bits of bfloat16.
_ARITHMETIC = (
    *("unary_op", "binary_op", "ternary_op"),
    *("create_fma", "create_idiv", "create_dot"),
)


def _in_float32(method: Callable[..., Any]) -> Callable[..., Any]:
    """Compute with bfloat16 in float32, and round the result."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def is_bfloat16(x: Any) -> bool:
        return isinstance(x, TensorHandle) and x.dtype.scalar == tl.bfloat16

    def compute(builder: Any, *args: Any) -> Any:
        wide = [builder.cast_impl(x, tl.float32) if is_bfloat16(x) else x for x in args]
        result = method(builder, *wide)
        # The last tensor has the result's type. Comparisons give bool.
        *_, last = (x for x in args if isinstance(x, TensorHandle))
        if is_bfloat16(last) and result.data.dtype == "float32":
            return builder.cast_impl(result, tl.bfloat16)
        return result

    return compute


def launch(tensors: list[torch.Tensor], number: int) -> None:
    """Run a kernel on CPU tensors that share the memory of the NPU tensors."""
    run, name, blanks = _launches[number]
    given = iter(tensors)
    named = {k: next(given) if x is _TENSOR else x for k, x in blanks.items()}
    if name not in FAST or not FAST[name](named):
        run(**named)


def _rope(o: dict[str, Any]) -> bool:
    """vllm-ascend's `_triton_rope`: rotate q and k in place."""
    if o["rope_dim"] != o["pad_rope_dim"]:
        return False
    tokens, half = o["num_tokens"], o["rope_dim"] // 2
    if o["USE_COS_SIN"]:
        rows = o["cos_sin_ptr"][o["pos_ptr"][:tokens].long()]
        cos, sin = rows[:, :half], rows[:, half : 2 * half]
    else:
        cos, sin = o["cos_ptr"][:tokens, :half], o["sin_ptr"][:tokens, :half]
    cos, sin = cos.float().unsqueeze(1), sin.float().unsqueeze(1)
    for x in (o["q_ptr"], o["k_ptr"]):
        turned = x[:tokens].view(tokens, -1, o["hd"])[..., : 2 * half]
        pairs = turned.unflatten(-1, (2, half) if o["IS_NEOX_STYLE"] else (half, 2))
        a, b = pairs.float().unbind(-2 if o["IS_NEOX_STYLE"] else -1)
        results = torch.stack(
            (a * cos - b * sin, b * cos + a * sin), -2 if o["IS_NEOX_STYLE"] else -1
        )
        pairs.copy_(results)
    return True


# Replacements of kernels by torch code: the same results in a hundredth of the time. A
# function returns whether it supports the call.
FAST: dict[str, Callable[[dict[str, Any]], bool]] = {"_triton_rope": _rope}


class _Utils:
    def get_device_properties(self, device: int) -> dict[str, int]:
        import torch_npu

        properties = torch_npu.npu.get_device_properties(device)
        return {
            "num_aicore": properties.cube_core_num,
            "num_vectorcore": properties.vector_core_num,
        }


class _Driver:
    """The part of triton-ascend's driver that callers of kernels use."""

    utils = _Utils()

    def get_current_device(self) -> int:
        import torch_npu

        return int(torch_npu.npu.current_device())

    def get_current_target(self) -> Any:
        import torch_npu
        from triton.backends.compiler import GPUTarget

        return GPUTarget("npu", torch_npu.npu.get_device_name(), 0)

    def get_device_interface(self) -> Any:
        import torch_npu

        return torch_npu.npu

    def get_benchmarker(self) -> Any:
        # All configurations take the same time, so the first one is chosen.
        return lambda function, quantiles, **_: [1.0] * len(quantiles)


def _number(value: Any) -> int:
    return int(getattr(getattr(value, "handle", value), "data", value))


def _slices(offsets: Any, sizes: Any, strides: Any) -> tuple[slice, ...]:
    return tuple(
        slice(_number(o), _number(o) + _number(n) * _number(s), _number(s))
        for o, n, s in zip(offsets, sizes, strides)
    )


def _tensor(data: Any, like: Any) -> Any:
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    shape = list(data.shape)
    kind = tl.block_type(like.type.scalar, shape) if shape else like.type.scalar
    return tl.tensor(TensorHandle(data, like.handle.dtype), kind)


def extract_slice(ful: Any, offsets: Any, sizes: Any, strides: Any, **_: Any) -> Any:
    """A slice of a tensor; see triton-ascend's extension.

    Behind the tensor's end is NaN, or the smallest integer: memory that nobody wrote.
    """
    import numpy as np

    slices = _slices(offsets, sizes, strides)
    data = ful.handle.data
    beyond = [(0, max(0, s.stop - n)) for s, n in zip(slices, data.shape)]
    if np.any(beyond):
        data = np.pad(data, beyond, constant_values=_unwritten(ful.dtype, data.dtype))
    return _tensor(data[slices].copy(), ful)


def _unwritten(kind: Any, stored: Any) -> Any:
    import numpy as np

    if kind.is_bf16():
        return _BFLOAT16_NAN
    return np.nan if kind.is_floating() else np.iinfo(stored).min


def insert_slice(
    ful: Any, sub: Any, offsets: Any, sizes: Any, strides: Any, **_: Any
) -> Any:
    """A tensor with a slice replaced; see triton-ascend's extension."""
    data = ful.handle.data.copy()
    data[_slices(offsets, sizes, strides)] = sub.handle.data
    return _tensor(data, ful)


def get_element(src: Any, indice: Sequence[Any], **_: Any) -> Any:
    """One element of a tensor; see triton-ascend's extension."""
    import numpy as np

    element = src.handle.data[tuple(_number(i) for i in indice)]
    return _tensor(np.array([element]).reshape(()), src)


def provide_extension() -> None:
    """Provide `triton.language.extra.cann`, which 3.2.0 calls `ascend`.

    Its `extension` is not in 3.2.0.
    """
    from triton.language import extra
    from triton.language.extra.ascend import libdevice

    names = ("triton.language.extra.cann", "triton.language.extra.cann.extension")
    for name in names:
        module = types.ModuleType(name)
        module.__path__ = []
        sys.modules.setdefault(name, module)
    extra.cann = sys.modules[names[0]]
    extra.cann.libdevice = libdevice
    for function in (extract_slice, insert_slice, get_element):
        setattr(sys.modules[names[1]], function.__name__, function)
