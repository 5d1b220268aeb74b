"""Every number of the configuration has a range that is checked before the start."""

import dataclasses
import math

import pytest

from m3po.config import AlgorithmCfg
from m3po.presets import MODES, sized
from m3po.validation import UNBOUNDED, validate


def leaves(cfg=None, prefix=""):
    """Dotted names and kinds of all fields."""
    cfg = AlgorithmCfg() if cfg is None else cfg
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, type(value)


def changed(name, value):
    """The default configuration with one field changed."""
    cfg = AlgorithmCfg()
    *sections, field = name.split(".")
    node = cfg
    for section in sections:
        node = getattr(node, section)
    setattr(node, field, value)
    return cfg


NUMBERS = [name for name, kind in leaves() if kind in (int, float)]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [math.nan, -1, "many", True, None], ids=str)
def test_no_number_is_nonsense(name, value):
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        validate(changed(name, value), 64, 8)


@pytest.mark.parametrize("name", NUMBERS)
def test_infinity_means_no_limit_or_is_refused(name):
    if name in UNBOUNDED:
        validate(changed(name, math.inf), 64, 8)
        return
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        validate(changed(name, math.inf), 64, 8)


@pytest.mark.parametrize("name", [name for name, kind in leaves() if kind is int])
def test_counts_are_whole(name):
    with pytest.raises(ValueError, match=r"must be a whole number, got 2\.5"):
        validate(changed(name, 2.5), 64, 8)


@pytest.mark.parametrize("name", [name for name, kind in leaves() if kind is bool])
def test_switches_are_switches(name):
    with pytest.raises(ValueError, match="must be true or false, got 1"):
        validate(changed(name, 1), 64, 8)


@pytest.mark.parametrize(
    "name", ["clip_param", "desired_kl", "max_grad_norm", "planner.full_gain", "planner.temperature"]
)
def test_what_must_be_positive_is_not_zero(name):
    with pytest.raises(ValueError, match="must be positive, got 0"):
        validate(changed(name, 0), 64, 8)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_presets_are_valid(mode, device):
    validate(sized(MODES[mode](), device), 64, 16, device)
