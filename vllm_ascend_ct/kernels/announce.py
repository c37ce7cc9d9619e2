# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""One line in the log for each way in which operators are called."""

from typing import Any

from vllm.logger import init_logger

from vllm_ascend_ct.ops.precedents import Form, precedent
from vllm_ascend_ct.ops.soc import current_soc

logger = init_logger("vllm.ascend_ct.kernels")


def announce(server: Any, *forms: Form) -> None:
    """Log what a kernel, experts or a scheme calls, and what of it is unproven.

    Args:
        server: Makes the calls. It gains the attribute `announced`: the forms.
        forms: Of its calls.

    """
    if not forms:
        return
    server.announced = forms
    rows = {form: precedent(form) for form in forms}
    logger.info_once(
        "%s calls %s.",
        type(server).__name__,
        ", ".join(
            f"{form.operator} ({form.kind}, {form.layout}"
            f"{'' if row and row.source else f', unproven on {current_soc().value}'})"
            for form, row in rows.items()
        ),
    )
