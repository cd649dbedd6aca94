"""The imports, read from the source: which file may know which, and what saved checkpoints can carry."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest


ROOT = Path(__file__).parents[1]
PACKAGE = {path.stem: path for path in sorted((ROOT / "modeling_longnet").glob("*.py"))}
CONVERSION = {path.stem: path for path in sorted((ROOT / "conversion").glob("*.py"))}

BACKENDS = {"dilated_attention_eager", "dilated_attention_torch", "dilated_attention_triton"} & set(PACKAGE)
OPERATOR = {name for name in PACKAGE if name.startswith("dilated_attention")}
# What may know transformers; every other file is the operator's or pure arithmetic. __init__ registers the classes.
TRANSFORMERS_FILES = {
    "__init__",
    "__main__",
    "attention_longnet",
    "backbone_llama",
    "backbone_magneto",
    "cache_layer",
    "cache_longnet",
    "configuration_longnet",
    "decoding_graph",
    "decoding_step",
    "decoding_token",
    "liger_layers",
    "modeling_longnet",
    "registered_names",
    "sequence_prefill",
    "rotary_longnet",
    "token_layout",
    "token_stream",
    "trainer_longnet",
}
# Saved checkpoints carry every file but __init__, and transformers refuses them where an unguarded import fails.
SHIPPED = sorted(set(PACKAGE) - {"__init__"})
every_shipped_file = pytest.mark.parametrize("name", SHIPPED)


class Import(NamedTuple):
    """One imported module or name.

    ``level`` is the number of leading dots, ``names`` what a ``from`` import takes, ``guarded`` whether a ``try``
    around it catches ``ImportError``.
    """

    module: str
    level: int
    names: tuple[str, ...]
    guarded: bool
    line: int

    @property
    def root(self) -> str:
        return self.module.partition(".")[0]


def imports(path: Path) -> list[Import]:
    """List the imports that run, at any depth: those for type checkers alone are left out."""
    return list(_walk(ast.parse(path.read_text()), guarded=False))


def _walk(node: ast.AST, guarded: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(alias.name, 0, (), guarded, node.lineno)
    elif isinstance(node, ast.ImportFrom):
        names = tuple(alias.name for alias in node.names)
        yield Import(node.module or "", node.level, names, guarded, node.lineno)
    elif isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        for child in node.orelse:
            yield from _walk(child, guarded)
    elif isinstance(node, ast.Try):
        for child in node.body:
            yield from _walk(child, guarded or any(_catches_import_error(handler) for handler in node.handlers))
        for child in (*node.handlers, *node.orelse, *node.finalbody):
            yield from _walk(child, guarded)
    else:
        for child in ast.iter_child_nodes(node):
            yield from _walk(child, guarded)


def _catches_import_error(handler: ast.ExceptHandler) -> bool:
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(isinstance(x, ast.Name) and x.id in ("ImportError", "ModuleNotFoundError") for x in caught)


def siblings(name: str, files: dict[str, Path]) -> set[str]:
    """Name the files that one file of a package imports."""
    return {found.module for found in imports(files[name]) if found.level == 1} & set(files)


def everything_behind(name: str, files: dict[str, Path]) -> set[str]:
    """Name the files that importing one file loads, itself included."""
    reached, waiting = set(), [name]
    while waiting:
        current = waiting.pop()
        if current not in reached:
            reached.add(current)
            waiting += siblings(current, files)
    return reached


def third_party(name: str, files: dict[str, Path]) -> set[str]:
    return {found.root for found in imports(files[name]) if not found.level} - set(sys.stdlib_module_names)


def test_the_mathematics_of_the_pattern_knows_nothing():
    assert siblings("dilation_pattern", PACKAGE) == set()
    assert third_party("dilation_pattern", PACKAGE) == set()


@pytest.mark.parametrize("name", sorted(set(PACKAGE) - TRANSFORMERS_FILES))
def test_only_configuration_modeling_cache_and_trainer_know_transformers(name):
    for behind in everything_behind(name, PACKAGE):
        assert third_party(behind, PACKAGE) <= {"torch", "triton", "liger_kernel"}, behind


@pytest.mark.parametrize("name", sorted(PACKAGE))
def test_the_package_needs_its_declared_dependencies_only(name):
    unguarded = {found.root for found in imports(PACKAGE[name]) if not found.level and not found.guarded}
    assert unguarded - set(sys.stdlib_module_names) <= {"torch", "transformers", "safetensors", "huggingface_hub"}


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_backends_know_neither_one_another_nor_who_chooses_them(backend):
    assert len(BACKENDS) >= 2
    assert everything_behind(backend, PACKAGE) & (BACKENDS | {"dilated_attention"}) == {backend}


@pytest.mark.parametrize("name", sorted(OPERATOR))
def test_the_operator_knows_nothing_of_the_models(name):
    assert everything_behind(name, PACKAGE) & TRANSFORMERS_FILES == set()


@pytest.mark.parametrize("files", [PACKAGE, CONVERSION], ids=["modeling_longnet", "conversion"])
def test_arrows_point_one_way(files):
    for name in files:
        behind = set().union(*(everything_behind(sibling, files) for sibling in siblings(name, files)))
        assert name not in behind, f"{name} imports itself through {sorted(siblings(name, files))}"


def test_nothing_below_the_model_knows_the_model():
    users = {name for name in PACKAGE if "modeling_longnet" in siblings(name, PACKAGE)}
    assert users <= {"__init__", "__main__", "trainer_longnet"}


@every_shipped_file
def test_triton_is_imported_only_inside_a_try_of_its_own_files(name):
    for found in imports(PACKAGE[name]):
        if found.root == "triton":
            assert name.endswith(("_kernels", "_triton", "_hopper"))
            assert found.guarded, f"{name}.py:{found.line}"


@every_shipped_file
def test_siblings_are_imported_as_saved_checkpoints_can_follow(name):
    """Only ``from .name import x``: transformers flattens the package and finds nothing else."""
    for found in imports(PACKAGE[name]):
        where = f"{name}.py:{found.line}"
        assert found.level <= 1, where
        assert found.root not in ("modeling_longnet", "importlib") or found.level == 1, where
        if found.level == 1:
            assert found.module in SHIPPED, f"{where}: needs the form `from .name import x` of a file beside it"


@every_shipped_file
def test_no_text_looks_like_an_import_of_a_sibling(name):
    """transformers finds the files to copy by these expressions, line by line, docstrings included."""
    text = PACKAGE[name].read_text()
    found = re.findall(r"^\s*import\s+\.(\S+)\s*$", text, flags=re.MULTILINE)
    found += re.findall(r"^\s*from\s+\.(\S+)\s+import", text, flags=re.MULTILINE)
    assert set(found) == siblings(name, PACKAGE)


def test_the_model_package_is_flat():
    assert [path.name for path in (ROOT / "modeling_longnet").rglob("*.py") if path.stem not in PACKAGE] == []
    assert [path.name for path in (ROOT / "modeling_longnet").iterdir() if path.is_dir()] in ([], ["__pycache__"])


def public_names() -> set[str]:
    """Read ``__all__`` from the package's source."""
    for node in ast.parse(PACKAGE["__init__"].read_text()).body:
        if isinstance(node, ast.Assign) and [target.id for target in node.targets] == ["__all__"]:
            return set(ast.literal_eval(node.value))
    raise AssertionError("modeling_longnet/__init__.py has no __all__")


# Rules that the model and its conversion share, and that are written once: no names for users.
SHARED_RULES = {
    ("modeling_longnet.modeling_longnet", "AUTO_MAP"),
    ("modeling_longnet.token_layout", "documents_from_position_ids"),
}


@pytest.mark.parametrize("name", sorted(CONVERSION))
def test_conversion_uses_public_names_and_shared_rules_only(name):
    tree = ast.parse(CONVERSION[name].read_text())
    for found in imports(CONVERSION[name]):
        if found.root == "modeling_longnet" and not {(found.module, x) for x in found.names} <= SHARED_RULES:
            assert found.module == "modeling_longnet", f"{name}.py:{found.line}: {found.module}"
            assert set(found.names) <= public_names(), f"{name}.py:{found.line}"
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "modeling_longnet"
        ):
            allowed = public_names() | {"__file__", "__name__", "__path__"}
            assert node.attr in allowed, f"{name}.py:{node.lineno}: {node.attr}"


def test_every_shared_rule_is_shared():
    taken = {(x.module, name) for path in CONVERSION.values() for x in imports(path) for name in x.names}
    assert taken >= SHARED_RULES


@pytest.mark.parametrize("name", ["convert", "families", "verify"])
def test_conversion_does_not_know_its_command_line(name):
    behind = everything_behind(name, CONVERSION)
    assert not behind & {"cli", "__main__"}
    if name != "convert":
        assert "convert" not in behind


@pytest.mark.parametrize("name", sorted(PACKAGE))
def test_the_model_package_knows_nothing_of_the_rest(name):
    assert not third_party(name, PACKAGE) & {"conversion", "training", "tests", "examples", "benchmarks"}


def test_the_oracle_shares_no_code_with_the_package():
    assert {found.root for found in imports(Path(__file__).parent / "oracle.py")} <= {"torch"} | set(
        sys.stdlib_module_names
    )


SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py")) + sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_import_what_exists(script):
    """Those that need a GPU are run nowhere else in the tests, and import some of it only where they need it."""
    for found in ast.walk(ast.parse(script.read_text())):
        if not isinstance(found, ast.ImportFrom):
            continue
        source = ROOT / f"{found.module.replace('.', '/')}.py"
        source = source if source.exists() else script.with_name(source.name)
        if source.exists():
            missing = {alias.name for alias in found.names} - names_bound_in(source)
            assert not missing, f"{script.name} imports {missing}, which {source.name} does not define"


def names_bound_in(path: Path) -> set[str]:
    """All names that a file binds outside functions and classes."""
    bound, waiting = set(), list(ast.parse(path.read_text()).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(node.name)
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.add(node.id)
        waiting += ast.iter_child_nodes(node)
    return bound
