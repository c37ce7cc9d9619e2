# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""What both platforms have in common."""

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
    """First base of a platform class; vLLM's or vllm-ascend's platform follows."""

    @classmethod
    def prepare_ascend_ct(cls) -> None:
        """Make the NPU operators usable in this process; may be called again."""
        raise NotImplementedError

    @classmethod
    def pre_register_and_update(
        cls, parser: "FlexibleArgumentParser | None" = None
    ) -> None:
        """Register what general plugins register: some entry points skip those."""
        super().pre_register_and_update(parser)
        from vllm_ascend_ct.register import register

        register()
        # Without a parser an engine is being configured, and logging already is.
        if parser is None:
            cls.announce()

    @classmethod
    def check_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        """Stop an engine that another config would serve, and name what it traces."""
        super().check_and_update_config(vllm_config)
        from vllm_ascend_ct import compat
        from vllm_ascend_ct.ascend_base import graph_key
        from vllm_ascend_ct.register import check_in_charge

        check_in_charge(vllm_config.quant_config)
        # Refuses unknown layouts as well.
        key = graph_key()
        settings = vllm_config.additional_config
        if not compat.HASHES_ADDED_FIELDS and isinstance(settings, dict):
            # In the model's config, where `AscendCTConfig` writes it, nothing reads it.
            vllm_config.additional_config = {**settings, **key}

    @classmethod
    def announce(cls) -> None:
        """Log which platform serves, in the process that configures the engine."""
        logger.info_once(
            "Serving compressed-tensors models on %s, Ascend %s.",
            cls.__name__,
            current_soc().value,
        )

    @classmethod
    def validate_environ(cls, hard_fail: bool) -> None:
        """Check for unknown `VLLM_*` variables, knowing this package's own too."""
        known = {*vllm.envs.environment_variables, *envs.ENVIRONMENT_VARIABLES}
        for name in os.environ:
            if name.startswith("VLLM_") and name not in known:
                if hard_fail:
                    raise ValueError(f"Unknown vLLM environment variable: {name}")
                logger.warning("Unknown vLLM environment variable: %s", name)
