# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""`vllm-ascend-ct inspect`: how a checkpoint would be served, or why it is refused.

Reads config.json and the headers of the files, no weights, and needs no NPU. The code
that serves decides: vLLM builds the model and loads it without values (`dry_load.py`).
"""

import argparse
import gc
import importlib.util
import json
import logging
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from vllm_ascend_ct import envs
from vllm_ascend_ct.cli.environment import with_plugin
from vllm_ascend_ct.ops.soc import Soc

if TYPE_CHECKING:
    from vllm_ascend_ct.cli.dry_load import DryLoad, Layer

_VALUES = (
    "Values were not read: serving also refuses scales that are zero or not finite."
)
_NO_HEADERS = (
    "The headers of the files could not be read: this is what config.json alone says."
)


@dataclass
class Row:
    """Layers that are served alike.

    Attributes:
        layers: Their name, `*` for the numbers of blocks.
        count: How many there are.
        scheme: Of their weights and activations.
        served_by: What multiplies, and in what way other than the scheme says.
        calls: Operators, each with its form.
        unproven: Those that no public code is known to call so on the chip.
        bytes_per_rank: What their weights take, laid out; None if they are refused.
        refusal: What, where, supported and remedy; None if they are served.

    """

    layers: str
    count: int
    scheme: str
    served_by: str
    calls: list[str]
    unproven: list[str]
    bytes_per_rank: int | None
    refusal: dict[str, str] | None = None


@dataclass
class Report:
    """What `--json` writes.

    Attributes:
        basis: What the verdict is of: the files' "headers", or "config.json" alone.
        errors: What concerns the checkpoint as a whole.
        other_bytes: Per rank, of parameters of other layers.

    """

    checkpoint: str
    platform: str
    soc: str
    dtype: str
    tensor_parallel_size: int
    expert_parallel_size: int
    is_served: bool = False
    basis: str = "headers"
    rows: list[Row] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    other_bytes: int = 0

    @property
    def bytes_per_rank(self) -> int:
        """What all parameters take."""
        return self.other_bytes + sum(row.bytes_per_rank or 0 for row in self.rows)


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "inspect",
        help="say how a checkpoint would be served, or why it is refused",
        description="Say how a checkpoint would be served, from config.json and the "
        "headers of its files. Exit status: 0 served, 1 refused, 2 wrong usage.",
    )
    parser.add_argument("checkpoint", help="a folder, or the name of a hub's model")
    parser.add_argument(
        "--soc",
        choices=[soc.value for soc in Soc],
        help="chip to serve on (default: this machine's, else A2)",
    )
    parser.add_argument(
        "--tp", type=_positive, default=1, help="ranks of tensor parallelism"
    )
    parser.add_argument(
        "--ep",
        type=_positive,
        default=1,
        help="ranks that share the experts, a multiple of --tp: as "
        "--enable-expert-parallel, with --data-parallel-size EP / TP",
    )
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", "bfloat16", "float16"]
    )
    parser.add_argument("--json", action="store_true", help="write JSON")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="as of `vllm serve`"
    )
    parser.set_defaults(run=run, parser=parser)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: supported: 1 and more")
    return number


def run(arguments: argparse.Namespace) -> int:
    if arguments.ep % arguments.tp and arguments.ep != 1:
        arguments.parser.error(
            f"--ep {arguments.ep}: supported: 1, or a multiple of --tp {arguments.tp}"
        )
    prepare_environment(arguments.soc)
    # Headers of many experts are millions of objects, none of them garbage.
    gc.disable()
    try:
        report = inspect(arguments)
    finally:
        gc.enable()
    if arguments.json:
        content = {**asdict(report), "bytes_per_rank": report.bytes_per_rank}
        print(json.dumps(content, indent=2))
    else:
        from vllm_ascend_ct.cli import tables

        tables.show(report)
    return 0 if report.is_served else 1


def prepare_environment(soc: str | None) -> None:
    """Make vLLM, not yet imported, choose this package and configure no logging."""
    # Others may register models.
    os.environ["VLLM_PLUGINS"] = ",".join(with_plugin())
    has_npu = importlib.util.find_spec("torch_npu") is not None
    # Where there is torch_npu, a device is not needed.
    os.environ.setdefault(envs.EMULATE, "0" if has_npu else "1")
    if soc is not None:
        os.environ[envs.SOC] = soc
    # The report has what the log would say of the checkpoint.
    os.environ["VLLM_CONFIGURE_LOGGING"] = "0"


def inspect(arguments: argparse.Namespace) -> Report:
    """Inspect a checkpoint, in a process that has not served.

    Args:
        arguments: As of `add_parser`.

    """
    log = _Warnings()
    report = Report(
        checkpoint=arguments.checkpoint,
        platform="none",
        soc=arguments.soc or "unknown",
        dtype=arguments.dtype,
        tensor_parallel_size=arguments.tp,
        expert_parallel_size=arguments.ep,
    )
    try:
        _inspect(report, arguments)
    except Exception as error:
        report.is_served = False
        report.errors.append(_text(error))
    report.notes = [*log.texts, *report.notes]
    return report


def _inspect(report: Report, arguments: argparse.Namespace) -> None:
    from vllm.platforms import current_platform
    from vllm.plugins import load_general_plugins

    from vllm_ascend_ct import ascend_base
    from vllm_ascend_ct.ops.soc import current_soc

    report.platform = type(current_platform).__name__
    report.soc = current_soc().value
    load_general_plugins()
    current_platform.pre_register_and_update()
    vllm_config = _engine_config(arguments)
    report.dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
    from vllm_ascend_ct.cli.dry_load import dry_load
    from vllm_ascend_ct.cli.ranks import first_of_ranks

    ascend_base.prepare_worker(vllm_config)
    with first_of_ranks(vllm_config):
        _fill(report, dry_load(vllm_config))


class _Warnings(logging.Handler):
    """Takes what the package warns of while a checkpoint is loaded."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []
        # None of vLLM's goes to the terminal.
        logger = logging.getLogger("vllm")
        logger.addHandler(logging.NullHandler())
        logger.propagate = False
        logging.getLogger("vllm.ascend_ct.quantization").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def _engine_config(arguments: argparse.Namespace) -> Any:
    """The config of an engine that would serve the checkpoint.

    Raises:
        UnsupportedCheckpointError: The checkpoint is refused by its config.
        ValueError: It is no compressed-tensors checkpoint.

    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.quantization import register_quantization_config

    from vllm_ascend_ct.cli.dry_load import DryConfig
    from vllm_ascend_ct.compat import QUANTIZATION, is_ours

    register_quantization_config(QUANTIZATION)(DryConfig)
    vllm_config = EngineArgs(
        arguments.checkpoint,
        dtype=arguments.dtype,
        tensor_parallel_size=arguments.tp,
        data_parallel_size=max(arguments.ep // arguments.tp, 1),
        enable_expert_parallel=arguments.ep > 1,
        trust_remote_code=arguments.trust_remote_code,
        skip_tokenizer_init=True,
        enforce_eager=True,
    ).create_engine_config()
    if not is_ours(vllm_config.quant_config):
        raise ValueError(
            "The model is not quantized by compressed-tensors "
            f"(config.json, quantization={vllm_config.model_config.quantization}): "
            "this package does not serve it otherwise than vLLM does."
        )
    return vllm_config


def _fill(report: Report, result: "DryLoad") -> None:
    """Write down what became of a checkpoint."""
    report.is_served = result.is_served
    report.errors = [_text(error) for error in result.errors]
    report.rows = rows(result.layers)
    if result.headers is None:
        report.basis = "config.json"
    report.notes = [_NO_HEADERS if result.headers is None else _VALUES]
    if result.model is not None:
        modules = [layer.module for layer in result.layers]
        own = {id(p) for module in modules for p in module.parameters(recurse=False)}
        others = (p for p in result.model.parameters() if id(p) not in own)
        report.other_bytes = sum(parameter.nbytes for parameter in others)


def rows(layers: Iterable["Layer"]) -> list[Row]:
    """Put layers together that are served alike."""
    made: dict[Any, Row] = {}
    seen: set[int] = set()
    for layer in layers:
        row = _row(layer, seen)
        key = (
            row.layers,
            row.scheme,
            row.served_by,
            *row.calls,
            *(("refused", row.refusal["what"]) if row.refusal else ()),
        )
        known = made.setdefault(key, row)
        if known is not row:
            known.count += 1
            if row.bytes_per_rank is not None and known.bytes_per_rank is not None:
                known.bytes_per_rank += row.bytes_per_rank
    return list(made.values())


def _row(layer: "Layer", seen: set[int]) -> Row:
    """The row of one layer; `seen` has parameters that are counted already."""
    from vllm_ascend_ct.ops.precedents import is_proven

    scheme = "none" if layer.scheme is None else scheme_name(layer.scheme)
    if (error := layer.refusal) is not None:
        parts = ("what", "where", "supported", "remedy")
        refusal = {part: str(getattr(error, part)) for part in parts}
        return Row(layer.kind, 1, scheme, "refused", [], [], None, refusal)
    example = (layer.example or layer).module
    server, forms = _server(layer)
    calls = {
        form: f"{form.operator} ({form.kind}, {form.layout})"
        for form in dict.fromkeys(forms)
    }
    unproven = [text for form, text in calls.items() if not is_proven(form)]
    # Of tied layers one has the weight.
    own = {id(p) for p in layer.module.parameters(recurse=False)}
    size = sum(p.nbytes for p in example.parameters(recurse=False))
    size = 0 if own and own <= seen else size
    seen |= own
    return Row(layer.kind, 1, scheme, server, list(calls.values()), unproven, size)


def _server(layer: "Layer") -> tuple[str, list[Any]]:
    """What multiplies a layer's weights, and the forms of its calls."""
    from vllm_ascend_ct.quantization.compressed_tensors.utils import is_float

    if layer.scheme is None:
        return "16 bits", []
    if layer.example is None:
        # The model was not built.
        return "unknown", []
    module = layer.example.module
    experts = getattr(module.quant_method, "experts", None)
    upstream = getattr(module, "scheme", None) if experts is None else None
    servers = [experts, upstream, getattr(upstream, "kernel", None)]
    forms = [form for s in servers for form in getattr(s, "announced", ())]
    if experts is None and not forms:
        how = "resolved" if is_float(layer.scheme) else "dequantized"
        return f"16 bits, {how} at load", []
    name = type(next(s for s in reversed(servers) if s is not None)).__name__
    if layer.scheme["input_activations"] is not None and "WNA16" in name:
        name += ", activations in 16 bits"
    return name if forms else f"{name}, by vllm-ascend's calls", forms


def scheme_name(scheme: dict[str, Any]) -> str:
    """A short name, as `W4A16 groups of 128, asymmetric`.

    Args:
        scheme: As upstream's `get_scheme_dict` gives it.

    """
    from vllm_ascend_ct.quantization.compressed_tensors.rules import float_name
    from vllm_ascend_ct.quantization.compressed_tensors.utils import is_float, text

    weights, inputs = scheme["weights"], scheme["input_activations"]
    name = f"W{weights.num_bits}A{inputs.num_bits if inputs else 16}"
    if is_float(scheme):
        name = f"{float_name(scheme) or 'float'} {name}"
    if scheme.get("output_activations") is not None:
        name += f"O{scheme['output_activations'].num_bits}"
    strategy = text(weights.strategy)
    if strategy == "block":
        size = "x".join(map(str, weights.block_structure))
        name += f" in blocks of {size}"
    elif strategy in ("group", "tensor_group"):
        name += f" in groups of {weights.group_size}"
    else:
        name += f" per {strategy}"
    if not weights.symmetric:
        name += ", asymmetric"
    if inputs is not None:
        name += ", dynamic" if inputs.dynamic else ", static"
        name += "" if inputs.symmetric else " asymmetric"
    return name


def _text(error: BaseException) -> str:
    """An error's text; pydantic's without what it adds."""
    errors = getattr(error, "errors", None)
    if callable(errors):
        return "; ".join(str(item.get("msg", item)) for item in errors())
    is_ours = type(error).__module__.startswith("vllm_ascend_ct")
    name = "" if is_ours else f"{type(error).__name__}: "
    return " ".join((f"{name}{error}", *getattr(error, "__notes__", ())))
