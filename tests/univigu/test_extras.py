"""A missing optional package is reported with the extra that brings it."""

import sys

import pytest

from univigu import mlflow_store
from univigu.errors import ConfigError
from univigu.extras import import_extra
from univigu.training.engine import init_distributed


@pytest.mark.parametrize(
    ("package", "extra", "use"),
    [
        ("mlflow", "pipeline", mlflow_store.quiet_mlflow),
        ("deepspeed", "train", init_distributed),
        ("peft", "train", lambda: import_extra("peft")),
        ("python_multipart", "serve", lambda: import_extra("python_multipart")),
        ("kubernetes", "cluster", lambda: import_extra("kubernetes.client")),
    ],
)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, package, extra, use):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])  # nothing that isn't loaded can be found
    monkeypatch.setattr(sys, "meta_path", [])
    with pytest.raises(ConfigError, match=rf"'{package}' is missing; .*uni-vigu\[{extra}\]"):
        use()


def test_a_package_that_is_installed_but_broken_shows_its_own_error(tmp_path, monkeypatch):
    (tmp_path / "peft.py").write_text("import a_module_that_nobody_has\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "peft", raising=False)
    with pytest.raises(ModuleNotFoundError, match="a_module_that_nobody_has"):
        import_extra("peft")
