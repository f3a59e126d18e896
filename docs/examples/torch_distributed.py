"""The reducers under torch.distributed: gradient, Gram matrix and curvature of a network from several processes.

Two processes on one machine, or as many as you like on several::

    torchrun --standalone --nproc-per-node 2 docs/examples/torch_distributed.py
"""

from functools import reduce

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits

import ddnref

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()

# Every process makes the same network from the same seed. Each has its own part of the 8×8 digits.
images, labels = load_digits(return_X_y=True)
x, t = torch.asarray(images[:120] / 16), torch.asarray(labels[:120])
chain = ddnref.networks.Chain.mlp(64, 16, 10, 2, like=x)
size = -(-len(x) // world)
mine = slice(rank * size, min((rank + 1) * size, len(x)))

# Sums add up: one all_reduce for each array of the state.
mean = ddnref.curvature.sum_reducer(chain.gradient, weight=lambda x, _: len(x))
state = mean.update(mean.init(), x[mine], t[mine])
weight = torch.asarray(state.weight, dtype=x.dtype)
for total in (*state.total, weight):
    dist.all_reduce(total)
gradient = mean.finalise(ddnref.curvature.SumState(state.total, float(weight)))

# So do Gram matrices of shards of rows: here the second moments of the pixels, each process with its own images.
rows = ddnref.curvature.gram_reducer("rows")
state = rows.update(rows.init(), x[mine])
dist.all_reduce(state.blocks[0][0])
moments = rows.finalise(state)

# The curvature couples all samples: states travel, in the order of the samples, and merge.
curvature = ddnref.curvature.ggn_reducer(chain)
state = curvature.update(curvature.init(mine.start), x[mine], t[mine])
states = [None] * world
dist.gather_object(state, states if rank == 0 else None)

if rank == 0:
    w = ddnref.curvature.ggn_eigvalsh(curvature.finalise(reduce(curvature.merge, states)))
    whole = ddnref.curvature.ggn_eigvalsh(chain, x, t)
    errors = {
        "gradient": max(float(abs(g - e).max()) for g, e in zip(gradient, chain.gradient(x, t), strict=True)),
        "second moments": float(abs(moments - x.T @ x).max() / moments.max()),
        "curvature": float(abs(w - whole).max() / whole[0]),
    }
    assert max(errors.values()) < 1e-12, errors
    print(f"{world} processes; largest eigenvalue {float(w[0]):.4f}; the numbers of one process: {', '.join(errors)}")

dist.destroy_process_group()
