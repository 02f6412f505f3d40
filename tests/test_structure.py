"""What a linter cannot say of the package's structure."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dist_lamb

PACKAGE = Path(dist_lamb.__file__).parent
#: the files that may use private APIs of torch and of Triton, each with what happens without them
PRIVATE = {"_torch_private.py", "_triton_private.py"}


def _dotted(node: ast.AST) -> str:
    """``torch.a.b`` of an attribute access; "" if it does not begin with a name."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(names)]) if isinstance(node, ast.Name) else ""


def _torch_names(source: str) -> Iterator[str]:
    """Every dotted name of torch or Triton that a module imports or uses."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield _dotted(node)


def _private(name: str) -> bool:
    root, *parts = name.split(".")
    return root in ("torch", "triton") and any(
        part.startswith("_") and not part.startswith(("_foreach_", "__")) for part in parts
    )


#: attributes of torch's objects that begin with an underscore, and methods that are not documented
PRIVATE_ATTRIBUTES = {
    "_version",
    "_local_tensor",
    "_spec",
    "_fsdp_flattened",
    "_compiled_call_impl",
    "_execution_engine",
    "_get_backend",
    "_optimizer_step_pre_hooks",
}


def test_private_apis_are_in_one_file_each() -> None:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name in PRIVATE or "deepspeed_adapter" in path.parts:
            continue
        source = path.read_text()
        where = path.relative_to(PACKAGE)
        found += [f"{where}: {name}" for name in _torch_names(source) if _private(name)]
        found += [
            f"{where}: {node.attr}"
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Attribute) and node.attr in PRIVATE_ATTRIBUTES
        ]
    assert not found, found


def test_the_check_sees_private_names() -> None:
    source = "import torch._C\nfrom torch._inductor import x\ntorch._dynamo.reset()\n"
    found = set(filter(_private, _torch_names(source)))
    assert found == {"torch._C", "torch._inductor.x", "torch._dynamo.reset", "torch._dynamo"}
    assert not any(map(_private, _torch_names("torch._foreach_add_([], 1)\ntorch.nn.Module()")))


def test_files_have_one_idea_each() -> None:
    long = {
        str(path.relative_to(PACKAGE)): lines
        for path in PACKAGE.rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > 450
    }
    assert not long


def test_importing_it_is_cheap() -> None:
    """Nothing is a DTensor before somebody imports the module, which takes longer than all else."""
    program = (
        "import sys, torch; before = set(sys.modules); import dist_lamb; "
        "print(*{name.split('.')[0] for name in sys.modules if name not in before}, "
        "'torch.distributed.tensor' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    *loaded, tensor = done.stdout.split()
    assert tensor == "False"
    assert not {"sympy", "triton", "deepspeed"} & set(loaded), loaded


#: what makes a tensor of nothing or of numbers, and the keywords without which torch's default
#: device and dtype decide
FACTORIES = {
    **{
        n: {"device", "dtype"}
        for n in ("zeros", "ones", "empty", "empty_strided", "full", "tensor")
    },
    **{n: {"device"} for n in ("arange", "as_tensor", "linspace", "rand", "randn")},
}


def test_no_tensor_is_made_with_a_default_device_or_dtype() -> None:
    """``torch.set_default_device`` and ``set_default_dtype`` are the model's business."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            root, _, name = _dotted(node.func).partition(".")
            if root == "torch" and name in FACTORIES:
                missing = FACTORIES[name] - {keyword.arg for keyword in node.keywords}
                if missing:
                    found.append(f"{path.name}:{node.lineno} {name} without {sorted(missing)}")
    assert not found, found
