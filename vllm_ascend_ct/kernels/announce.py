# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Log lines that name the operators a layer calls."""

from typing import Any

from vllm.logger import init_logger

from vllm_ascend_ct.ops.precedents import Form, is_proven
from vllm_ascend_ct.ops.soc import current_soc

logger = init_logger("vllm.ascend_ct.kernels")


def announce(server: Any, *forms: Form) -> None:
    """Log the operator calls of a kernel, experts or a scheme, once for each form.

    Calls without a known precedent on the current chip are marked as unproven.

    Args:
        server: The object that makes the calls; its class is logged. Its attribute
            `announced` is set to the forms.
        forms: The forms of its calls.

    """
    if not forms:
        return
    server.announced = forms
    logger.info_once(
        "%s calls %s.",
        type(server).__name__,
        ", ".join(
            f"{form.operator} ({form.kind}, {form.layout}"
            f"{'' if is_proven(form) else f', unproven on {current_soc().value}'})"
            for form in dict.fromkeys(forms)
        ),
    )
