"""What is shipped with the toy backbones is found: keys of folders on disk follow from today's options."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from unike.config.combined import KnowledgeKeyOptions
from unike.config.hparams import HyperParams
from unike.config.schema import list_own_options
from unike.config.scope_sections import ScopeTrainingOptions
from unike.config.sections import EditorTrainingOptions
from unike.datasets.triplets import Triplet
from unike.methods.preparation import folders, knowledge
from unike.methods.preparation.folders import hash_facts
from unike.system.files import read_index
from unike.types import Query

ROOT = Path(__file__).parents[1]
TINY = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "hparams").glob("**/tiny_*.yaml"))
EDITORS = [name for name in TINY if name.split("/")[1] in ("ke", "mend", "serac", "serac_multimodal")]


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> HyperParams:
    monkeypatch.chdir(ROOT)
    return HyperParams.from_hparams(name)


@pytest.mark.parametrize("name", EDITORS)
def test_shipped_editors_are_found_under_their_key(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hparams = load(name, monkeypatch)
    folder = folders.find_editor(hparams)
    assert folder is not None
    index = read_index(folder / "editor.json")
    facts = {k: index[k] for k in ("backbone", "layers")} | {"options": folders.list_editor_options(hparams)}
    assert hash_facts(facts) == folder.name
    other = replace(hparams, editor_rank=hparams.editor_rank + 1)
    assert folders.find_editor(other) is None


@pytest.mark.parametrize("name", [name for name in TINY if "/scoped/" in name])
def test_shipped_scope_classifiers_are_found_under_their_key(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hparams = load(name, monkeypatch)
    folder = folders.find_scope_classifier(hparams)
    assert folder is not None
    index = read_index(folder / "scope.json")
    facts = folders.describe_scope(hparams) | {k: index[k] for k in ("backbone", "layer")}
    assert hash_facts(facts) == folder.name
    assert folders.find_scope_classifier(replace(hparams, scope_lr=1.0)) is None


@pytest.mark.parametrize("name", [name for name in TINY if name.count("/") == 1])
def test_shipped_knowledge_fits_todays_options(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hparams = load(name, monkeypatch)
    index = json.loads(Path(str(hparams.knowledge_dir), "knowledge.json").read_text("utf-8"))
    options = knowledge._list_options(hparams)
    assert list(options.items()) == list(index["options"].items()), "their order is part of checksums"


class Fingerprint:
    fingerprint = "of some weights"


def test_the_key_of_knowledge_is_what_it_was() -> None:
    options = KnowledgeKeyOptions(layers=2, triplets=8, encoder_steps=3, encoder_lr=1e-3, seed=5)
    triplets = [
        Triplet(Query("folder/a.png", "what?", "this"), "that"),
        Triplet(Query(None, "and?", "it"), None),
    ]
    key = knowledge.compute_knowledge_key(Fingerprint(), triplets, options)  # type: ignore[arg-type]
    assert key == "1d853464197e3a50"


@pytest.mark.parametrize(
    ("section", "names"),
    [
        (EditorTrainingOptions, {"method", "own", "clip_norm", "seed", "editor_rank", "serac_scope"}),
        (ScopeTrainingOptions, {"seed", "scope_dim", "scope_tau"}),
    ],
)
def test_a_section_holds_its_own_options_and_those_that_it_takes(section: type, names: set[str]) -> None:
    held = {name for name in dir(section(seed=1)) if not name.startswith("_")}
    assert names <= held
    assert "seed" not in list_own_options(section)
    assert "k" not in held
