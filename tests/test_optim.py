"""Learning rates over a run, and which parameters decay."""

import pytest
import torch
from torch import nn

from llava_min.optim import parameter_groups, rate_factor


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_the_rate_is_that_of_transformers(schedule, warmup):
    optimization = pytest.importorskip("transformers.optimization", reason="transformers is the oracle: pip install -e '.[test]'")
    make = {"cosine": optimization.get_cosine_schedule_with_warmup, "linear": optimization.get_linear_schedule_with_warmup,
            "constant": lambda o, w, t: optimization.get_constant_schedule_with_warmup(o, w)}[schedule]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = make(optimizer, warmup, 40)
    for step in range(40):
        assert rate_factor(step, 40, warmup, schedule) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_norms_and_biases_do_not_decay_and_the_projector_has_its_rate():
    model = nn.ModuleDict({"multi_modal_projector": nn.Linear(2, 3), "norm": nn.LayerNorm(3), "frozen": nn.Linear(2, 2).requires_grad_(False)})
    groups = parameter_groups(model, lr=1.0, weight_decay=0.1, projector_lr=0.5)
    found = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    p = model["multi_modal_projector"]
    assert found == {id(p.weight): (0.5, 0.1), id(p.bias): (0.5, 0.0), id(model["norm"].weight): (1.0, 0.0), id(model["norm"].bias): (1.0, 0.0)}
