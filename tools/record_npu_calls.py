# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Record what layers ask of the NPU operators, for `tools.check_npu` to repeat.

    python -m tools.record_npu_calls [--out build/npu-calls.pt]

Runs a linear layer and experts of every scheme on the emulated platform, and writes
each call that is not like another. (On vllm-ascend experts go through its communication
methods, which also call operators of its own.) `VLLM_ASCEND_CT_SOC` names the chip.
"""

import argparse
import os
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from vllm_ascend_ct.errors import UnsupportedCheckpointError
from vllm_ascend_ct.ops.emulated.registry import is_nz
from vllm_ascend_ct.ops.soc import current_soc

OUT = Path("build/npu-calls.pt")
TOKENS = (1, 7)
DTYPES = (torch.bfloat16, torch.float16)


class CallRecorder(TorchDispatchMode):
    """Keeps one call of each form.

    Attributes:
        calls: Operator, arguments and keyword arguments by a name that says what made
            the call. A tensor in FRACTAL_NZ is `{"nz": tensor}`.
        source: What makes calls now.

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
        if func.namespace != "npu":
            return func(*args, **kwargs)
        operator = func.overloadpacket.__name__
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
    # A view keeps its strides, and not the rest of its memory.
    copied = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    copied.copy_(tensor)
    return {"nz": copied} if is_nz(tensor) else copied


def record(
    schemes: Sequence[str], dtypes: Sequence[torch.dtype] = DTYPES
) -> dict[str, tuple[str, Any, Any]]:
    """Run layers of some schemes, where vLLM's parallel layers can be built."""
    from tests.layers import quantized_experts as experts
    from tests.layers.quantized_layers import activations, load, row_case

    case = row_case(512, 96)
    sizes = experts.Sizes(4, hidden=256, intermediate=256, top_k=2)

    def run_linear(scheme: str, dtype: torch.dtype) -> None:
        layer, _ = load(case, scheme, dtype, bias=True)
        for tokens in TOKENS:
            layer(activations(tokens, case.k, dtype))

    def run_experts(scheme: str, dtype: torch.dtype) -> None:
        runner, _ = experts.load(sizes, scheme, dtype)
        for tokens in TOKENS:
            x = activations(tokens, sizes.hidden, dtype)
            experts.run(runner, x, experts.routing(sizes, tokens))

    kinds = {"linear": run_linear, "experts": run_experts}
    with CallRecorder() as recorder:
        for scheme, dtype, (kind, run) in product(schemes, dtypes, kinds.items()):
            torch.manual_seed(0)
            recorder.source = f"{kind} {scheme} {str(dtype).removeprefix('torch.')}"
            try:
                run(scheme, dtype)
            except UnsupportedCheckpointError:
                print(f"{current_soc().value} does not serve {recorder.source}")
    return recorder.calls


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    # Before anything imports vLLM.
    os.environ["VLLM_PLUGINS"] = "ascend_ct"
    os.environ["VLLM_ASCEND_CT_EMULATE"] = "1"
    from vllm.plugins import load_general_plugins
    from vllm.utils.network_utils import get_open_port

    from tools.make_checkpoint import SCHEMES
    from tools.ranks import tensor_parallel

    load_general_plugins()
    with tensor_parallel(rank=0, world_size=1, port=get_open_port()):
        calls = record(list(SCHEMES))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    save(calls, arguments.out)
    size = arguments.out.stat().st_size / 2**20
    print(f"{len(calls)} calls, {size:.0f} MiB: {arguments.out}")


def save(calls: dict[str, tuple[str, Any, Any]], path: Path) -> None:
    torch.save({"soc": current_soc().value, "calls": calls}, path)


if __name__ == "__main__":
    main()
