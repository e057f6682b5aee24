"""The wheel holds the tree and works elsewhere; imports go down; files and functions are small."""

import ast
import os
import pathlib
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = {"moejax": "moejax", "kernels": "moejax.kernels", "checkpoints": "moejax.checkpoints"}
SOURCES = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))
MODULE_LINES, FUNCTION_LINES = 400, 60

# From the bottom up: a module imports only from its own group and those before it.
GROUPS = {
    "data": "errors layout formats quantise units hardware config state packing",
    "decisions": "policies sampling",
    "mechanism": (
        "supply window experts models detokenize chat text decode live stats drawn generate "
        "speculate probe cycles kernels checkpoints"
    ),
    "analysis": (
        "traces.trace traces.form traces.file traces.importers traces.statistics "
        "traces.synthetic traces.fit simulator planner.machines planner.reuse planner.predict "
        "loss tuning"
    ),
    "edges": (
        "allocator devices measure tiers warm hub orbax_directory runtime loading session "
        "describe doctor terminal bench report distances drafters low_bits "
        "traces.recorder traces.record traces.view traces.perfetto planner.catalogue "
        "planner.layout planner.recommend planner.plan planner.verify "
        "evaluation reports cli __main__"
    ),
}
LEVEL = {name: i for i, names in enumerate(GROUPS.values()) for name in names.split()}
# Leaves that know only how an expert lies in its record.
LEAVES = {
    "kernels": {"errors", "layout"},
    "checkpoints": {"errors", "layout", "formats", "quantise"},
}


def module_of(file):
    folder, *rest = file.relative_to(ROOT).with_suffix("").parts
    name = ".".join([FOLDERS[folder], *rest])
    return name.removesuffix(".__init__")


MODULES = {module_of(file): file for file in SOURCES}


def part_of(module):
    """The part of moejax that a module belongs to: `moejax.models.llama` to `models`."""
    whole = name = module.partition(".")[2]
    while name not in LEVEL and "." in name:
        name = name.rpartition(".")[0]
    return name if name in LEVEL else whole


def imports(file):
    """Every module that a file imports, wherever in it, as absolute names."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return found


def wrong_edges(module, imported):
    """What a module imports although its place does not allow it."""
    part, wrong = part_of(module), []
    for name in sorted(imported):
        root, target = name.split(".")[0], part_of(name)
        if root == "flax" and part != "models":
            wrong.append(f"{module} imports flax: only moejax.models does")
        if root in ("kernels", "checkpoints"):
            wrong.append(f"{module} imports {name}: write moejax.{name}")
        if root != "moejax" or target in ("", part):
            continue
        if part in LEAVES and target not in LEAVES[part]:
            wrong.append(f"{module} imports {name}: {part} knows {sorted(LEAVES[part])} only")
        if part in LEVEL and LEVEL[target] > LEVEL[part]:
            wrong.append(f"{module} imports {name}: imports go down")
    return wrong


def test_every_module_has_a_place():
    spread = {name.rpartition(".")[0] for name in LEVEL}  # packages whose modules lie in several
    assert {part_of(m) for m in MODULES} - spread <= set(LEVEL)


def test_imports_go_down():
    wrong = [w for module, file in MODULES.items() for w in wrong_edges(module, imports(file))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("moejax.state", "moejax.policies.policy"),
        ("moejax.decode", "moejax.runtime"),
        ("moejax.runtime", "flax.linen"),
        ("moejax.runtime", "kernels.reference"),
        ("moejax.kernels.reference", "moejax.state"),
        ("moejax.checkpoints.hf", "moejax.config"),
    ],
)
def test_the_rule_finds_what_it_forbids(module, imported):
    assert wrong_edges(module, {imported})


def test_modules_and_functions_are_small():
    wrong = []
    for file in SOURCES:
        text = file.read_text()
        if len(text.splitlines()) >= MODULE_LINES:
            wrong.append(f"{file.relative_to(ROOT)}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and _lines(node) >= FUNCTION_LINES:
                wrong.append(f"{file.relative_to(ROOT)}: {node.name} has {_lines(node)} lines")
    assert not wrong, "\n".join(wrong)


def _lines(function):
    """Lines of a function without its docstring."""
    text = ast.get_docstring(function, clean=False)
    return function.end_lineno - function.lineno + 1 - (len(text.splitlines()) if text else 0)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    copy_tree(source)
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--wheel",
        "--outdir",
        target,
        source,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [built] = target.glob("*.whl")
    return built


def copy_tree(target):
    """Copy what the wheel is built from, so that the build leaves nothing in the tree."""
    import shutil

    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, target / folder, ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target / name)


def wanted_files():
    """Paths in the wheel of everything under the three folders but caches."""
    return {
        pathlib.PurePosixPath(FOLDERS[folder].replace(".", "/"), *file.relative_to(ROOT).parts[1:])
        for folder in FOLDERS
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }


def test_the_wheel_holds_the_tree_and_nothing_else(wheel):
    names = {pathlib.PurePosixPath(name) for name in zipfile.ZipFile(wheel).namelist()}
    packed = {name for name in names if not name.parts[0].endswith(".dist-info")}
    assert packed == wanted_files()
    assert wheel.name.endswith("-py3-none-any.whl")


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
    """A folder with the wheel installed, in which nothing of the working tree can be seen."""
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", target]
    done = subprocess.run([*command, wheel], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def test_a_clone_that_is_not_installed_says_what_to_do():
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import moejax"
    done = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True)
    assert done.returncode and "pip install -e" in done.stderr


def elsewhere(installed, *arguments):
    """Run Python with the installed wheel, far from the repository."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=installed.parent,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_installed_command_answers(installed):
    assert "generate" in elsewhere(installed, "-m", "moejax", "--help")


def test_the_installed_library_is_the_one_that_runs(installed):
    program = (
        "import moejax.checkpoints.bank as b, moejax.kernels as k; print(b.__file__, k.__file__)"
    )
    files = elsewhere(installed, "-c", program).split()
    assert all(pathlib.Path(file).is_relative_to(installed) for file in files)


def test_the_installed_embedded_model_writes(installed):
    program = (
        "import moejax\nr = moejax.load('tiny', slots=76, context=128)\n"
        "print(r.directory, len(r.generate('The old house', 8)[0].tokens))"
    )
    directory, tokens = elsewhere(installed, "-c", program).split()
    assert pathlib.Path(directory).is_relative_to(installed) and tokens == "8"


def test_pytrees_of_different_types_never_share_a_program():
    """Their structures differ, also where their fields do not: `jit` looks programs up by them."""
    import jax

    from moejax.policies import presets
    from moejax.policies.eviction import LRU
    from moejax.policies.evictors import LFU, LeastStale
    from moejax.policies.placement import FetchAll, HostAll

    structures = [jax.tree.structure(part()) for part in (LRU, LFU, LeastStale, FetchAll, HostAll)]
    structures += [jax.tree.structure(make()) for make in presets.PRESETS.values()]
    for i, one in enumerate(structures):
        assert one == one and all(one != other for other in structures[i + 1 :])
