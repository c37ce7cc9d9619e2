# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Break a checkpoint in every way that can be detected, one kind at a time.

    python -m tools.checkpoints.malform CHECKPOINT OUT

Writes a broken copy of the checkpoint for each kind in `KINDS`. CHECKPOINT must be made
with `RECIPE`. With --experts, it must be made with `EXPERTS_RECIPE`, and the kinds are
`EXPERT_KINDS`; with --floats, with `FLOAT_RECIPE`, and the kinds are `FLOAT_KINDS`.
"""

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

# A tiny model with each kind of tensor that a quantized layer may have.
RECIPE = {
    "re:.*layers.0.self_attn.*_proj": "w4a16-g32-asym",
    "re:.*layers.0.mlp.*_proj": "w8a8-channel-static-asym",
    "re:.*layers.1.self_attn.*_proj": "w4a8-channel",
    "re:.*layers.1.mlp.*_proj": "w3a16-g64",
}
PACKED = "model.layers.0.self_attn.k_proj"
STATIC = "model.layers.0.mlp.down_proj"
INT4_IN_INT8 = "model.layers.1.self_attn.o_proj"
THREE_BITS = "model.layers.1.mlp.gate_proj"
# A tiny mixture-of-experts model.
EXPERTS_RECIPE = {
    "re:.*layers.0.mlp.experts.*_proj": "w4a16-g32-asym",
    "re:.*layers.1.mlp.experts.*_proj": "w8a8-channel-dynamic",
    "re:.*self_attn.*_proj": "w4a16-g32",
}
PACKED_EXPERT = "model.layers.0.mlp.experts.5.up_proj"
PACKED_DOWN = "model.layers.0.mlp.experts.7.down_proj"
INT8_EXPERT = "model.layers.1.mlp.experts.0.gate_proj"
# A tiny model with floating-point weights.
FLOAT_RECIPE = {
    "re:.*layers.0.self_attn.*_proj": "fp8-tensor-static",
    "re:.*layers.0.mlp.*_proj": "fp8-block",
    "re:.*layers.1.self_attn.*_proj": "nvfp4",
    "re:.*layers.1.mlp.*_proj": "mxfp8",
}
FP8 = "model.layers.0.self_attn.v_proj"
BLOCKS = "model.layers.0.mlp.down_proj"
NVFP4 = "model.layers.1.self_attn.q_proj"
MXFP8 = "model.layers.1.mlp.up_proj"
WEIGHTS = "model.safetensors"

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Kind:
    """A way to break a checkpoint, and what the refusal must name."""

    names: str
    tensors: Callable[[Tensors], object] | None = None
    config: Callable[[dict[str, Any]], None] | None = None
    file: Callable[[Path], None] | None = None


def changed(
    layer: str, name: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> Kind:
    """Replace a tensor of a layer."""

    def tensors(tensors: Tensors) -> None:
        key = f"{layer}.{name}"
        tensors[key] = change(tensors[key]).contiguous()

    return Kind(name, tensors=tensors)


def missing(layer: str, *names: str) -> Kind:
    """Remove tensors of a layer."""

    def tensors(tensors: Tensors) -> None:
        for name in names:
            del tensors[f"{layer}.{name}"]

    return Kind(names[0], tensors=tensors)


def filled(layer: str, name: str, value: float) -> Kind:
    """Set one invalid value in a tensor of a layer."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return changed(layer, name, change)


def added(key: str, tensor: torch.Tensor) -> Kind:
    """Add a tensor."""
    return Kind(
        key.rpartition(".")[2], tensors=lambda tensors: tensors.update({key: tensor})
    )


def group(number: int, part: str, names: str, **fields: Any) -> Kind:
    """Change fields of a group of the config."""

    def config(config: dict[str, Any]) -> None:
        config["config_groups"][f"group_{number}"][part].update(fields)

    return Kind(names, config=config)


def top(names: str, **fields: Any) -> Kind:
    """Change fields of the config."""
    return Kind(names, config=lambda config: config.update(fields))


def header(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Change the header of the file."""

    def rewrite(path: Path) -> None:
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        content = json.loads(data[8 : 8 + size])
        change(content)
        text = json.dumps(content).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])

    return rewrite


def _cut(size: int) -> Callable[[Path], None]:
    def rewrite(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:size])

    return rewrite


def _first_bytes(replacement: bytes) -> Callable[[Path], None]:
    def rewrite(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(replacement + data[len(replacement) :])

    return rewrite


def _shape_lie(content: dict[str, Any]) -> None:
    content[f"{PACKED}.weight_packed"]["shape"][0] += 1


def _dtype_lie(content: dict[str, Any]) -> None:
    content[f"{PACKED}.weight_packed"]["dtype"] = "I64"


def _offset_lie(content: dict[str, Any]) -> None:
    offsets = content[f"{PACKED}.weight_packed"]["data_offsets"]
    content[f"{PACKED}.weight_packed"]["data_offsets"] = [0, offsets[1] - offsets[0]]


def _words(tensor: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Cut or repeat a matrix to a size."""
    tensor = tensor.repeat(-(-rows // tensor.shape[0]), -(-columns // tensor.shape[1]))
    return tensor[:rows, :columns]


KINDS: dict[str, Kind] = {
    # The file.
    "file-truncated": Kind("header", file=_cut(-100)),
    "file-truncated-in-header": Kind("header", file=_cut(50)),
    "file-empty": Kind("header", file=_cut(0)),
    "file-missing": Kind("model weights", file=Path.unlink),
    "header-size-lies": Kind("header", file=_first_bytes(b"\xff" * 7 + b"\x7f")),
    "header-is-no-json": Kind(
        "header", file=_first_bytes(b"\x40" + b"\0" * 7 + b"{{{{")
    ),
    "header-shape-lies": Kind("weight_packed", file=header(_shape_lie)),
    "header-dtype-lies": Kind("header", file=header(_dtype_lie)),
    "header-offsets-lie": Kind("header", file=header(_offset_lie)),
    # Packed weights.
    "packed-int64": changed(PACKED, "weight_packed", lambda t: t.long()),
    "packed-float": changed(PACKED, "weight_packed", lambda t: t.float()),
    "packed-rows-fewer": changed(PACKED, "weight_packed", lambda t: t[:-8]),
    "packed-rows-more": changed(
        PACKED, "weight_packed", lambda t: _words(t, t.shape[0] + 8, t.shape[1])
    ),
    "packed-words-fewer": changed(PACKED, "weight_packed", lambda t: t[:, :-1]),
    "packed-words-more": changed(
        PACKED, "weight_packed", lambda t: _words(t, t.shape[0], t.shape[1] + 1)
    ),
    "packed-transposed": changed(PACKED, "weight_packed", lambda t: t.t()),
    "packed-3d": changed(PACKED, "weight_packed", lambda t: t.unsqueeze(0)),
    "packed-with-gaps": changed(
        THREE_BITS, "weight_packed", lambda t: _words(t, t.shape[0], 26)
    ),
    "packed-missing-of-one-shard": missing(PACKED, "weight_packed"),
    "packed-missing": missing(THREE_BITS.replace("gate", "down"), "weight_packed"),
    # Scales of weights.
    "scale-missing-of-one-shard": missing(PACKED, "weight_scale"),
    "scale-missing": missing(STATIC, "weight_scale"),
    "scale-int": changed(PACKED, "weight_scale", lambda t: t.int()),
    "scale-float64": changed(PACKED, "weight_scale", lambda t: t.double()),
    "scale-transposed": changed(PACKED, "weight_scale", lambda t: t.t()),
    "scale-1d": changed(STATIC, "weight_scale", lambda t: t.flatten()),
    "scale-groups-fewer": changed(PACKED, "weight_scale", lambda t: t[:, :-1]),
    "scale-groups-10000": changed(
        PACKED, "weight_scale", lambda t: _words(t, t.shape[0], 10_000)
    ),
    "scale-per-tensor": changed(STATIC, "weight_scale", lambda t: t[:1, 0]),
    "scale-nan": filled(PACKED, "weight_scale", float("nan")),
    "scale-zero": filled(PACKED, "weight_scale", 0.0),
    "scale-negative": filled(STATIC, "weight_scale", -0.1),
    "scale-infinite": filled(INT4_IN_INT8, "weight_scale", float("inf")),
    # Zero points of weights.
    "zero-point-missing-of-one-shard": missing(PACKED, "weight_zero_point"),
    "zero-point-int8": changed(PACKED, "weight_zero_point", lambda t: t.to(torch.int8)),
    "zero-point-not-packed": changed(
        PACKED, "weight_zero_point", lambda t: _words(t, 8 * t.shape[0], t.shape[1])
    ),
    "zero-point-groups-fewer": changed(
        PACKED, "weight_zero_point", lambda t: t[:, :-1]
    ),
    "zero-point-of-symmetric": added(
        f"{THREE_BITS}.weight_zero_point", torch.zeros(48, 4, dtype=torch.int32)
    ),
    # Shapes.
    "shape-lies": changed(PACKED, "weight_shape", lambda t: t + 8),
    "shape-swapped": changed(THREE_BITS, "weight_shape", lambda t: t.flip(0)),
    "shape-of-three": changed(PACKED, "weight_shape", lambda t: t[[0, 1, 1]]),
    # Weights that are not packed.
    "int8-is-bfloat16": changed(STATIC, "weight", lambda t: t.bfloat16()),
    "int8-is-uint8": changed(STATIC, "weight", lambda t: t.view(torch.uint8)),
    "int8-rows-more": changed(
        STATIC, "weight", lambda t: _words(t, t.shape[0] + 8, t.shape[1])
    ),
    "int8-missing": missing(STATIC, "weight"),
    "int4-out-of-range": filled(INT4_IN_INT8, "weight", 8),
    # Static activations.
    "input-scale-missing": missing(STATIC, "input_scale"),
    "input-scale-zero": filled(STATIC, "input_scale", 0.0),
    "input-scale-negative": filled(STATIC, "input_scale", -1.0),
    "input-scale-nan": filled(STATIC, "input_scale", float("nan")),
    "input-scale-of-two": changed(STATIC, "input_scale", lambda t: t.repeat(2)),
    "input-scale-int": changed(STATIC, "input_scale", lambda t: t.int()),
    "input-zero-point-missing": missing(STATIC, "input_zero_point"),
    "input-zero-point-out-of-range": changed(
        STATIC, "input_zero_point", lambda t: t.int() * 0 + 300
    ),
    "input-zero-point-float": changed(STATIC, "input_zero_point", lambda t: t.float()),
    # Layers.
    "bias-missing": missing(PACKED, "bias"),
    "biases-missing-of-all-shards": Kind(
        "bias",
        tensors=lambda tensors: [
            tensors.pop(f"{PACKED[:-6]}{shard}_proj.bias") for shard in "qkv"
        ],
    ),
    "bias-longer": changed(PACKED, "bias", lambda t: t.repeat(2)),
    "layer-missing": missing(STATIC, "weight", "weight_scale", "input_scale"),
    "layer-not-quantized": Kind(
        "weight",
        tensors=lambda tensors: tensors.update(
            {f"{THREE_BITS}.weight": torch.zeros(512, 256, dtype=torch.bfloat16)}
        ),
    ),
    "index-of-groups": added(
        f"{PACKED}.weight_g_idx", torch.zeros(256, dtype=torch.int32)
    ),
    # The config.
    "config-more-bits": group(0, "weights", "weight_packed", num_bits=8),
    "config-fewer-bits": group(3, "weights", "weight_packed", num_bits=2),
    "config-other-group-size": group(0, "weights", "weight_scale", group_size=64),
    "config-group-size-that-splits": group(3, "weights", "group_size", group_size=96),
    "config-per-channel": group(
        0, "weights", "weight_scale", strategy="channel", group_size=None
    ),
    "config-symmetric": group(0, "weights", "weight_zero_point", symmetric=True),
    "config-asymmetric": group(3, "weights", "weight_zero_point", symmetric=False),
    "config-dynamic-inputs": group(
        1, "input_activations", "input_scale", dynamic=True, strategy="token"
    ),
    "config-symmetric-inputs": group(
        1, "input_activations", "input_zero_point", symmetric=True
    ),
    "config-target-matches-nothing": Kind(
        "weight",
        config=lambda config: config["config_groups"]["group_0"].update(
            targets=["re:.*no_such_layer"]
        ),
    ),
    "config-shards-differ": Kind(
        "Shards of one layer",
        config=lambda config: config["config_groups"]["group_0"].update(
            targets=["re:.*layers.0.self_attn.[qo]_proj"]
        ),
    ),
    "config-shard-ignored": top("ignore", ignore=[PACKED, "lm_head"]),
    "config-layer-ignored": top("ignore", ignore=[STATIC, "lm_head"]),
    "config-without-groups": top("config_groups", config_groups=None),
    "config-format-unknown": top("format", format="packed"),
}


def _remove_expert(tensors: Tensors) -> None:
    """Remove one projection of an expert."""
    for kind in ("packed", "scale", "zero_point", "shape"):
        tensors.pop(f"{PACKED_EXPERT}.weight_{kind}")


def _as_bfloat16(tensors: Tensors) -> None:
    """Replace one projection of an expert by an unquantized one."""
    _remove_expert(tensors)
    weight = torch.zeros(256, 256, dtype=torch.bfloat16)
    tensors[f"{PACKED_EXPERT}.weight"] = weight


EXPERT_KINDS: dict[str, Kind] = {
    "expert-missing": Kind("5.up_proj", tensors=_remove_expert),
    "expert-packed-missing": missing(PACKED_EXPERT, "weight_packed"),
    "expert-scale-missing": missing(PACKED_EXPERT, "weight_scale"),
    "expert-zero-point-missing": missing(PACKED_DOWN, "weight_zero_point"),
    "expert-int8-missing": missing(INT8_EXPERT, "weight"),
    "expert-int8-scale-missing": replace(
        missing(INT8_EXPERT, "weight_scale"), names="0.gate_proj"
    ),
    "expert-not-quantized": Kind("weight", tensors=_as_bfloat16),
    "expert-packed-rows-fewer": changed(
        PACKED_EXPERT, "weight_packed", lambda t: t[:-8]
    ),
    "expert-packed-words-fewer": changed(
        PACKED_DOWN, "weight_packed", lambda t: t[:, :-1]
    ),
    "expert-more-bits": changed(
        PACKED_EXPERT, "weight_packed", lambda t: t.repeat(1, 2)
    ),
    "expert-packed-int64": changed(PACKED_EXPERT, "weight_packed", lambda t: t.long()),
    "expert-groups-fewer": changed(PACKED_EXPERT, "weight_scale", lambda t: t[:, ::4]),
    "expert-groups-fewer-down": changed(
        PACKED_DOWN, "weight_scale", lambda t: t[:, :-1]
    ),
    "expert-scale-nan": filled(PACKED_DOWN, "weight_scale", float("nan")),
    "expert-scale-zero": filled(INT8_EXPERT, "weight_scale", 0.0),
    "expert-zero-point-fewer": changed(
        PACKED_EXPERT, "weight_zero_point", lambda t: t[:-1]
    ),
    "expert-shape-lies": changed(PACKED_EXPERT, "weight_shape", lambda t: t + 8),
    "expert-int8-is-bfloat16": changed(INT8_EXPERT, "weight", lambda t: t.bfloat16()),
    "expert-int8-transposed": changed(INT8_EXPERT, "weight", lambda t: t[:, :-8]),
    "expert-index-of-groups": added(
        f"{PACKED_EXPERT}.weight_g_idx", torch.zeros(256, dtype=torch.int32)
    ),
    "config-symmetric": group(1, "weights", "weight_zero_point", symmetric=True),
    "config-other-group-size": group(1, "weights", "weight_scale", group_size=128),
    "config-more-bits": group(
        1, "weights", "weight_packed", num_bits=8, strategy="channel", group_size=None
    ),
    "config-fewer-bits": group(1, "weights", "weight_packed", num_bits=2),
    "config-static-inputs": group(
        2, "input_activations", "static", dynamic=False, strategy="tensor"
    ),
    "config-int8-per-tensor": group(2, "weights", "strategy=tensor", strategy="tensor"),
    "config-projections-differ": Kind(
        "up_proj not at all",
        config=lambda config: config["config_groups"]["group_1"].update(
            targets=["re:.*layers.0.mlp.experts.*(gate|down)_proj"]
        ),
    ),
    "config-expert-ignored": Kind(
        "ignore",
        config=lambda config: config["ignore"].append(
            "re:.*layers.1.mlp.experts.*_proj"
        ),
    ),
}


def byte(layer: str, name: str, value: int) -> Kind:
    """Set one byte in a tensor of bytes or 8-bit floats."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(torch.uint8).view(-1)[-1] = value
        return tensor

    return changed(layer, name, change)


_NAN_E4M3, _NAN_E8M0 = 0x7F, 255
_NAN = float("nan")

FLOAT_KINDS: dict[str, Kind] = {
    "fp8-missing": missing(FP8, "weight"),
    "fp8-scale-missing": missing(FP8, "weight_scale"),
    "fp8-nan": byte(FP8, "weight", _NAN_E4M3),
    "fp8-is-int8": changed(FP8, "weight", lambda t: t.view(torch.int8)),
    "fp8-is-e5m2": changed(FP8, "weight", lambda t: t.view(torch.float8_e5m2)),
    "fp8-is-bfloat16": changed(FP8, "weight", lambda t: t.bfloat16()),
    "fp8-rows-fewer": changed(FP8, "weight", lambda t: t[:-8]),
    "fp8-columns-more": changed(FP8, "weight", lambda t: t.repeat(1, 2)),
    "fp8-scale-nan": filled(FP8, "weight_scale", _NAN),
    "fp8-scale-zero": filled(FP8, "weight_scale", 0.0),
    "fp8-scale-infinite": filled(FP8, "weight_scale", float("inf")),
    "fp8-scale-negative": filled(FP8, "weight_scale", -1.0),
    "fp8-scale-too-large": replace(
        filled(FP8, "weight_scale", 3e38), names="not finite in torch.bfloat16"
    ),
    "fp8-scale-per-channel": changed(FP8, "weight_scale", lambda t: t.repeat(128, 1)),
    "fp8-scale-is-fp8": changed(
        FP8, "weight_scale", lambda t: t.to(torch.float8_e4m3fn)
    ),
    "fp8-scale-is-exponent": changed(FP8, "weight_scale", lambda t: t.byte()),
    "fp8-zero-point": added(f"{FP8}.weight_zero_point", torch.zeros(1)),
    "fp8-global-scale": added(f"{FP8}.weight_global_scale", torch.ones(1)),
    "block-missing": missing(BLOCKS, "weight_scale"),
    "block-nan": byte(BLOCKS, "weight", _NAN_E4M3 | 0x80),
    "block-rows-fewer": changed(BLOCKS, "weight_scale", lambda t: t[:-1]),
    "block-columns-fewer": changed(BLOCKS, "weight_scale", lambda t: t[:, :-1]),
    "block-columns-more": changed(BLOCKS, "weight_scale", lambda t: t.repeat(1, 2)),
    "block-transposed": changed(BLOCKS, "weight_scale", lambda t: t.t()),
    "block-scale-nan": filled(BLOCKS, "weight_scale", _NAN),
    "block-weight-padded": changed(
        BLOCKS, "weight", lambda t: torch.cat((t, t[:, :16]), dim=1)
    ),
    "nvfp4-missing": missing(NVFP4, "weight_packed"),
    "nvfp4-scale-missing": missing(NVFP4, "weight_scale"),
    "nvfp4-global-scale-missing": missing(NVFP4, "weight_global_scale"),
    "nvfp4-columns-fewer": changed(NVFP4, "weight_packed", lambda t: t[:, :-8]),
    "nvfp4-is-int8": changed(NVFP4, "weight_packed", lambda t: t.view(torch.int8)),
    "nvfp4-unpacked": changed(NVFP4, "weight_packed", lambda t: t.repeat(1, 2)),
    "nvfp4-scale-nan": byte(NVFP4, "weight_scale", _NAN_E4M3),
    "nvfp4-scale-negative": byte(NVFP4, "weight_scale", 0x80 | 1),
    "nvfp4-scale-is-bfloat16": changed(NVFP4, "weight_scale", lambda t: t.bfloat16()),
    "nvfp4-scale-is-exponent": changed(
        NVFP4, "weight_scale", lambda t: t.view(torch.uint8)
    ),
    "nvfp4-groups-of-32": changed(NVFP4, "weight_scale", lambda t: t[:, ::2]),
    "nvfp4-global-scale-zero": filled(NVFP4, "weight_global_scale", 0.0),
    "nvfp4-global-scale-nan": filled(NVFP4, "weight_global_scale", _NAN),
    "nvfp4-global-scale-per-row": changed(
        NVFP4, "weight_global_scale", lambda t: t.repeat(256)
    ),
    "nvfp4-bias-missing": missing(NVFP4, "bias"),
    "mxfp8-missing": missing(MXFP8, "weight"),
    "mxfp8-is-int8": changed(MXFP8, "weight", lambda t: t.view(torch.int8)),
    "mxfp8-columns-more": changed(MXFP8, "weight", lambda t: t.repeat(1, 2)),
    "mxfp8-scale-missing": missing(MXFP8, "weight_scale"),
    "mxfp8-nan": byte(MXFP8, "weight", _NAN_E4M3),
    "mxfp8-exponent-nan": byte(MXFP8, "weight_scale", _NAN_E8M0),
    "mxfp8-scale-is-bfloat16": changed(MXFP8, "weight_scale", lambda t: t.bfloat16()),
    "mxfp8-scale-is-fp8": changed(
        MXFP8, "weight_scale", lambda t: t.view(torch.float8_e4m3fn)
    ),
    "mxfp8-groups-fewer": changed(MXFP8, "weight_scale", lambda t: t[:, :-1]),
    "config-fp8-is-int8": Kind(
        "weight",
        config=lambda config: config["config_groups"]["group_0"].update(
            format="int-quantized",
            weights={"num_bits": 8, "strategy": "tensor"},
            input_activations={"num_bits": 8, "strategy": "tensor"},
        ),
    ),
    "config-fp8-per-channel": group(0, "weights", "weight_scale", strategy="channel"),
    "config-fp8-integer-inputs": group(0, "input_activations", "int8", type="int"),
    "config-fp8-asymmetric": group(0, "weights", "symmetric", symmetric=False),
    "config-other-block": group(
        1, "weights", "Correct .*block_structure", block_structure=[128, 128]
    ),
    "config-nvfp4-is-mxfp4": Kind(
        "global_scale",
        config=lambda config: config["config_groups"]["group_2"].update(
            format="mxfp4-pack-quantized",
            weights={
                "num_bits": 4,
                "type": "float",
                "strategy": "group",
                "group_size": 32,
            },
            input_activations=None,
        ),
    ),
    "config-nvfp4-groups-of-32": group(2, "weights", "group_size", group_size=32),
    "config-nvfp4-format": Kind(
        "format",
        config=lambda config: config["config_groups"]["group_2"].update(
            format="float-quantized"
        ),
    ),
    "config-mxfp8-groups-of-64": group(3, "weights", "group_size", group_size=64),
    "config-mxfp8-is-fp4": group(3, "weights", "format", num_bits=4),
}


# Input scales, which are not read in layers with floating-point weights.
IGNORED_KINDS: dict[str, Kind] = {
    "fp8-input-scale-missing": missing(FP8, "input_scale"),
    "fp8-input-scale-nan": filled(FP8, "input_scale", _NAN),
    "nvfp4-input-global-scale-missing": missing(NVFP4, "input_global_scale"),
    "nvfp4-input-global-scale-infinite": filled(
        NVFP4, "input_global_scale", float("inf")
    ),
    "config-fp8-dynamic": group(
        0, "input_activations", "", dynamic=True, strategy="token"
    ),
    "config-nvfp4-dynamic": group(2, "input_activations", "", dynamic=True),
}


def malform(checkpoint: Path, kind: Kind, out: Path) -> None:
    """Write a copy of a checkpoint that is broken in one way."""
    shutil.copytree(checkpoint, out)
    if kind.tensors is not None:
        tensors = load_file(out / WEIGHTS)
        kind.tensors(tensors)
        save_file(tensors, out / WEIGHTS, {"format": "pt"})
    if kind.config is not None:
        config = json.loads((out / "config.json").read_text())
        kind.config(config["quantization_config"])
        (out / "config.json").write_text(json.dumps(config))
    if kind.file is not None:
        kind.file(out / WEIGHTS)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--experts", action="store_true")
    parser.add_argument("--floats", action="store_true")
    arguments = parser.parse_args()
    kinds = EXPERT_KINDS if arguments.experts else KINDS
    kinds = FLOAT_KINDS if arguments.floats else kinds
    for name, kind in kinds.items():
        malform(arguments.checkpoint, kind, arguments.out / name)
    print(f"Wrote {len(kinds)} checkpoints to {arguments.out}")


if __name__ == "__main__":
    main()
