# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Layers that are quantized in the files but not by the config, and vice versa.

Tests each position in each kind of model: it is refused by a tensor's name in the file
before anything is loaded, or served correctly.
"""

import importlib.util
import inspect
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.model_executor.models import modernbert
from vllm.platforms import current_platform

from tests.formula import relative_error
from tests.loading import models
from tools.checkpoints.dequantize import dequantized_state
from vllm_ascend_ct.errors import Remedy, UnsupportedCheckpointError

pytestmark = pytest.mark.usefixtures("single_rank")

# Layers that these checkpoints usually have quantized, and those they ignore.
QUANTIZED = r"(_proj|_mqa|fc[12]|out_proj|qkv|attn\.proj|Wo|Wi|Wqkv)$"
NEVER = ["lm_head", r"gate$", "eh_proj", "shared_head", "embed", "merger", "projector"]
IGNORE = [f"re:.*{pattern}.*" for pattern in NEVER if pattern != "gate$"]
IGNORE.append("re:.*gate$")
SCHEMES = ["w4a16-g32", "w8a8-channel-dynamic"]
MODERNBERT = inspect.getsource(modernbert)
HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None


@dataclass(frozen=True)
class Case:
    """Layers of a model, and the expected outcome.

    Attributes:
        model: Name of the model.
        layers: Pattern that matches the layers.
        plain: Whether they are served if only the config says they are quantized.
        quantized: Whether they are served if they are quantized only in the files.
        target: Target that matches them, if `Linear` does not.
        draft: Whether they belong to a draft model for multi-token prediction.
        bare: Whether vLLM's loader fails before this package's checks, naming a tensor.
        rename: Maps names of tensors to their names in the files.

    """

    model: str
    layers: str
    plain: bool = False
    quantized: bool = False
    target: str | None = None
    draft: bool = False
    bare: bool = False
    rename: Callable[[str], str] = str


DEEPSEEK, MOE = "deepseek-v3-mtp", "qwen3-moe"
CASES: dict[str, Case] = {
    # Dense models.
    **{f"dense-{p}": Case("qwen3", rf"\.0\..*\b{p}_proj$") for p in "qkvo"},
    **{
        f"dense-{p}": Case("qwen3", rf"\.1\..*\b{p}_proj$")
        for p in ("gate", "up", "down")
    },
    "dense-qkv-of-all": Case("qwen3", r"\b[qkv]_proj$"),
    "dense-block": Case("qwen3", r"\.0\..*_proj$"),
    "dense-embedding": Case("qwen3", "embed_tokens$", target="re:.*embed_tokens"),
    "dense-head": Case("qwen3", "lm_head$", target="re:.*lm_head"),
    # A class target includes the head only if it is quantized in the files.
    "dense-head-by-class": Case("qwen3", "lm_head$", plain=True),
    # Mixture-of-experts models, loaded in vLLM's way or in the model's own way.
    **{f"moe-{p}": Case(MOE, rf"\.0\..*\b{p}_proj$") for p in "qkvo"},
    "moe-router": Case(MOE, r"\.0\.mlp\.gate$"),
    "moe-routers": Case(MOE, r"mlp\.gate$"),
    # vLLM requests the scheme of the first expert only.
    "moe-expert": Case(MOE, r"\.0\.mlp\.experts\.3\.", quantized=True),
    "moe-projection-of-an-expert": Case(
        MOE, r"\.0\.mlp\.experts\.3\.up_proj$", quantized=True
    ),
    "moe-projection-of-experts": Case(MOE, r"\.0\.mlp\.experts\..*\.down_proj$"),
    "moe-experts": Case(MOE, r"\.0\.mlp\.experts\."),
    "moe-experts-of-all": Case(MOE, r"\.mlp\.experts\."),
    "moe-embedding": Case(MOE, "embed_tokens$", target="re:.*embed_tokens"),
    "moe-head": Case(MOE, "lm_head$", target="re:.*lm_head"),
    **{
        f"deepseek-{p}": Case(DEEPSEEK, rf"\.0\.mlp\.{p}_proj$")
        for p in ("gate", "up", "down")
    },
    "deepseek-kv-a": Case(DEEPSEEK, r"\.1\..*kv_a_proj_with_mqa$"),
    "deepseek-kv-b": Case(DEEPSEEK, r"\.1\..*kv_b_proj$"),
    # The model builds its routers without a quantization config.
    "deepseek-router": Case(DEEPSEEK, r"\.1\.mlp\.gate$", plain=True),
    "deepseek-expert": Case(DEEPSEEK, r"\.1\.mlp\.experts\.3\.", quantized=True),
    "deepseek-experts": Case(DEEPSEEK, r"\.1\.mlp\.experts\."),
    "deepseek-shared-expert": Case(DEEPSEEK, r"\.1\.mlp\.shared_experts\."),
    # The main model skips the layer for multi-token prediction; a draft model loads it.
    "mtp-of-main": Case(DEEPSEEK, r"layers\.2\..*_proj$", plain=True, quantized=True),
    "mtp-attention": Case(DEEPSEEK, r"\.2\..*\bo_proj$", draft=True),
    "mtp-router": Case(DEEPSEEK, r"\.2\.mlp\.gate$", draft=True, plain=True),
    "mtp-experts": Case(DEEPSEEK, r"\.2\.mlp\.experts\.", draft=True),
    "mtp-shared-expert": Case(DEEPSEEK, r"\.2\.mlp\.shared_experts\.", draft=True),
    "mtp-block": Case(DEEPSEEK, r"\.2\.(mlp|self_attn)\..*_proj$", draft=True),
    "mtp-input": Case(DEEPSEEK, r"\.2\.eh_proj$", draft=True, plain=True, bare=True),
    "mtp-head": Case(
        DEEPSEEK, r"shared_head\.head$", draft=True, target="re:.*layers.2.head"
    ),
    # Models with a vision tower, with older and newer names in the files.
    **{
        f"{name}-{position}": Case(model, layers, rename=rename)
        for name, rename in {"vlm": str, "vlm-renamed": models.renamed}.items()
        for model, position, layers in (
            *(
                ("paligemma", p, rf"language_model.*\.0\..*\b{p}_proj$")
                for p in ("q", "k", "v", "o", "gate", "up", "down")
            ),
            ("paligemma", "tower-k", r"vision_tower.*\.0\..*\bk_proj$"),
            ("paligemma", "tower-fc1", r"vision_tower.*\.0\..*\bfc1$"),
            ("paligemma", "tower", r"vision_tower.*(_proj|fc[12])$"),
            ("qwen2_5_vl", "qwen-o", r"^model.*\.0\..*\bo_proj$"),
            ("qwen2_5_vl", "qwen-tower-qkv", r"visual.*\.0\..*\bqkv$"),
            ("qwen2_5_vl", "qwen-tower-up", r"visual.*\.0\..*\bup_proj$"),
            ("qwen2_5_vl", "qwen-tower", r"visual.*(_proj|qkv|attn\.proj)$"),
        )
    },
    # A loader that skips unknown names.
    **{
        f"skipping-{name}": Case("modernbert", rf"\.0\..*{name}$")
        for name in ("Wqkv", r"attn\.Wo", "Wi", r"mlp\.Wo")
    },
    "skipping-block": Case("modernbert", r"\.0\..*W\w+$"),
}
CASES["skipping-embedding"] = Case("modernbert", "tok_embeddings$", plain=True)
CASES["vlm-embedding"] = Case(
    "paligemma", "embed_tokens$", plain=True, target="re:.*embed_tokens"
)
CASES["vlm-head"] = Case("qwen2_5_vl", "lm_head$", target="re:.*lm_head")
CASES["vlm-projector"] = Case("paligemma", "projector", plain=True)


def usual(model: str) -> list[str]:
    names = models.matching([QUANTIZED], models.linears(model))
    return [name for name in names if not models.matching(NEVER, [name])]


def load(path: Path, case: Case) -> Any:
    if case.model == "qwen2_5_vl" and not HAS_TORCHVISION:
        pytest.skip("vLLM's Qwen2.5-VL needs torchvision")
    if case.model == "modernbert" and "quant_config" not in MODERNBERT:
        pytest.skip("this vLLM's ModernBERT cannot be quantized")
    if case.model == DEEPSEEK and current_platform.device_type == "npu":
        pytest.skip("vllm-ascend registers its latent attention in workers only")
    return models.load_draft(path) if case.draft else models.load(path)


def check_refused(path: Path, case: Case, layers: list[str]) -> None:
    """The model is refused by a tensor's name, and served with the remedy applied."""
    with pytest.raises(KeyError if case.bare else UnsupportedCheckpointError) as error:
        load(path, case)
    text = str(error.value)
    tensors = [
        case.rename(f"{layer}.weight").removesuffix("weight") for layer in layers
    ]
    before = "" if case.bare else "tensor "
    assert any(f"{before}{tensor}weight" in text for tensor in tensors), text
    assert "ownload" not in text
    for _ in range(30):
        if case.bare or not corrected(path, text):
            break
        try:
            load(path, case)
            break
        except UnsupportedCheckpointError as another:
            text = str(another)
    else:
        raise AssertionError(text)


def corrected(path: Path, text: str) -> bool:
    """Change a config as an error says; returns whether the error says so."""
    config = json.loads((path / "config.json").read_text())
    quantization = config["quantization_config"]
    targets = quantization["config_groups"]["group_0"]["targets"]
    given = set(re.findall("`([^`]+)`", text)) - {"ignore", "targets"}
    if Remedy.ADD_TO_IGNORE.partition("}")[2] in text:
        quantization["ignore"] += given
    elif Remedy.REMOVE_FROM_IGNORE.partition("{")[0] in text:
        quantization["ignore"] = [i for i in quantization["ignore"] if i not in given]
    elif Remedy.ADD_TO_TARGETS.partition("}")[2] in text:
        targets += given
    else:
        others = (Remedy.EXPORT_ALIKE, Remedy.LEAVE_UNQUANTIZED)
        # For an embedding, which does not support int8 activations.
        others += (Remedy.QUANTIZE_AGAIN,)
        assert any(remedy in text for remedy in others), text
        return False
    (path / "config.json").write_text(json.dumps(config))
    return True


def check_right(path: Path, case: Case, layers: list[str]) -> None:
    model = load(path, case)
    expected = dequantized_state(path)
    modules = dict(model.named_modules())
    for layer in layers:
        if ".experts." in layer:
            check_expert(modules, expected, layer)
            continue
        module: Any = modules.get(layer.replace(".2.", ".2.mtp_block."))
        module = modules.get(layer, module)
        if module is None:
            # For a layer that the main model does not have.
            assert not case.draft and ".2." in layer
            continue
        weight = expected[f"{layer}.weight"].double()
        if "embed" in layer:
            ids = torch.arange(5)
            assert torch.equal(module(ids).double(), weight[ids])
            continue
        x = torch.randn(5, weight.shape[1], dtype=torch.bfloat16)
        y = module.quant_method.apply(module, x) if "head" in layer else module(x)
        y = y[0] if isinstance(y, tuple) else y
        assert relative_error(y[:, : len(weight)], x.double() @ weight.t()) < 1e-2


def check_expert(modules: Any, expected: Any, projection: str) -> None:
    path, number, _ = projection.rsplit(".", 2)
    if path not in modules:
        return
    if current_platform.device_type == "npu":
        pytest.skip("vllm-ascend's runner computes experts")
    gate, up, down = (
        expected[f"{path}.{number}.{kind}_proj.weight"].double()
        for kind in ("gate", "up", "down")
    )
    x = torch.randn(5, gate.shape[1], dtype=torch.bfloat16)
    weights = torch.ones(5, 1)
    ids = torch.full((5, 1), int(number), dtype=torch.int32)
    with set_forward_context(None, VllmConfig()):
        y = modules[path].routed_experts.forward_modular(x, weights, ids)
    gated = torch.nn.functional.silu(x.double() @ gate.t()) * (x.double() @ up.t())
    # int8 activations are rounded before each product.
    assert relative_error(y, gated @ down.t()) < 3e-2


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", CASES)
def test_plain_in_the_file(tmp_path: Path, name: str, scheme: str) -> None:
    case = CASES[name]
    names = usual(case.model)
    layers = models.matching([case.layers], models.linears(case.model))
    assert layers
    path = models.make(
        tmp_path / "checkpoint",
        case.model,
        [name for name in names if name not in layers],
        ["Linear", *([case.target] if case.target else [])],
        [pattern for pattern in IGNORE if not matches(pattern, layers)],
        scheme=scheme,
        rename=case.rename,
    )
    check = check_right if case.plain else check_refused
    check(path, case, layers)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", CASES)
def test_quantized_in_the_file(tmp_path: Path, name: str, scheme: str) -> None:
    case = CASES[name]
    layers = models.matching([case.layers], models.linears(case.model))
    path = models.make(
        tmp_path / "checkpoint",
        case.model,
        [*dict.fromkeys([*usual(case.model), *layers])],
        ignore=[*IGNORE, *map(ignoring, layers)],
        scheme=scheme,
        rename=case.rename,
    )
    check = check_right if case.quantized else check_refused
    check(path, case, layers)


def ignoring(layer: str) -> str:
    """A pattern that matches vLLM's name of a layer."""
    name = layer.replace("shared_head.head", "head")
    first = re.search(r"\d", name)
    last = name[first.start() :] if first else name.rpartition(".")[2]
    tower = "vis" if "vis" in layer else "(?!vis)"
    return rf"re:{tower}.*\b{re.escape(last)}$"


def matches(pattern: str, layers: list[str]) -> bool:
    return any(re.match(pattern.removeprefix("re:"), layer) for layer in layers)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("rename", [str, models.renamed], ids=["", "renamed"])
@pytest.mark.parametrize("name", dict.fromkeys(case.model for case in CASES.values()))
def test_what_agrees_is_served_right(
    tmp_path: Path, name: str, rename: Callable[[str], str], scheme: str
) -> None:
    """Also with layers that vLLM fuses, renames, splits or leaves to a draft model."""
    has_tower = name in ("paligemma", "qwen2_5_vl")
    if rename is not str and not has_tower:
        pytest.skip("has no other names")
    case = Case(name, "", draft=name == DEEPSEEK)
    path = models.make(
        tmp_path / "checkpoint",
        name,
        usual(name),
        ignore=IGNORE,
        scheme=scheme,
        rename=rename,
    )
    if rename is str and not has_tower and scheme == "w4a16-g32":
        layers = ["lm_head"] if name in ("qwen3", MOE) else []
        check_right(path, case, layers)
    else:
        load(path, case)
