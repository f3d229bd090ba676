"""Copies what a wheel has besides the code into the build's ``unike/shipped``; all else is in pyproject.toml.

The repository keeps these files at its top. An editable installation reads them there.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
# What is named here and in MANIFEST.in is all that a wheel takes of these folders: a clone has downloaded
# checkpoints, trained editors and drawn data next to them.
SHIPPED = (
    "hparams/**/*.yaml",
    "hugging_cache/tiny-blip2-opt/**/*",
    "hugging_cache/tiny-minigpt4/**/*",
    "data/example/**/*",
    # Commands of a checkout that ``unike`` starts, and the drawing code, with what these import.
    *(f"scripts/{name}.py" for name in ("__init__", "base_styles", "pages", "plan", "plan_file", "prepare")),
    *(f"scripts/{name}.py" for name in ("tables", "trainings", "workers")),
    "scripts/tiny/*.py",
    "scripts/tiny/objects.tsv",
)


class BuildWithShippedFiles(build_py):
    """Builds the package, and ``unike/shipped`` in the build folder alone."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib, "unike", "shipped")
        # What a former build left there.
        shutil.rmtree(target, ignore_errors=True)
        for path in list_shipped():
            copy = target / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def list_shipped() -> list[Path]:
    """The files of ``SHIPPED``; FileNotFoundError for a pattern that finds none."""
    found = []
    for pattern in SHIPPED:
        paths = sorted(path for path in ROOT.glob(pattern) if path.is_file())
        if not paths:
            raise FileNotFoundError(f"{pattern}: no such file in {ROOT}")
        found += paths
    return found


setup(cmdclass={"build_py": BuildWithShippedFiles})
