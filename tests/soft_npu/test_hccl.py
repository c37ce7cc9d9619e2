# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""torch_npu's process group with two processes, one device each."""

import os
import subprocess
import sys

import pytest
from vllm.utils.network_utils import get_open_port

pytestmark = pytest.mark.soft_npu
RANKS = 2

START = """
import sys
import torch, torch_npu
import torch.distributed as dist
rank, port = map(int, sys.argv[1:])
torch.npu.set_device(rank)
dist.init_process_group(
    "hccl", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
)
other = 1 - rank
def npu(*values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype, device="npu")
def same(tensor, *values):
    assert tensor.tolist() == list(values), (rank, tensor, values)
"""

COLLECTIVES = """
for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64):
    x = npu(1 + rank, 5, dtype=dtype)
    dist.all_reduce(x)
    same(x, 3, 10)
x = npu(1 + rank, -rank)
dist.all_reduce(x, op=dist.ReduceOp.MAX)
same(x, 2, 0)
parts = [npu(0, 0), npu(0, 0)]
dist.all_gather(parts, npu(rank, 7))
same(parts[0], 0, 7)
same(parts[1], 1, 7)
out = npu(0, 0, 0, 0)
dist.all_gather_into_tensor(out, npu(rank, 7))
same(out, 0, 7, 1, 7)
out = npu(0)
dist.reduce_scatter_tensor(out, npu(1 + rank, 10 + rank))
same(out, 3 if rank == 0 else 21)
x = npu(rank, rank)
dist.broadcast(x, 1)
same(x, 1, 1)
# One row to the own rank, two to the other.
counts = [1, 2] if rank == 0 else [2, 1]
out = npu(0, 0, 0)
given = npu(*(10 * rank + i for i in range(3)))
back = [1, 2] if rank == 0 else [2, 1]
dist.all_to_all_single(out, given, back, counts)
same(out, *((0, 10, 11) if rank == 0 else (1, 2, 12)))
if rank == 0:
    dist.send(npu(4, 2), 1)
    x = npu(0)
    dist.recv(x, 1)
    same(x, 9)
else:
    x = npu(0, 0)
    dist.recv(x, 0)
    same(x, 4, 2)
    dist.send(npu(9), 0)
dist.barrier()
name = dist.group.WORLD._get_backend(torch.device("npu")).get_hccl_comm_name(rank)
all = torch.ops.soft_npu.all_gather(name, torch.tensor([rank]))
same(all.flatten(), 0, 1)
print("done")
"""

GRAPH = """
x, out = npu(1 + rank), npu(0, 0)
dist.all_reduce(npu(0))
graph = torch.npu.NPUGraph()
with torch.npu.graph(graph):
    y = x * 2
    dist.all_reduce(y)
    dist.all_gather_into_tensor(out, y + rank)
for i in (1, 10):
    x.fill_(i * (1 + rank))
    graph.replay()
    same(out, 6 * i, 6 * i + 1)
print("done")
"""

ALONE = """
if rank == 0:
    dist.all_reduce(npu(1))
"""


def run(script: str, **variables: str) -> list[subprocess.CompletedProcess[str]]:
    """Run the script on each rank."""
    port = str(get_open_port())
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", START + script, str(rank), port],
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    results = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        result = subprocess.CompletedProcess(process.args, process.returncode, out, err)
        results.append(result)
    return results


@pytest.mark.parametrize("script", [COLLECTIVES, GRAPH], ids=["each", "in a graph"])
def test_collectives(script: str) -> None:
    for result in run(script):
        assert "done" in result.stdout, result.stderr[-3000:]


def test_rank_that_does_not_come() -> None:
    first, _ = run(ALONE, SOFT_NPU_HCCL_TIMEOUT="5")
    assert first.returncode != 0
    assert "no answer from another rank" in first.stderr
