# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
import pkgutil

# Trees whose own tests run on software NPUs have a `tools`, too.
__path__ = pkgutil.extend_path(__path__, __name__)
