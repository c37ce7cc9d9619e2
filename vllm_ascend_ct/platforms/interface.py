# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The part that both platforms have in common."""

import os
from typing import TYPE_CHECKING

import vllm.envs
from vllm.logger import init_logger

from vllm_ascend_ct import envs
from vllm_ascend_ct.ops.soc import current_soc

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.platforms.interface import Platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    _Base = Platform
else:
    _Base = object

logger = init_logger("vllm.ascend_ct.platforms")


class AscendCTPlatformMixin(_Base):
    """Mixin placed before vLLM's CPU platform or vllm-ascend's platform in the MRO."""

    @classmethod
    def prepare_ascend_ct(cls) -> None:
        """Make the NPU operators available in this process. Safe to call repeatedly."""
        raise NotImplementedError

    @classmethod
    def pre_register_and_update(
        cls, parser: "FlexibleArgumentParser | None" = None
    ) -> None:
        """Run this package's registrations: some entry points skip general plugins."""
        super().pre_register_and_update(parser)
        from vllm_ascend_ct.register import register

        register()
        # Without a parser, vLLM is configuring an engine and logging is set up.
        if parser is None:
            cls.announce()

    @classmethod
    def check_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        """Check that our config serves, and key compiled graphs by chip and layout."""
        super().check_and_update_config(vllm_config)
        from vllm_ascend_ct import compat
        from vllm_ascend_ct.ascend_base import graph_key
        from vllm_ascend_ct.register import check_in_charge

        check_in_charge(vllm_config.quant_config)
        # Also raises an error if unknown layouts are requested.
        key = graph_key()
        settings = vllm_config.additional_config
        if not compat.HASHES_ADDED_FIELDS and isinstance(settings, dict):
            # `AscendCTConfig` adds the key to the model's config, which this vLLM does
            # not hash.
            vllm_config.additional_config = {**settings, **key}

    @classmethod
    def announce(cls) -> None:
        """Log which platform runs, in the process that configures the engine."""
        logger.info_once(
            "Serving compressed-tensors models on %s, Ascend %s.",
            cls.__name__,
            current_soc().value,
        )

    @classmethod
    def validate_environ(cls, hard_fail: bool) -> None:
        """Check for unknown `VLLM_*` variables, accepting this package's own."""
        known = {*vllm.envs.environment_variables, *envs.ENVIRONMENT_VARIABLES}
        for name in os.environ:
            if name.startswith("VLLM_") and name not in known:
                if hard_fail:
                    raise ValueError(f"Unknown vLLM environment variable: {name}")
                logger.warning("Unknown vLLM environment variable: %s", name)
