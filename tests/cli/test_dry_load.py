# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""A dry load says what a load says, for all that headers and config.json tell."""

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from vllm.model_executor.layers.quantization import register_quantization_config

from tests.layers import quantized_experts
from tests.loading.models import config_of, load_model
from tools.checkpoints import tiny_moe
from tools.checkpoints.make_checkpoint import ALL_SCHEMES
from tools.checkpoints.malform import (
    EXPERT_KINDS,
    EXPERTS_RECIPE,
    FLOAT_KINDS,
    FLOAT_RECIPE,
    IGNORED_KINDS,
    KINDS,
    RECIPE,
    Kind,
    malform,
)
from tools.numerics import enumerate_configs
from vllm_ascend_ct.cli.dry_load import DryConfig, DryLoad, dry_load
from vllm_ascend_ct.compat import QUANTIZATION
from vllm_ascend_ct.errors import UnsupportedCheckpointError
from vllm_ascend_ct.ops import soc
from vllm_ascend_ct.quantization.compressed_tensors.compressed_tensors import (
    AscendCTConfig,
)

pytestmark = pytest.mark.usefixtures("single_rank")

RECIPES = {
    "integers": (RECIPE, KINDS),
    "experts": (EXPERTS_RECIPE, EXPERT_KINDS),
    "floats": (FLOAT_RECIPE, {**FLOAT_KINDS, **IGNORED_KINDS}),
}
# Whose headers differ, but by nothing that is wrong.
VALUES = ("input-zero-point-out-of-range",)
CORPUS = [(name, kind) for name, (_, kinds) in RECIPES.items() for kind in kinds]


@pytest.fixture
def dry() -> Iterator[Callable[[Path], DryLoad | Exception]]:
    """Dry-load a checkpoint, or return what stops its config from being read."""

    def load(path: Path) -> DryLoad | Exception:
        register_quantization_config(QUANTIZATION)(DryConfig)
        try:
            vllm_config = config_of(path)
        except Exception as error:
            return error
        finally:
            register_quantization_config(QUANTIZATION)(AscendCTConfig)
        return dry_load(vllm_config)

    yield load


@pytest.fixture(scope="module")
def valid(
    checkpoint: Callable[..., Path], moe_model: Callable[[str], Path]
) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        options = {}
        if name == "experts":
            options = {"base": moe_model("qwen3-moe"), "ignore": tiny_moe.IGNORE}
        return checkpoint(RECIPES[name][0], **options)

    return make


def tells(path: Path) -> tuple[object, object]:
    """What a dry load reads."""
    with safe_open(path / "model.safetensors", "pt") as file:
        names = sorted(file.keys())
        slices = {name: file.get_slice(name) for name in names}
        headers = {n: (s.get_dtype(), s.get_shape()) for n, s in slices.items()}
    return headers, json.loads((path / "config.json").read_text())


def texts(result: DryLoad | Exception) -> list[str]:
    if isinstance(result, Exception):
        return [str(result)]
    refusals = [layer.refusal for layer in result.layers if layer.refusal]
    return [str(error) for error in (*refusals, *result.errors)]


def loaded(path: Path) -> Exception | None:
    try:
        load_model(path)
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize(("name", "kind"), CORPUS)
def test_broken_checkpoints(
    name: str,
    kind: str,
    valid: Callable[[str], Path],
    tmp_path: Path,
    dry: Callable[[Path], DryLoad | Exception],
) -> None:
    broken: Kind = RECIPES[name][1][kind]
    malform(valid(name), broken, tmp_path / "broken")
    error = loaded(tmp_path / "broken")
    result = dry(tmp_path / "broken")
    if broken.file is not None:
        assert error is not None and texts(result)
        return
    unseen = kind in VALUES or tells(tmp_path / "broken") == tells(valid(name))
    if error is None or unseen:
        assert texts(result) == []
    else:
        assert str(error) in texts(result)


@pytest.mark.parametrize("chip", [chip.value for chip in soc.Soc])
@pytest.mark.parametrize("scheme", ALL_SCHEMES)
def test_schemes(
    scheme: str,
    chip: str,
    checkpoint: Callable[..., Path],
    dry: Callable[[Path], DryLoad | Exception],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(soc, "_default", soc.Soc(chip))
    path = checkpoint({"Linear": scheme})
    error = loaded(path)
    assert texts(dry(path))[:1] == ([] if error is None else [str(error)])


def test_files_without_headers(
    valid: Callable[[str], Path],
    tmp_path: Path,
    dry: Callable[[Path], DryLoad | Exception],
) -> None:
    """Of other formats than safetensors it says what config.json says."""
    shutil.copytree(valid("experts"), tmp_path / "other")
    file = tmp_path / "other" / "model.safetensors"
    file.rename(file.with_name("pytorch_model.bin"))
    result = dry(tmp_path / "other")
    assert isinstance(result, DryLoad) and result.headers is None
    assert texts(result) == []
    assert all(layer.example for layer in result.layers if layer.scheme)


@pytest.mark.parametrize(
    "configs", [enumerate_configs.integer_configs, enumerate_configs.float_configs]
)
@pytest.mark.parametrize(
    "build",
    [
        pytest.param(enumerate_configs.linear, id="linear"),
        pytest.param(
            enumerate_configs.experts,
            id="experts",
            marks=quantized_experts.factory_needed,
        ),
    ],
)
def test_configs(build: Any, configs: Any) -> None:
    """Each seventh of the enumeration, which has its dimensions in other steps."""
    verdicts = set()
    for _, content in islice(configs(), 0, None, 7):
        refusals = [
            refusal(config_class, content, build)
            for config_class in (AscendCTConfig, DryConfig)
        ]
        assert refusals[0] == refusals[1]
        verdicts.add(refusals[0] is None)
    assert verdicts == {True, False}


def refusal(config_class: Any, content: dict[str, Any], build: Any) -> str | None:
    """Why a layer of a config is refused, or None."""
    try:
        config = config_class.from_config(copy.deepcopy(content))
        build(config, torch.bfloat16)
    except UnsupportedCheckpointError as error:
        return str(error)
    except AttributeError:
        # What is built for a layer that is refused has neither scheme nor kernel.
        assert config_class is DryConfig
    layers = getattr(config, "layers", {}).values()
    refused = [layer.refusal for layer in layers if layer.refusal]
    return str(refused[0]) if refused else None


@pytest.fixture
def partly(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a checkpoint whose attention is not quantized."""
    made = checkpoint({"re:.*mlp.*_proj": "w4a16-g128"})
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


Dry = Callable[[Path], DryLoad | Exception]


def test_shard_that_is_missing_of_an_unquantized_layer(partly: Path, dry: Dry) -> None:
    tensors = load_file(partly / "model.safetensors")
    del tensors["model.layers.0.self_attn.k_proj.weight"]
    save_file(tensors, partly / "model.safetensors", {"format": "pt"})
    error = loaded(partly)
    assert error is not None and str(error) in texts(dry(partly))


def test_model_that_allocates_parameters_itself(partly: Path, dry: Dry) -> None:
    """Those of the Transformers backend, in memory."""
    tensors = load_file(partly / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if not name.endswith("proj.bias")}
    save_file(kept, partly / "model.safetensors", {"format": "pt"})
    content = json.loads((partly / "config.json").read_text())
    content.pop("layer_types", None)
    content |= {
        "architectures": ["SmolLM3ForCausalLM"],
        "model_type": "smollm3",
        "attention_bias": False,
        "mlp_bias": False,
        "use_sliding_window": False,
        "no_rope_layers": [1, 1],
        "tie_word_embeddings": False,
    }
    (partly / "config.json").write_text(json.dumps(content))
    assert loaded(partly) is None and texts(dry(partly)) == []


def test_schemes_with_tensors_alike(checkpoint: Callable[..., Path], dry: Dry) -> None:
    schemes = ("w8a8-channel-dynamic", "w8a8-channel-dynamic-asym")
    recipe = {f"re:.*layers.{n}.*_proj": name for n, name in enumerate(schemes)}
    result = dry(checkpoint(recipe))
    assert isinstance(result, DryLoad) and result.is_served
    for layer in result.layers:
        if layer.scheme:
            assert layer.example is not None and layer.example.scheme == layer.scheme


def test_files_that_the_index_names(partly: Path, dry: Dry) -> None:
    """VLLM reads those alone, and all of them."""
    names = load_file(partly / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    path = partly / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    (partly / "other.safetensors").write_text("version https://git-lfs")
    assert loaded(partly) is None and texts(dry(partly)) == []
    index["weight_map"]["lm_head.weight"] = "model-2.safetensors"
    path.write_text(json.dumps(index))
    assert loaded(partly) is not None and "model-2.safetensors" in texts(dry(partly))[0]
