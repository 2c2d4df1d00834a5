"""Learning rates over a run, which parameters decay, other optimizers, loss scale and clipping."""

import sys
import types

import pytest
import torch
from torch import nn

from llava_min.errors import UserError
from llava_min.training.optim import (
    LossScale,
    check_optimizer,
    clip_gradients,
    lr_factor,
    make_optimizer,
    parameter_groups,
)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_the_rate_is_that_of_transformers(schedule, warmup):
    optimization = pytest.importorskip(
        "transformers.optimization", reason="transformers is the oracle: pip install -e '.[test]'"
    )
    make = {
        "cosine": optimization.get_cosine_schedule_with_warmup,
        "linear": optimization.get_linear_schedule_with_warmup,
        "constant": lambda o, w, t: optimization.get_constant_schedule_with_warmup(o, w),
    }[schedule]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = make(optimizer, warmup, 40)
    for step in range(40):
        assert lr_factor(step, 40, warmup, schedule) == pytest.approx(
            theirs.get_last_lr()[0], abs=1e-12
        )
        optimizer.step()
        theirs.step()


def test_norms_and_biases_do_not_decay_and_parts_have_their_rates():
    model = nn.ModuleDict(
        {
            "multi_modal_projector": nn.Linear(2, 3),
            "vision_tower": nn.Linear(2, 2, bias=False),
            "norm": nn.LayerNorm(3),
            "frozen": nn.Linear(2, 2).requires_grad_(False),
        }
    )
    groups = parameter_groups(model, lr=1.0, weight_decay=0.1, projector_lr=0.5, vision_lr=0.25)
    found = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    p, v = model["multi_modal_projector"], model["vision_tower"]
    assert found == {
        id(p.weight): (0.5, 0.1),
        id(p.bias): (0.5, 0.0),
        id(v.weight): (0.25, 0.1),
        id(model["norm"].weight): (1.0, 0.0),
        id(model["norm"].bias): (1.0, 0.0),
    }
    assert {g["lr"] for g in parameter_groups(model, 1.0, 0.1)} == {1.0}


def test_an_optimizer_of_ones_own(monkeypatch):
    groups = [{"params": [nn.Parameter(torch.ones(2))], "lr": 0.5, "weight_decay": 0.0}]
    assert isinstance(make_optimizer("torch.optim:SGD", groups, (0.9, 0.999)), torch.optim.SGD)
    adam = make_optimizer("torch.optim:NAdam", groups, (0.5, 0.75))
    assert adam.defaults["betas"] == (0.5, 0.75) and adam.param_groups[0]["lr"] == 0.5
    # before the weights are read
    groups = [
        {"params": [nn.Parameter(torch.ones(2, 3, device="meta"))], "lr": 0.5, "weight_decay": 0.0}
    ]
    for name in ("adamw", "torch.optim:SGD", "torch.optim:Muon", "torch.optim:Adafactor"):
        check_optimizer(name, groups, (0.9, 0.999))
    monkeypatch.setitem(sys.modules, "mine", types.SimpleNamespace(nothing=lambda groups: 3))
    for name in (
        "absent:SGD",
        "torch.optim:Absent",
        "torch.optim",
        "mine:nothing",
        "adam",
        "json:loads",
        "torch.optim:LBFGS",
        "torch.optim:SparseAdam",
    ):
        with pytest.raises(UserError, match=f"optimizer: {name}: ") as e:
            check_optimizer(name, groups, (0.9, 0.999))
        assert "\n" not in str(e.value)


def test_the_scale_moves_as_that_of_torch():
    theirs, ours = torch.amp.GradScaler("cpu"), LossScale(True)
    p = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([p], lr=0.0)
    for step in range(2100):
        finite = step not in (0, 1, 5)
        p.grad = torch.ones(1) * (1.0 if finite else float("inf"))
        theirs.scale(torch.ones(1))  # it begins with the first use
        theirs.unscale_(optimizer)
        theirs.step(optimizer)
        theirs.update()
        ours.update(finite)
        assert ours.scale == theirs.get_scale()
    off = LossScale(False)
    off.update(False)
    assert off.scale == 1.0 and not off.searching and ours.searching
    while ours.scale > 1:
        ours.update(False)
    assert not ours.searching  # below it an overflow is the data's


def test_gradients_are_unscaled_and_clipped():
    params = [
        nn.Parameter(torch.zeros(2)),
        nn.Parameter(torch.zeros(1)),
        nn.Parameter(torch.zeros(1)),
    ]
    params[0].grad, params[1].grad = torch.tensor([6.0, 0.0]), torch.tensor([8.0])
    assert clip_gradients(params, 2.0, 1.0) == pytest.approx(5.0)
    assert params[0].grad.tolist() == pytest.approx([0.6, 0.0], abs=1e-5) and params[
        1
    ].grad.item() == pytest.approx(0.8, abs=1e-5)
    assert clip_gradients(params, 1.0, 0.0) == pytest.approx(1.0) and params[
        1
    ].grad.item() == pytest.approx(0.8, abs=1e-5)
    params[2].grad = torch.tensor([float("inf")])
    assert not torch.isfinite(clip_gradients(params, 1.0, 1.0))
