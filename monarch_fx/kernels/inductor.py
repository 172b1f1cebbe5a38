"""A pass over the graph that ``torch.compile`` hands to Inductor, before gradients are taken.

There one node is one product, one activation; exports and eager mode don't know of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch._inductor.config as inductor_config
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from monarch_fx.kernels import fusion, gathering


class FuseProducts(CustomGraphPass):
    """Gives products what stands behind them, and puts those together that read the same rows."""

    def __call__(self, graph: fx.Graph) -> None:
        fusion.fuse_activations(graph)
        gathering.gather_products(graph)

    def uuid(self) -> Any:
        return get_hash_for_files(tuple(str(Path(__file__).with_name(name)) for name in ("fusion.py", "gathering.py")))


def install() -> None:
    """Makes Inductor run the pass, unless the user has a pass in its place."""
    if inductor_config.pre_grad_custom_pass is None:
        inductor_config.pre_grad_custom_pass = FuseProducts()
