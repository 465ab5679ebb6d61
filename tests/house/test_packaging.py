"""The layout works the ways people start Python, and a wheel carries everything it needs."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest

pytestmark = pytest.mark.medium


def run(words, cwd, **environment):
    result = subprocess.run(
        [str(w) for w in words], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def packages(repo_root):
    return set(tomllib.loads((repo_root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])


def test_python_c_import_transformers_from_the_root(repo_root):
    out = run(
        [
            sys.executable,
            "-c",
            "import transformers, tokenizers, sidtune.tokenizers.sids.semantic_ids as s\n"
            "print(tokenizers.__file__); print(s.__file__)",
        ],
        repo_root,
    ).split()
    assert "site-packages" in out[0]
    assert os.path.samefile(out[1], repo_root / "tokenizers" / "sids" / "semantic_ids.py")


def test_python_m_pytest_from_the_root(repo_root):
    out = run(
        [sys.executable, "-m", "pytest", "-q", "tests/core/test_core_folders.py", "-p", "no:cacheprovider"], repo_root
    )
    assert "passed" in out


def test_accelerate_launch_m_from_the_root(repo_root):
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "1",
        "--num_machines",
        "1",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    out = run([*launch, "-m", "sidtune.recipes.steps.build_data", "--help"], repo_root)
    assert "--reader" in out


def test_declared_packages_are_the_folders_that_hold_code(repo_root):
    declared = packages(repo_root)
    rooms = [
        "core",
        "data_builders",
        "tokenizers",
        "models",
        "decoding",
        "metrics",
        "trainers",
        "recipes",
        "benchmarks",
    ]
    found = {"sidtune"}
    for room in rooms:
        for file in (repo_root / room).rglob("*.py"):
            if "hf_modules" not in file.parts and "rivals" not in file.parts:  # rivals are not in the wheel
                found.add(".".join(("sidtune", *file.parent.relative_to(repo_root).parts)))
    assert found <= declared, f"add {sorted(found - declared)} to [tool.setuptools] packages"


@pytest.mark.slow
def test_a_wheel_installed_elsewhere_is_complete_and_leaves_the_checkout_alone(repo_root, tmp_path):
    source = tmp_path / "source"
    skip = shutil.ignore_patterns(".git", ".venv", "runs", "build", "dist", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(repo_root, source, ignore=skip)
    run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            tmp_path / "dist",
            source,
        ],
        tmp_path,
    )
    (wheel,) = (tmp_path / "dist").glob("sidtune-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert all(name.startswith(("sidtune/", "sidtune-")) for name in names)
    rooms = {package.split(".")[1] for package in packages(repo_root) if "." in package}
    for path in (path for room in sorted(rooms) for path in (repo_root / room).rglob("*")):
        if path.suffix in (".yaml", ".jinja", ".py", ".md") and not {"__pycache__", "rivals"} & set(path.parts):
            assert f"sidtune/{path.relative_to(repo_root).as_posix()}" in names, f"the wheel lacks {path.name}"
    left_out = ("sidtune/tests", "sidtune/benchmarks/rivals")
    assert "sidtune/py.typed" in names and not any(name.startswith(left_out) for name in names)

    site = tmp_path / "site"
    run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel], tmp_path)
    code = (
        "import sys, importlib, pkgutil, pathlib, sidtune\n"
        "from sidtune.core.scripts import scripts\n"
        "for script in scripts().values():\n"
        "    importlib.import_module(script.module)\n"
        "files = {m.__file__ for n, m in sys.modules.items() if n.split('.')[0] == 'sidtune' and getattr(m, '__file__', None)}\n"
        f"outside = [f for f in files if not f.startswith({str(site)!r})]\n"
        "assert files and not outside, outside\n"
        "print('ok', (pathlib.Path(sidtune.__file__).parent / 'recipes/quickstart/pipeline.yaml').exists())\n"
    )
    assert run([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(site)).strip() == "ok True"
