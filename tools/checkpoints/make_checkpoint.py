# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Make a small compressed-tensors checkpoint, offline.

    python -m tools.checkpoints.make_checkpoint OUT --scheme w4a16-g128

Quantizes a model by rounding to nearest with the compressed-tensors library. The model
is trained once (`tools/checkpoints/tiny_model.py`) and kept in `--base`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.compressors.base import compress_module
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    QuantizationStrategy,
    apply_quantization_config,
    disable_quantization,
)
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from transformers import AutoConfig, AutoProcessor, AutoTokenizer

from tools.checkpoints import tiny_model, tiny_moe, tiny_vlm

DEFAULT_BASE = tiny_model.DIRECTORY


def _weights(bits: int, layout: str, symmetric: bool = True) -> QuantizationArgs:
    if layout.startswith("g"):
        group_size = int(layout[1:])
        return QuantizationArgs(
            num_bits=bits, strategy="group", group_size=group_size, symmetric=symmetric
        )
    return QuantizationArgs(num_bits=bits, strategy=layout, symmetric=symmetric)


def _activations(kind: str, symmetric: bool) -> QuantizationArgs:
    dynamic = kind == "dynamic"
    return QuantizationArgs(
        num_bits=8,
        strategy="token" if dynamic else "tensor",
        dynamic=dynamic,
        symmetric=symmetric,
    )


def _scheme(
    weights: QuantizationArgs,
    inputs: QuantizationArgs | None = None,
    outputs: QuantizationArgs | None = None,
    packed: bool = False,
) -> QuantizationScheme:
    return QuantizationScheme(
        targets=[],
        weights=weights,
        input_activations=inputs,
        output_activations=outputs,
        format="pack-quantized" if packed else None,
    )


_TOKEN = _activations("dynamic", True)
_STATIC = _activations("static", True)

SCHEMES: dict[str, QuantizationScheme] = {
    **{
        f"w{bits}a16-{layout}{suffix}": _scheme(_weights(bits, layout, not suffix))
        for bits in (4, 8)
        for layout in ("g32", "g64", "g128", "channel")
        for suffix in ("", "-asym")
    },
    **{
        f"w8a8-{layout}-{kind}{suffix}": _scheme(
            _weights(8, layout), _activations(kind, not suffix)
        )
        for layout in ("channel", "tensor")
        for kind in ("dynamic", "static")
        for suffix in ("", "-asym")
    },
    **{
        f"w{bits}a16-{layout}{suffix}": _scheme(_weights(bits, layout, not suffix))
        for bits in (2, 3, 5, 6, 7)
        for layout in ("g64", "channel")
        for suffix in ("", "-asym")
    },
    **{
        f"w4a8-{layout}{suffix}": _scheme(
            _weights(4, layout), _TOKEN, packed=bool(suffix)
        )
        for layout in ("channel", "g256", "g128", "g32")
        for suffix in ("", "-packed")
    },
    "w4a8-channel-asym-inputs": _scheme(
        _weights(4, "channel"), _activations("dynamic", False)
    ),
    **{
        f"w{bits}a8-{layout}-packed": _scheme(
            _weights(bits, layout), _TOKEN, packed=True
        )
        for bits, layout in (
            (2, "g256"),
            (3, "channel"),
            (6, "channel"),
            (8, "channel"),
        )
    },
    "w4a8-g64-asym-packed": _scheme(_weights(4, "g64", False), _TOKEN, packed=True),
    "w8a8-g128-packed": _scheme(_weights(8, "g128"), _TOKEN, packed=True),
    "w2a8o8-g64": _scheme(_weights(2, "g64"), _STATIC, _STATIC, packed=True),
    "w4a8o8-channel": _scheme(_weights(4, "channel"), _STATIC, _STATIC, packed=True),
    "w4a8o8-g32-int": _scheme(_weights(4, "g32"), _STATIC, _STATIC),
    "w8a8o8-channel-int": _scheme(_weights(8, "channel"), _STATIC, _STATIC),
}


def _floats(bits: int, strategy: str, **more: Any) -> QuantizationArgs:
    return QuantizationArgs(num_bits=bits, type="float", strategy=strategy, **more)


_MX = {"group_size": 32, "scale_dtype": torch.uint8, "zp_dtype": torch.uint8}
_NV = {"group_size": 16, "scale_dtype": torch.float8_e4m3fn}
_FP8_CHANNEL, _FP8_TENSOR = _floats(8, "channel"), _floats(8, "tensor")
# A block size that divides neither the layers' sizes nor the ranks' shards.
_FP8_BLOCK = _floats(8, "block", block_structure=[64, 48])
_FP8_TOKEN = _floats(8, "token", dynamic=True)
_FP8_GROUP = _floats(8, "group", group_size=128, dynamic=True)
_MXFP8_INPUTS = _floats(8, "group", dynamic=True, **_MX)
_MXFP4 = _floats(4, "group", **_MX)
_MXFP4_INPUTS = _floats(4, "group", dynamic=True, **_MX)
_NVFP4 = _floats(4, "tensor_group", **_NV)
_NVFP4_INPUTS = _floats(4, "tensor_group", dynamic="local", **_NV)
FLOAT_SCHEMES: dict[str, QuantizationScheme] = {
    name: QuantizationScheme(
        targets=[], weights=weights, input_activations=inputs, format=fmt
    )
    for name, weights, inputs, fmt in (
        ("fp8-channel-dynamic", _FP8_CHANNEL, _FP8_TOKEN, "float-quantized"),
        ("fp8-tensor-dynamic", _FP8_TENSOR, _FP8_TOKEN, "naive-quantized"),
        ("fp8-tensor-static", _FP8_TENSOR, _FP8_TENSOR, "float-quantized"),
        ("fp8-channel-a16", _FP8_CHANNEL, None, "naive-quantized"),
        ("fp8-block", _FP8_BLOCK, _FP8_GROUP, "float-quantized"),
        ("mxfp8", _floats(8, "group", **_MX), _MXFP8_INPUTS, "mxfp8-quantized"),
        ("mxfp4", _MXFP4, _MXFP4_INPUTS, "mxfp4-pack-quantized"),
        ("mxfp4-a16", _MXFP4, None, "mxfp4-pack-quantized"),
        ("nvfp4", _NVFP4, _NVFP4_INPUTS, "nvfp4-pack-quantized"),
        ("nvfp4-a16", _NVFP4, None, "nvfp4-pack-quantized"),
    )
}
ALL_SCHEMES = {**SCHEMES, **FLOAT_SCHEMES}


def _set_qparams(
    module: Any,
    name: str,
    low: torch.Tensor,
    high: torch.Tensor,
    args: QuantizationArgs,
) -> None:
    low, high = low.float(), high.float()
    whole = getattr(module, f"{name}_global_scale", None)
    if whole is not None:
        whole.data.copy_(generate_gparam(low.min(), high.max()))
        if args.dynamic:
            return
    scale, zero_point = calculate_qparams(low, high, args, whole)
    for kind, value in (("scale", scale), ("zero_point", zero_point)):
        parameter = getattr(module, f"{name}_{kind}", None)
        if parameter is not None:
            parameter.data.copy_(value.reshape(parameter.shape))


def set_range(module: Any, name: str, low: torch.Tensor, high: torch.Tensor) -> None:
    """Set the static activation scale and zero point of a prepared module.

    Args:
        module: A module that `prepare` returned.
        name: `input` or `output`.
        low: Smallest activation.
        high: Largest activation.

    """
    if any(hasattr(module, f"{name}_{kind}scale") for kind in ("", "global_")):
        args = getattr(module.quantization_scheme, f"{name}_activations")
        _set_qparams(module, name, low, high, args)


def prepare(
    model: torch.nn.Module, recipe: dict[str, str], ignore: Sequence[str] = ()
) -> list[Any]:
    """Attach quantization parameters to a model, and calibrate those of the weights.

    Args:
        model: The model to quantize.
        recipe: Name of a scheme for each target: a class, a layer or `re:` pattern.
        ignore: Layers not to quantize.

    Returns:
        The modules whose static activation ranges must still be set.

    """
    groups = {}
    for number, (target, name) in enumerate(recipe.items()):
        scheme = ALL_SCHEMES[name].model_copy(update={"targets": [target]}, deep=True)
        groups[f"group_{number}"] = scheme
    config = QuantizationConfig(config_groups=groups, ignore=list(ignore))
    apply_quantization_config(model, config)
    static = []
    for module in model.modules():
        if scheme := getattr(module, "quantization_scheme", None):
            _set_weight_qparams(module, scheme.weights)
            if hasattr(module, "input_scale") or hasattr(module, "input_global_scale"):
                static.append(module)
    return static


def _set_weight_qparams(module: Any, args: QuantizationArgs) -> None:
    weight = module.weight.data.float()
    if args.strategy == QuantizationStrategy.TENSOR:
        low, high = weight.aminmax()
    elif args.strategy == QuantizationStrategy.BLOCK:
        rows, columns = args.block_structure
        n, k = weight.shape
        whole = torch.nn.functional.pad(weight, (0, -k % columns, 0, -n % rows))
        blocks = whole.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    else:
        group_size = args.group_size or weight.shape[1]
        low, high = weight.unflatten(1, (-1, group_size)).aminmax(dim=-1)
    _set_qparams(module, "weight", low, high, args)


def calibrate(model: torch.nn.Module, modules: list[Any], tokens: torch.Tensor) -> None:
    """Run tokens through the model and set the range of static activations.

    Args:
        model: The model.
        modules: The modules that `prepare` returned.
        tokens: `[B, T]`.

    """
    ranges: dict[tuple[Any, str], tuple[torch.Tensor, torch.Tensor]] = {}

    def observe(module: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        ranges[module, "input"] = inputs[0].aminmax()
        ranges[module, "output"] = output.aminmax()

    hooks = [module.register_forward_hook(observe) for module in modules]
    model.apply(disable_quantization)
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    for (module, name), (low, high) in ranges.items():
        set_range(module, name, low, high)


def compress(model: torch.nn.Module) -> ModelCompressor:
    """Replace the weights by their compressed form, in place.

    Returns:
        The compressor, which writes the quantization config.

    """
    compressor = ModelCompressor.from_pretrained_model(model)
    for module in model.modules():
        # Each rank compresses all modules: compressed-tensors would exchange FP8
        # tensors between ranks, which cannot be pickled.
        compress_module(module)
    if compressor.quantization_config is not None:
        status = QuantizationStatus.COMPRESSED
        compressor.quantization_config.quantization_status = status
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None and hasattr(module, "weight_packed"):
            _pack_densely(module, scheme.weights.num_bits)
    return compressor


def _pack_densely(module: Any, bits: int) -> None:
    """Pack like compressed-tensors 0.18 and later: no gaps at the end of a word."""
    if 32 % bits == 0:
        return
    integers = unpack_from_int32(module.weight_packed, bits, module.weight_shape)
    module.weight_packed.data = pack_dense(integers, bits)
    if hasattr(module, "weight_zero_point"):
        integers = unpack_from_int32(
            module.weight_zero_point, bits, module.weight_scale.shape, packed_dim=0
        )
        module.weight_zero_point.data = pack_dense(integers.t(), bits).t().contiguous()


def pack_dense(integers: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack signed integers `[R, C]` to int32 `[R, ceil(C * bits / 32)]`."""
    stream = integers.long().unsqueeze(-1) + (1 << (bits - 1))
    stream = ((stream >> torch.arange(bits)) & 1).flatten(1)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[1] % 32))
    words = (stream.unflatten(1, (-1, 32)) << torch.arange(32)).sum(-1)
    return words.to(torch.uint32).view(torch.int32)


def make(
    out: Path,
    recipe: dict[str, str],
    base: Path = DEFAULT_BASE,
    ignore: Sequence[str] = ("lm_head",),
    dtype: torch.dtype = torch.bfloat16,
    tied: bool = False,
) -> None:
    """Write a checkpoint of the base model, which is trained first if missing.

    Args:
        out: Directory to write.
        recipe: As in `prepare`.
        base: Directory of the unquantized model.
        ignore: Layers not to quantize.
        dtype: dtype of unquantized parameters.
        tied: Whether to tie the output head to the embedding.

    """
    tiny_model.make_once(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    config = AutoConfig.from_pretrained(base)
    moe = tiny_moe.is_moe(config)
    model = (tiny_moe.load if moe else _load)(base, dtype)
    if tied:
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.get_input_embeddings().weight
    calibration = tokenizer(tiny_model.corpus()[:4000], return_tensors="pt")
    if static := prepare(model, recipe, ignore):
        calibrate(model, static, calibration["input_ids"])
    compressor = compress(model)
    if tied:
        del model.lm_head.weight
    (tiny_moe.save if moe else _save)(model, out)
    tokenizer.save_pretrained(out)
    if tiny_vlm.has_vision(config):
        AutoProcessor.from_pretrained(base).save_pretrained(out)
    compressor.update_config(str(out))
    if moe:
        tiny_moe.adapt_config(out, ignore)


def _load(base: Path, dtype: torch.dtype) -> Any:
    auto_class = tiny_vlm.auto_class(AutoConfig.from_pretrained(base))
    return auto_class.from_pretrained(base, dtype=dtype)


def _save(model: Any, out: Path) -> None:
    model.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="directory to write")
    parser.add_argument("--scheme", choices=ALL_SCHEMES, default="w4a16-g128")
    parser.add_argument("--base", type=Path, default=DEFAULT_BASE)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    arguments = parser.parse_args()
    make(
        arguments.out,
        {"Linear": arguments.scheme},
        arguments.base,
        dtype=getattr(torch, arguments.dtype),
    )
    print(f"Wrote {arguments.out} ({arguments.scheme})")


if __name__ == "__main__":
    main()
