# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Functions of the runtime."""

import ctypes

_LIBRARY = ctypes.CDLL("libascendcl.so")
_LIBRARY.aclrtMemcpy.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
)


def memcpy(dst: int, dest_max: int, src: int, count: int, kind: int) -> int:
    """Copy memory between host and device.

    Source: CANN's pyACL, `acl.rt.memcpy`.

    Args:
        dst: Address to copy to.
        dest_max: Bytes that fit there.
        src: Address to copy from.
        count: Bytes to copy.
        kind: `aclrtMemcpyKind`.

    Returns:
        An error code, 0 for success.

    """
    code: int = _LIBRARY.aclrtMemcpy(dst, dest_max, src, count, kind)
    return code
