"""One call of each of a few products, dense and as Monarch matrices, for NVIDIA's profiler to count in.

    ncu --profile-from-start off --clock-control none --csv --metrics gpu__time_duration.sum,dram__bytes_read.sum,\
dram__bytes_write.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,\
lts__throughput.avg.pct_of_peak_sustained_elapsed,sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed,\
sm__issue_active.avg.pct_of_peak_sustained_elapsed,sm__warps_active.avg.pct_of_peak_sustained_active \
        python -m benchmarks.counters [index of the first case]

A kernel that fills one number with the index of the case stands in front of every dense and every Monarch product.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F

import monarch_fx as mfx
from monarch_fx.structure import MonarchShape

CASES = [  # tokens, structure, whether gradients are counted, too
    (16384, MonarchShape(1024, 1024, 2, 2, 128), False),
    (16384, MonarchShape(1024, 4096, 2, 1, 336), False),
    (16384, MonarchShape(4096, 1024, 1, 2, 336), False),
    (16384, MonarchShape(1024, 1024, 1, 1, 256), True),
    (16384, MonarchShape(1024, 4096, 2, 1, 336), True),
    (16384, MonarchShape(4096, 1024, 1, 2, 336), True),
    (16384, MonarchShape(768, 2304, 2, 1, 160), True),
    (16384, MonarchShape(768, 3072, 3, 1, 160), True),
    (16384, MonarchShape(3072, 768, 1, 3, 160), True),
    (16384, MonarchShape(768, 768, 1, 1, 128), True),
    (4096, MonarchShape(4096, 4096, 2, 2, 1024), False),
    (4096, MonarchShape(4096, 4096, 4, 4, 256), False),
    (4096, MonarchShape(4096, 4096, 4, 4, 176), False),
    (1, MonarchShape(4096, 4096, 4, 4, 176), False),
    (1, MonarchShape(4096, 4096, 4, 4, 256), False),
    (1, MonarchShape(4096, 14336, 4, 4, 256), False),
    (1, MonarchShape(14336, 4096, 4, 4, 256), False),
    (1, MonarchShape(8192, 8192, 4, 4, 336), False),
    (4, MonarchShape(4096, 4096, 4, 4, 176), False),
]


def main(first: int) -> None:
    mark, profiler = torch.zeros(1, device="cuda"), torch.cuda.cudart()
    for index, (tokens, shape, training) in list(enumerate(CASES))[first:]:

        def drawn(*size: int, training: bool = training) -> torch.Tensor:
            return torch.randn(*size, device="cuda").bfloat16().requires_grad_(training)

        n_in, n_out, rank = shape.nblocks_in, shape.nblocks_out, shape.rank
        x, bias = drawn(tokens, shape.in_features), drawn(shape.out_features)
        weight = drawn(shape.out_features, shape.in_features)
        R, L = drawn(n_in, n_out, rank, shape.p), drawn(n_out, n_in, rank, shape.s)
        grad = torch.randn(tokens, shape.out_features, device="cuda").bfloat16()
        for product, operands in ((F.linear, (x, weight, bias)), (mfx.monarch_bmm, (x, R, L, bias))):
            for is_counted in (False, True):
                torch.cuda.synchronize()
                if is_counted:
                    profiler.cudaProfilerStart()
                    mark.fill_(index)
                y = product(*operands)
                if training:
                    torch.autograd.grad(y, operands, grad)
                torch.cuda.synchronize()
                if is_counted:
                    profiler.cudaProfilerStop()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
