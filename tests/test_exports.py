"""What ``import hf_wmguard`` promises."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
import types

import pytest

import hf_wmguard


@pytest.mark.parametrize("name", hf_wmguard.__all__)
def test_every_exported_name_is_there(name: str) -> None:
    assert getattr(hf_wmguard, name) is not None


def test_exports_are_listed_once_and_sorted() -> None:
    assert len(set(hf_wmguard.__all__)) == len(hf_wmguard.__all__)
    assert dir(hf_wmguard) == sorted(hf_wmguard.__all__)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        hf_wmguard.no_such_name  # noqa: B018


def test_functions_are_not_shadowed_by_modules() -> None:
    # Importing a submodule binds it on the package under its own name: none may have the name of an export.
    for module in pkgutil.walk_packages(hf_wmguard.__path__, "hf_wmguard."):
        importlib.import_module(module.name)
    from hf_wmguard import embed, probe, protect_trainer, verify

    for function in (embed, probe, protect_trainer, verify):
        assert isinstance(function, types.FunctionType)
    assert hf_wmguard.verify.__module__ == "hf_wmguard.verification"
    assert {
        module.name.split(".")[1] for module in pkgutil.walk_packages(hf_wmguard.__path__, "hf_wmguard.")
    }.isdisjoint(hf_wmguard.__all__)


def test_importing_the_package_imports_nothing_heavy() -> None:
    script = "import sys, hf_wmguard; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
