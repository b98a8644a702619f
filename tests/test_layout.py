"""What may import what, and what would break the standard library."""

import ast
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"slicestore": ROOT / "storage", "equipoise": ROOT / "platform"}
ONLY_IN_LAUNCH = {"ray", "optuna", "optuna_dashboard"}
LAZY = {"wandb", "wandb_workspaces", "plotly", "matplotlib", "tensorboardX", "safetensors", "nibabel"}
"""Imported where they are needed, so that training runs without them."""


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def imports(path: Path, *, top_level_only: bool = False) -> Iterator[str]:
    """Full names of what a file imports."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in tree.body if top_level_only else ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


def roots(path: Path, *, top_level_only: bool = False) -> set[str]:
    return {name.split(".")[0] for name in imports(path, top_level_only=top_level_only)}


@pytest.mark.parametrize("path", files(PACKAGES["slicestore"]), ids=lambda p: p.name)
def test_slicestore_knows_no_torch_no_ray_and_nothing_of_equipoise(path: Path) -> None:
    assert not roots(path) & ({"torch", "equipoise", "wandb"} | ONLY_IN_LAUNCH)


@pytest.mark.parametrize("path", files(PACKAGES["equipoise"]), ids=lambda p: p.name)
def test_only_launch_imports_ray_and_optuna_and_only_the_command_line_imports_launch(path: Path) -> None:
    if path.parent.name == "launch":
        return
    assert not roots(path) & ONLY_IN_LAUNCH
    assert not roots(path, top_level_only=True) & LAZY
    at_import = {n for n in imports(path, top_level_only=True) if n.startswith("equipoise.launch")}
    anywhere = {n for n in imports(path) if n.startswith("equipoise.launch")}
    assert not at_import
    assert not anywhere or path.name in ("cli.py", "predict_cli.py")


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_do_not_import_studies_or_tests(package: str) -> None:
    for path in files(PACKAGES[package]):
        assert not roots(path) & {"studies", "tests"}


def test_everything_but_launch_imports_where_ray_w_and_b_optuna_and_plotly_are_absent() -> None:
    blocked = sorted(ONLY_IN_LAUNCH | LAZY | {"orjson"})
    modules = [
        ".".join(p.relative_to(root).with_suffix("").parts)
        for root in PACKAGES.values()
        for p in files(root)
        if p.parent.name != "launch" and p.name != "__init__.py"
    ]
    script = (
        f"import sys, importlib\nsys.modules.update(dict.fromkeys({blocked!r}))\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("root", ["platform", "storage"])
def test_source_roots_are_no_packages(root: str) -> None:
    assert not (ROOT / root / "__init__.py").exists()
    assert not (ROOT / f"{root}.py").exists()


def test_the_standard_library_s_platform_is_found_from_the_project_s_root() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import platform; print(platform.system())"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == platform.system()


def test_studies_start_nothing_when_imported_and_are_named_after_no_standard_module() -> None:
    studies = files(ROOT / "studies")
    assert not {path.stem for path in studies} & sys.stdlib_module_names
    script = (
        "import runpy, ray\n"
        f"for path in {list(map(str, studies))!r}:\n"
        "    runpy.run_path(path)\n"
        "    assert not ray.is_initialized(), path\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_every_module_is_in_the_readme_s_tree() -> None:
    tree = (ROOT / "README.md").read_text()
    missing = [p.name for root in PACKAGES.values() for p in files(root) if p.name not in tree and p.name[0] != "_"]
    missing += [p.name for p in files(ROOT / "studies") if p.name not in tree]
    assert not missing
