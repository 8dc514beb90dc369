"""PyTorch's compiler stays out of processes that don't use it, and works in those that do."""

import subprocess
import sys

import pytest

TRAIN = """
import sys
import tuning.search.worker
import torch
from torch import nn

layer = nn.Linear(3, 2)
for optimizer in (
    torch.optim.AdamW(layer.parameters(), fused=True),
    torch.optim.SGD(layer.parameters(), 0.1, 0.9, nesterov=True, fused=True),
    torch.optim.LBFGS(layer.parameters(), max_iter=2, line_search_fn="strong_wolfe"),
):
    def loss():
        optimizer.zero_grad()
        loss = layer(torch.ones(4, 3)).square().sum()
        loss.backward()
        return loss
    optimizer.step(loss)
    optimizer.load_state_dict(optimizer.state_dict())
assert not {"torch._dynamo.eval_frame", "sympy"} & sys.modules.keys()
"""
USES = {
    "torch.compile": """
        compiled = torch.compile(lambda x: 2 * x + 1, backend="eager")
        assert compiled(torch.ones(2)).tolist() == [3, 3]""",
    "a submodule": """
        from torch._dynamo.utils import counters, is_compile_supported
        import torch._dynamo.config
        assert torch._dynamo.config.recompile_limit and is_compile_supported("cpu")""",
    "what torchvision knows of it": """
        assert sys.modules["torchvision.ops.roi_align"].is_compile_supported("cpu")
        assert torch._dynamo.eval_frame""",
    "torch.export": """
        exported = torch.export.export(layer.eval(), (torch.ones(4, 3),))
        assert torch.equal(exported.module()(torch.ones(4, 3)), layer(torch.ones(4, 3)))""",
    "a custom operator of torchvision": """
        import torchvision
        pooled = torchvision.ops.roi_align(torch.ones(1, 1, 8, 8), torch.tensor([[0.0, 0, 0, 4, 4]]), 2)
        assert pooled.tolist() == [[[[1, 1], [1, 1]]]]""",
    "disable, then torch.compile": """
        @torch.compiler.disable
        def twice(x):
            return 2 * x
        assert twice(3) == 6
        assert torch.compile(lambda x: twice(x) + 1, backend="eager")(torch.ones(2)).tolist() == [3, 3]""",
}


@pytest.mark.slow
@pytest.mark.parametrize("use", USES)
def test_the_compiler_is_loaded_when_it_is_used(use):
    used = "\n".join(line[8:] for line in USES[use].splitlines())
    after = f"{TRAIN}{used}\noptimizer.step(loss)  # by the module itself, if that has been loaded"
    subprocess.run([sys.executable, "-W", "ignore", "-c", after], check=True)
