# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Make a small compressed-tensors checkpoint, offline.

    python -m tools.make_checkpoint OUT --scheme w4a16-g128

Rounds a model to nearest with the compressed-tensors library. The model is trained
once (`tools/tiny_model.py`) and kept in `--base`.
"""

import argparse
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
)
from compressed_tensors.quantization.utils import calculate_qparams
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

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


def _set_weight_qparams(module: Any, args: QuantizationArgs) -> None:
    weight = module.weight.data.float()
    if args.strategy == QuantizationStrategy.TENSOR:
        low, high = weight.aminmax()
    else:
        group_size = args.group_size or weight.shape[1]
        low, high = weight.unflatten(1, (-1, group_size)).aminmax(dim=-1)
    _set_qparams(module, "weight", low, high, args)


def _set_input_qparams(
    model: PreTrainedModel, modules: list[Any], tokens: torch.Tensor
) -> None:
    """Run `tokens` through the model and take each input's range."""
    ranges: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}

    def observe(module: Any, inputs: tuple[torch.Tensor]) -> None:
        ranges[module] = inputs[0].aminmax()

    hooks = [module.register_forward_pre_hook(observe) for module in modules]
    for module in modules:
        module.quantization_enabled = False
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    for module, (low, high) in ranges.items():
        args = module.quantization_scheme.input_activations
        _set_qparams(module, "input", low, high, args)


def quantize(
    model: PreTrainedModel,
    recipe: dict[str, str],
    ignore: list[str],
    calibration: torch.Tensor,
) -> ModelCompressor:
    """Quantize and compress a model in place.

    Args:
        model: What to quantize.
        recipe: Name in `SCHEMES` for each target: a class, a layer or `re:` pattern.
        ignore: Layers to leave alone.
        calibration: `[B, T]` tokens that set the range of static activations.

    Returns:
        The compressor, which writes the quantization config.

    """
    groups = {}
    for number, (target, name) in enumerate(recipe.items()):
        weights, activations = SCHEMES[name]
        groups[f"group_{number}"] = QuantizationScheme(
            targets=[target], weights=weights, input_activations=activations
        )
    config = QuantizationConfig(config_groups=groups, ignore=ignore)
    apply_quantization_config(model, config)
    modules: list[Any] = [
        m for m in model.modules() if hasattr(m, "quantization_scheme")
    ]
    for module in modules:
        _set_weight_qparams(module, module.quantization_scheme.weights)
    static = [m for m in modules if hasattr(m, "input_scale")]
    if static:
        _set_input_qparams(model, static, calibration)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    return compressor


def make(
    out: Path,
    recipe: dict[str, str],
    base: Path = DEFAULT_BASE,
    ignore: tuple[str, ...] = ("lm_head",),
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write a checkpoint of the base model, which is trained first if missing.

    Args:
        out: Directory to write.
        recipe: As in `quantize`.
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
    compressor = quantize(model, recipe, list(ignore), calibration["input_ids"])
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
