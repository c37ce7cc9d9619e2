# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Make a small compressed-tensors checkpoint, offline.

    python -m tools.make_checkpoint OUT --scheme w4a16-g128

Rounds a model to nearest with the compressed-tensors library. The model is trained
once (`tools/tiny_model.py`) and kept in `--base`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStrategy,
    apply_quantization_config,
    disable_quantization,
)
from compressed_tensors.quantization.utils import calculate_qparams
from transformers import AutoModelForCausalLM, AutoTokenizer

from tools import tiny_model

DEFAULT_BASE = Path("build/tiny-model")


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


# name -> weights, input activations
SCHEMES: dict[str, tuple[QuantizationArgs, QuantizationArgs | None]] = {
    **{
        f"w{bits}a16-{layout}{suffix}": (_weights(bits, layout, not suffix), None)
        for bits in (4, 8)
        for layout in ("g32", "g64", "g128", "channel")
        for suffix in ("", "-asym")
    },
    **{
        f"w8a8-{layout}-{kind}{suffix}": (
            _weights(8, layout),
            _activations(kind, not suffix),
        )
        for layout in ("channel", "tensor")
        for kind in ("dynamic", "static")
        for suffix in ("", "-asym")
    },
}


def _set_qparams(
    module: Any,
    name: str,
    low: torch.Tensor,
    high: torch.Tensor,
    args: QuantizationArgs,
) -> None:
    scale, zero_point = calculate_qparams(low.float(), high.float(), args)
    for kind, value in (("scale", scale), ("zero_point", zero_point)):
        parameter = getattr(module, f"{name}_{kind}", None)
        if parameter is not None:
            parameter.data.copy_(value.reshape(parameter.shape))


def set_input_range(module: Any, low: torch.Tensor, high: torch.Tensor) -> None:
    """Set the static activation parameters of a module that `prepare` prepared."""
    args = module.quantization_scheme.input_activations
    _set_qparams(module, "input", low, high, args)


def prepare(
    model: torch.nn.Module, recipe: dict[str, str], ignore: Sequence[str] = ()
) -> list[Any]:
    """Attach quantization parameters to a model, those of the weights rounded off.

    Args:
        model: What to quantize.
        recipe: Name in `SCHEMES` for each target: a class, a layer or `re:` pattern.
        ignore: Layers to leave alone.

    Returns:
        The modules whose static activation range is still to be set.

    """
    groups = {}
    for number, (target, name) in enumerate(recipe.items()):
        weights, activations = SCHEMES[name]
        groups[f"group_{number}"] = QuantizationScheme(
            targets=[target], weights=weights, input_activations=activations
        )
    config = QuantizationConfig(config_groups=groups, ignore=list(ignore))
    apply_quantization_config(model, config)
    static = []
    for module in model.modules():
        if scheme := getattr(module, "quantization_scheme", None):
            _set_weight_qparams(module, scheme.weights)
            if hasattr(module, "input_scale"):
                static.append(module)
    return static


def _set_weight_qparams(module: Any, args: QuantizationArgs) -> None:
    weight = module.weight.data.float()
    if args.strategy == QuantizationStrategy.TENSOR:
        low, high = weight.aminmax()
    else:
        group_size = args.group_size or weight.shape[1]
        low, high = weight.unflatten(1, (-1, group_size)).aminmax(dim=-1)
    _set_qparams(module, "weight", low, high, args)


def calibrate(model: torch.nn.Module, modules: list[Any], tokens: torch.Tensor) -> None:
    """Run `tokens`, `[B, T]`, through the model and set each input's range."""
    ranges: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}

    def observe(module: Any, inputs: tuple[torch.Tensor]) -> None:
        ranges[module] = inputs[0].aminmax()

    hooks = [module.register_forward_pre_hook(observe) for module in modules]
    model.apply(disable_quantization)
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    for module, (low, high) in ranges.items():
        set_input_range(module, low, high)


def compress(model: torch.nn.Module) -> ModelCompressor:
    """Replace the weights by their compressed form, in place.

    Returns:
        The compressor, which writes the quantization config.

    """
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    return compressor


def make(
    out: Path,
    recipe: dict[str, str],
    base: Path = DEFAULT_BASE,
    ignore: Sequence[str] = ("lm_head",),
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write a checkpoint of the base model, which is trained first if missing.

    Args:
        out: Directory to write.
        recipe: As in `prepare`.
        base: Directory of the unquantized model.
        ignore: Layers to leave alone.
        dtype: Of what is not quantized.

    """
    if not (base / "config.json").exists():
        print(f"Training the model to quantize, once, into {base}")
        tiny_model.make(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    calibration = tokenizer(tiny_model.corpus()[:4000], return_tensors="pt")
    if static := prepare(model, recipe, ignore):
        calibrate(model, static, calibration["input_ids"])
    compressor = compress(model)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    compressor.update_config(str(out))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="directory to write")
    parser.add_argument("--scheme", choices=SCHEMES, default="w4a16-g128")
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
