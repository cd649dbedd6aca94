"""What is published: a wheel and a source distribution that install beside torch and transformers, and nothing else."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PROJECT["tool"]["setuptools"]["packages"]
OPTIONAL = ("triton", "accelerate", "peft", "datasets", "evaluate", "matplotlib", "liger_kernel", "trl")

USE = """
import importlib.util, sys
for name in {optional}:
    assert importlib.util.find_spec(name) is None, name
import torch
import conversion, inspection, modeling_longnet
assert "site-packages" in modeling_longnet.__file__ and sys.prefix in modeling_longnet.__file__, modeling_longnet.__file__
config = modeling_longnet.LongNetConfig(
    vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    segment_lengths=(8, 16), dilation_rates=(1, 2),
)
model, tokens = modeling_longnet.LongNetForCausalLM(config), torch.randint(3, 50, (1, 40))
model(tokens, labels=tokens).loss.backward()
assert model.generate(tokens, max_new_tokens=4, do_sample=False, eos_token_id=None).shape == (1, 44)
model.save_pretrained(sys.argv[1])
"""


def run(command: list, **options) -> str:
    process = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert process.returncode == 0, f"{process.stdout[-2000:]}\n{process.stderr[-3000:]}"
    return process.stdout


def copy_sources(target: Path) -> Path:
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "results", "demo_output")
    return shutil.copytree(ROOT, target, ignore=ignored)


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """Build both from a copy, so that nothing is written beside the sources."""
    copy = copy_sources(tmp_path_factory.mktemp("package") / "source")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", copy.parent / "dist", copy])
    (wheel,) = (copy.parent / "dist").glob("*.whl")
    (source,) = (copy.parent / "dist").glob("*.tar.gz")
    return wheel, source


def environment_without(names: set[str], folder: Path) -> Path:
    """Make an environment with the packages of this one but ``names`` and this project; return its Python."""
    run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"])
    shared = folder / "shared"
    shared.mkdir()
    left_out = {*names, *PACKAGES, "longnet_transformers"}
    for place in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(place).iterdir():
            if entry.name.split("-")[0] not in left_out and entry.suffix != ".pth":
                (shared / entry.name).symlink_to(entry)
    python = folder / "venv" / "bin" / "python"
    site = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
    (site / "shared.pth").write_text(f"{shared}\n")
    return python


@pytest.fixture(scope="module")
def installation(distributions, tmp_path_factory):
    """An environment that has what the wheel needs and none of the optional packages; pip downloads nothing."""
    python = environment_without(set(OPTIONAL), tmp_path_factory.mktemp("environment"))
    start = time.perf_counter()
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    run([*pip, "install", "--no-index", distributions[0]])
    return python, time.perf_counter() - start


def test_the_wheel_holds_the_packages_their_types_and_templates_and_nothing_else(distributions):
    names = zipfile.ZipFile(distributions[0]).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)
    for package in PACKAGES:
        for path in (ROOT / package).glob("*.py"):
            assert f"{package}/{path.name}" in names
    for package in PACKAGES:
        assert f"{package}/py.typed" in names
    for path in (ROOT / "conversion").glob("*.md"):
        assert f"conversion/{path.name}" in names


def test_the_source_distribution_builds_and_carries_licence_and_readme(distributions):
    with tarfile.open(distributions[1]) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert {"LICENSE", "README.md", "pyproject.toml"} <= set(names)
    assert all(f"{package}/__init__.py" in names for package in PACKAGES)


def test_the_version_is_semantic_and_has_an_entry_in_the_changelog(distributions):
    version = PROJECT["project"]["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", version)
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"-{version}-" in distributions[0].name


def test_the_release_workflow_is_one_and_runs_what_exists():
    jobs = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())["jobs"]
    assert list(jobs) == ["check", "build", "publish"]
    assert (jobs["build"]["needs"], jobs["publish"]["needs"]) == ("check", "build")  # nothing is published unchecked
    for job in jobs.values():
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step), step
            assert re.fullmatch(r"[\w-]+/[\w-]+@[\w./]+", step.get("uses", "a/b@c"))
    assert [step["run"] for step in jobs["build"]["steps"] if "run" in step] == ["make build"]
    assert jobs["check"]["steps"][-1]["run"] == ".ci/run" and os.access(ROOT / ".ci/run", os.X_OK)
    targets = re.findall(r"^make (\S+)$", (ROOT / ".ci/run").read_text(), flags=re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert {"lint", "test", "test-oldest", "conformance"} <= set(targets)
    for target in (*targets, "build"):
        assert f"\n{target}:" in makefile, target


def test_all_tests_that_interpret_or_compile_kernels_are_run_where_triton_is():
    recipe = re.search(r"\ntest-kernels: \.venv.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text())[1]
    tests = {f"tests/{path.name}": path.read_text() for path in (ROOT / "tests").glob("test_*.py")}
    needs = re.compile(r"^    interpret\(__file__|^ +from triton\.backends\.compiler import GPUTarget", re.MULTILINE)
    scripts = {name for name, text in tests.items() if needs.search(text)}
    assert len(scripts) > 5 and scripts == set(re.findall(r"tests/test_\S+", recipe))


@pytest.mark.parametrize(
    ("tag", "heading", "released"),
    [("v1.2.3", "## 1.2.3 (2026-12-01)", True), ("v1.2.4", "## 1.2.3 (2026-12-01)", False)]
    + [("v1.2.3", "## 1.2.3 (unreleased)", False), ("v1.2.3", "## 1.2.30 (2026-12-01)", False)],
)
def test_a_release_is_the_version_that_its_tag_names_with_a_date_in_the_changelog(tag, heading, released, tmp_path):
    steps = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())["jobs"]["check"]["steps"]
    (script,) = [step["run"] for step in steps if step.get("name") == "The tag is the version"]
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1.2.3"\n')
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n{heading}\n")
    (tmp_path / "python").symlink_to(sys.executable)
    environment = {**os.environ, "GITHUB_REF_NAME": tag, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]  # as GitHub runs it
    assert (subprocess.run(shell, cwd=tmp_path, env=environment).returncode == 0) == released


def test_the_wheel_installs_quickly_without_a_download_and_runs_without_optional_packages(installation, tmp_path):
    python, seconds = installation
    assert seconds < 60
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    run([python, "-c", USE.format(optional=OPTIONAL), tmp_path / "model"], cwd=tmp_path, env=environment)
    for command in PROJECT["project"]["scripts"]:
        assert "usage" in run([python.parent / command, "--help"], cwd=tmp_path, env=environment)


def test_the_readmes_command_installs_from_a_clone(tmp_path):
    (command,) = re.findall(r"```bash\n(pip install .*?)\n```", (ROOT / "README.md").read_text())
    python = environment_without(set(), tmp_path)
    pip = tmp_path / "pip"
    pip.write_text(f'#!/bin/sh\nexec {sys.executable} -m pip --python {python} "$@"\n')
    pip.chmod(0o755)
    # Everything it asks for is there already: no index, and the build backend of this environment.
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    environment = {**os.environ, **offline, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": ""}
    run(["sh", "-ec", command], cwd=copy_sources(tmp_path / "clone"), env=environment)
    assert PROJECT["project"]["version"] in run([pip, "show", "longnet-transformers"], env=environment)
    assert all((python.parent / script).exists() for script in PROJECT["project"]["scripts"])


def imported_at_once(path: Path) -> set[str]:
    """Packages that importing a file imports: not those inside functions, nor those in a ``try``."""
    found = set()
    for statement in ast.parse(path.read_text()).body:
        if isinstance(statement, ast.Import):
            found |= {name.name.split(".")[0] for name in statement.names}
        elif isinstance(statement, ast.ImportFrom) and not statement.level:
            found.add(statement.module.split(".")[0])
    return found


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=\[ ]", text)[0] for text in requirements}


@pytest.mark.parametrize("package", PACKAGES)
def test_what_a_package_imports_at_once_is_a_declared_dependency(package):
    declared = names(PROJECT["project"]["dependencies"])
    if package == "training":  # for those who installed the extra
        declared |= names(PROJECT["project"]["optional-dependencies"]["finetune"])
    # Files of kernels are imported in a `try`.
    files = [path for path in (ROOT / package).glob("*.py") if not path.stem.endswith("_kernels")]
    imported = set().union(*map(imported_at_once, files)) - set(sys.stdlib_module_names) - set(PACKAGES)
    assert files and imported <= declared
    for name in declared:
        assert importlib.metadata.version(name)
