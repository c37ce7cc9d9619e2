# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Record the NPU operator calls of layers, for `check_npu` to repeat.

    python -m tools.numerics.record_npu_calls [--out build/npu-calls.pt]

Runs layers of every scheme and kind on the emulated platform, and writes one call of
each form to a file. `VLLM_ASCEND_CT_SOC` names the chip.

    python -m tools.stacks.real_stack run python -m tools.numerics.record_npu_calls

records the calls that vllm-ascend makes for such experts, also of its own operators.
"""

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from vllm_ascend_ct.errors import UnsupportedCheckpointError
from vllm_ascend_ct.ops.emulated.registry import is_nz
from vllm_ascend_ct.ops.limits import current_limits
from vllm_ascend_ct.ops.soc import current_soc

OUT = Path("build/npu-calls.pt")
ASCEND_OUT = Path("build/npu-calls-vllm-ascend.pt")
TOKENS = (1, 7)
DTYPES = (torch.bfloat16, torch.float16)


class CallRecorder(TorchDispatchMode):
    """Keeps one call of each form.

    Attributes:
        calls: Operator, arguments and keyword arguments, by a name that tells which
            layer made the call. A tensor in FRACTAL_NZ is `{"nz": tensor}`.
        source: Name of the layer that is running.

    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[str, Any, Any]] = {}
        self.source = ""
        self._forms: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace not in ("npu", "_C_ascend"):
            return func(*args, **kwargs)
        operator = func.overloadpacket.__name__
        if func.namespace != "npu":
            operator = f"{func.namespace}.{operator}"
        form = str((operator, tree_map_only(torch.Tensor, _form, (args, kwargs))))
        if form not in self._forms:
            self._forms.add(form)
            name = f"{operator}, {self.source}, {len(self._forms)}"
            copies = tree_map_only(torch.Tensor, _copy, (list(args), kwargs))
            self.calls[name] = (operator, *copies)
        return func(*args, **kwargs)


def _form(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} {tensor.stride()} {is_nz(tensor)}"


def _copy(tensor: torch.Tensor) -> Any:
    # The copy of a view keeps its strides, but not the rest of its storage.
    copied = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    copied.copy_(tensor)
    return {"nz": copied} if is_nz(tensor) else copied


# Builds and runs a layer, given a scheme and a dtype.
Run = Callable[[str, torch.dtype], None]


def layers() -> dict[str, Run]:
    """Functions that build and run upstream's layers, by kind of layer."""
    from tests.layers import quantized_experts as experts
    from tests.layers.quantized_layers import (
        activations,
        load,
        load_embedding,
        load_head,
        row_case,
    )
    from vllm_ascend_ct.fused_moe.functional import combine

    case = row_case(512, 96)
    sizes = experts.Sizes(4, hidden=256, intermediate=256, top_k=2)
    # Wide enough for more than one group of 256.
    wider = experts.Sizes(4, hidden=512, intermediate=512, top_k=2)

    def run_linear(scheme: str, dtype: torch.dtype) -> None:
        layer, _ = load(case, scheme, dtype, bias=True)
        for tokens in TOKENS:
            layer(activations(tokens, case.k, dtype))

    def run_experts(scheme: str, dtype: torch.dtype) -> None:
        of_scheme = wider if "-g256" in scheme else sizes
        runner, _ = experts.load(of_scheme, scheme, dtype)
        for tokens in TOKENS:
            x = activations(tokens, of_scheme.hidden, dtype)
            experts.run(runner, x, experts.routing(of_scheme, tokens))

    def run_head(scheme: str, dtype: torch.dtype) -> None:
        layer, _ = load_head(sizes.hidden, sizes.hidden, scheme, dtype)
        for tokens in TOKENS:
            layer.quant_method.apply(layer, activations(tokens, sizes.hidden, dtype))

    def run_tied_head(scheme: str, dtype: torch.dtype) -> None:
        layer, _ = load_embedding(sizes.hidden, sizes.hidden, scheme, dtype)
        for tokens in TOKENS:
            layer(torch.arange(tokens))
            layer.quant_method.apply(layer, activations(tokens, sizes.hidden, dtype))

    def run_combine(scheme: str, dtype: torch.dtype) -> None:
        if not current_limits().grouped_matmul:
            return
        for tokens in TOKENS:
            weights, ids = experts.routing(sizes, tokens)
            rows = activations(ids.numel(), sizes.hidden, dtype)
            index = torch.arange(ids.numel(), dtype=torch.int32) - 1
            combine(rows, index, weights, ids, all_here=False)

    return {
        "linear": run_linear,
        "experts": run_experts,
        "head": run_head,
        "tied head": run_tied_head,
        "experts of which some are elsewhere,": run_combine,
    }


def vllm_ascend_layers(vllm_config: Any) -> dict[str, Run]:
    """Functions that run vllm-ascend's experts, without and with its own operators."""
    from tests.layers.quantized_experts import routing
    from tests.layers.quantized_layers import activations
    from tests.real_stack import ascend_experts as experts

    def run_experts(scheme: str, dtype: torch.dtype) -> None:
        vllm_config.model_config.dtype = dtype
        layer, _ = experts.load(scheme, vllm_config, dtype)
        for tokens in TOKENS:
            x = activations(tokens, experts.SIZES.hidden, dtype)
            experts.run(layer, x, routing(experts.SIZES, tokens), vllm_config)

    def run_with_own_operators(scheme: str, dtype: torch.dtype) -> None:
        with experts.own_operators():
            run_experts(scheme, dtype)

    return {
        "vllm-ascend's experts": run_experts,
        "vllm-ascend's experts and operators": run_with_own_operators,
    }


def record(
    kinds: Mapping[str, Run],
    schemes: Sequence[str],
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> dict[str, tuple[str, Any, Any]]:
    """Run layers of the given schemes and record their calls."""
    with CallRecorder() as recorder:
        for scheme, dtype, (kind, run) in product(schemes, dtypes, kinds.items()):
            torch.manual_seed(0)
            recorder.source = f"{kind} {scheme} {str(dtype).removeprefix('torch.')}"
            try:
                run(scheme, dtype)
            except UnsupportedCheckpointError:
                print(f"{current_soc().value} does not support {recorder.source}")
    return recorder.calls


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    # Before anything imports vLLM.
    emulate = os.environ.get("REAL_STACK_EMULATE", "1")
    os.environ["VLLM_PLUGINS"] = "ascend_ct"
    os.environ["VLLM_ASCEND_CT_EMULATE"] = emulate
    usual, vllm_ascend = (record_emulated, OUT), (record_vllm_ascend, ASCEND_OUT)
    record_calls, path = usual if emulate == "1" else vllm_ascend
    calls, out = record_calls(), arguments.out or path
    out.parent.mkdir(parents=True, exist_ok=True)
    save(calls, out)
    print(f"{len(calls)} calls, {out.stat().st_size / 2**20:.0f} MiB: {out}")


def record_emulated() -> dict[str, tuple[str, Any, Any]]:
    from vllm.plugins import load_general_plugins
    from vllm.utils.network_utils import get_open_port

    from tools.checkpoints.make_checkpoint import SCHEMES
    from tools.stacks.ranks import tensor_parallel

    load_general_plugins()
    with tensor_parallel(rank=0, world_size=1, port=get_open_port()):
        return record(layers(), list(SCHEMES))


def record_vllm_ascend() -> dict[str, tuple[str, Any, Any]]:
    from tests.real_stack.chip import set_chip

    set_chip(current_soc().value)
    from vllm.utils.network_utils import get_open_port

    from tests.layers.quantized_experts import SERVED
    from tests.real_stack.ascend_layers import ascend_layers
    from tools.checkpoints.tiny_moe import configs

    with TemporaryDirectory() as model:
        configs()["qwen3-moe"].save_pretrained(model)
        with ascend_layers(Path(model), 0, 1, get_open_port()) as vllm_config:
            return record(vllm_ascend_layers(vllm_config), SERVED)


def save(calls: dict[str, tuple[str, Any, Any]], path: Path) -> None:
    torch.save({"soc": current_soc().value, "calls": calls}, path)


if __name__ == "__main__":
    main()
