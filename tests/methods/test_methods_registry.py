"""Test the registry of methods, and that a wrapper passes every hook on."""

import inspect
from dataclasses import fields, is_dataclass

import pytest

from fastdit.config import Config
from fastdit.errors import UserError
from fastdit.methods.denoising import Denoising
from fastdit.methods.registry import METHODS, canonical_name, methods_of
from fastdit.methods.wrapper import Wrapper
from fastdit.rundir.report import panels

# In config.yaml files and checkpoints.
WRITTEN = ("dit", "sd_dit", "sadm", "sd_dit+sadm", "psi_align", "psi_align+sadm")


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_what_others_ask(name):
    method = METHODS[name]
    assert (method.name, method.summary) == (name, method.summary.strip("."))
    assert method.refuses.keys() <= METHODS.keys()
    if method.settings_type is None:
        assert not hasattr(Config(), name)
        return
    assert is_dataclass(method.settings_type)
    assert getattr(Config(), name) == method.complete(method.settings_type())
    hash(method.settings_type())  # frozen


@pytest.mark.parametrize("name", WRITTEN)
def test_combinations_keep_their_names(name):
    assert canonical_name(name) == name
    assert Config(method="+".join(reversed(name.split("+")))).method == name


def test_methods_are_built_from_the_inside_out():
    names = {name: [method.name for method in methods_of(name)] for name in WRITTEN}
    assert names["dit"] == ["dit"]
    assert names["sd_dit+sadm"] == ["sd_dit", "sadm"]
    assert names["psi_align+sadm"] == ["dit", "sadm", "psi_align"]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("", f"nothing is not a method; choose of {', '.join(METHODS)}, or several joined by +"),
        ("+", "nothing is not a method; choose of dit"),
        ("gan", "gan is not a method; choose of dit"),
        ("sadm+gan", "gan is not a method; choose of dit"),
        ("sadm+sadm", "sadm+sadm names sadm twice; name it once"),
        ("dit+sadm", "dit and sadm cannot be joined, for each other method contains dit; leave one out"),
        ("sd_dit+psi_align", "sd_dit and psi_align cannot be joined, for psi_align aligns the tokens of a plain DiT"),
    ],
)
def test_each_refusal_says_why(name, told):
    with pytest.raises(UserError) as caught:
        methods_of(name)
    assert str(caught.value).startswith(f"method: {told}")


def test_two_methods_that_build_a_network_are_refused(monkeypatch):
    class Other(Denoising):
        name = "other"

    monkeypatch.setitem(METHODS, "other", Other)
    assert [method.name for method in methods_of("sadm+other")] == ["other", "sadm"]
    with pytest.raises(UserError, match="cannot be joined, for each builds a network of its own"):
        methods_of("other+sd_dit")


def test_a_wrapper_passes_every_hook_on():
    """A hook that `Denoising` gets later must be passed on, too."""
    parts = {"draw", "compute_loss", "drop_labels"}  # parts of `Denoising.loss`
    hooks = {name for name, member in inspect.getmembers(Denoising, inspect.isfunction) if not name.startswith("_")}
    assert hooks - parts - vars(Wrapper).keys() == set()

    class Recording(Denoising):
        """A base that records the calls of its hooks."""

        def __getattribute__(self, name):
            if name in hooks:
                return lambda *args: (name, args)
            return super().__getattribute__(name)

    base = Recording("noise", 3, 0.5)
    wrapper = Wrapper(base)
    assert [getattr(wrapper, field.name) for field in fields(Denoising)] == ["noise", 3, 0.5]
    for name in hooks - parts - {"state_dict", "load_state_dict"}:
        arguments = [object() for _ in list(inspect.signature(getattr(Denoising, name)).parameters)[1:]]
        returned = getattr(wrapper, name)(*arguments)
        assert returned in ((name, tuple(arguments)), None), name  # None: of hooks that return nothing
    assert wrapper.state_dict() == {"base": ("state_dict", ())}


def test_methods_may_share_a_panel():
    lines = [{"step": 1, "gradient_ratio": 1.0, "alignment_gradient_ratio": 2.0}]
    ((title, labels),) = panels(lines)
    assert title == "gradient norm of the added loss / of the denoising loss"
    assert labels == {"structure, at the output": [(1, 1.0)], "alignment, at the tokens": [(1, 2.0)]}
