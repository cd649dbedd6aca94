"""What is exported says what it takes and gives: shapes, units, errors."""

import inspect
import re

import pytest
from transformers import PreTrainedModel

import conversion
import inspection
import modeling_longnet
import training


EXPORTED = {
    f"{package.__name__}.{name}": getattr(package, name)
    for package in (modeling_longnet, conversion, training, inspection)
    for name in package.__all__
}
FUNCTIONS = {name: value for name, value in EXPORTED.items() if inspect.isfunction(value)}


def section(text: str, title: str) -> str:
    """Return one section of a docstring, empty if it has none."""
    found = re.search(rf"^{title}:\n((?:    .*\n?|\n)+)", text, flags=re.MULTILINE)
    return found[1] if found else ""


def described(text: str) -> set[str]:
    """Name the arguments that a docstring explains; one line may explain several."""
    heads = re.findall(r"^    (\*{0,2}\w+(?:, \w+)*): ", section(text, "Args"), flags=re.MULTILINE)
    return {name.strip("*") for head in heads for name in head.split(", ")}


def arguments(exported: object) -> set[str]:
    """Name what a caller may pass, but for what another library's base class explains."""
    bases = exported.__bases__ if inspect.isclass(exported) else ()
    inherited = {name for base in bases if base is not object for name in inspect.signature(base).parameters}
    return set(inspect.signature(exported).parameters) - inherited


@pytest.mark.parametrize("name", EXPORTED)
def test_it_says_in_one_line_what_it_is_and_explains_each_argument(name):
    text = inspect.getdoc(EXPORTED[name])
    assert text and re.match(r"[A-Z`].*[.:](\n\n|$)", text), text
    if not (inspect.isclass(EXPORTED[name]) and issubclass(EXPORTED[name], PreTrainedModel)):
        assert arguments(EXPORTED[name]) <= described(text) | {"kwargs", "args"}, name


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_says_what_it_returns_and_what_it_refuses(name):
    text, annotation = inspect.getdoc(FUNCTIONS[name]), inspect.signature(FUNCTIONS[name]).return_annotation
    gives = section(text, "Returns") or section(text, "Yields")
    # A context manager yields nothing worth a word.
    assert gives or annotation is None or "contextmanager" in inspect.getsource(FUNCTIONS[name]), name
    assert section(text, "Raises") or name in ("modeling_longnet.gather_sequence", "modeling_longnet.stream"), name


@pytest.mark.parametrize("name", ["dilated_attention", "gather_sequence", "stream", "prefill_sequence"])
def test_a_function_of_tensors_names_their_shapes(name):
    assert re.search(r"``[^`\n]*\[B, [^`\n]*\]``", inspect.getdoc(getattr(modeling_longnet, name)))


def test_what_computes_the_papers_formula_names_the_equation():
    for exported in (modeling_longnet.dilated_attention, modeling_longnet.DilationPattern):
        assert "Eq. 9-10" in inspect.getdoc(exported)
