// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
//
// CANN's; vllm-ascend's C++ code includes it, and needs nothing of it here.
#pragma once
