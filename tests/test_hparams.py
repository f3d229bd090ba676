"""Configuration files: what loads, and what is said about what does not."""

import contextlib
import dataclasses
import logging
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unike.config import combined
from unike.config.hparams import OPTIONS, HyperParams, UniKEHyperParams
from unike.config.options import SECTIONS
from unike.config.release import read_edited_layers
from unike.config.schema import Section, list_own_options
from unike.config.sections import EncoderOptions
from unike.types import BACKBONES, METRIC_PRESETS, TRACKERS, BackboneSpec, UserError

RELEASE = Path(__file__).parent / "fixtures" / "release_minigpt4.yaml"
BASE = {"model_name": "blip2", "name": "./cache/blip2"}

texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1).filter(str.strip)


def values_of(option):
    """Lawful values of an option, in the type that the dataclass holds."""
    special = {
        "method": texts.map(str.lower).filter(lambda name: name == name.lower()),
        "layers": st.integers(1, 99) | st.sets(st.integers(0, 99), min_size=1).map(sorted).map(tuple),
        "alpha": st.just("adaptive") | st.floats(0, 1),
        "edit_batch_size": st.just("auto") | st.integers(1, 99),
        "device": st.sampled_from(["auto", "cpu", "cuda", "cuda:0", "cuda:12"]),
        "log_to": st.sets(st.sampled_from(TRACKERS)).map(sorted).map(tuple),
        "metric_presets": st.sets(st.sampled_from(METRIC_PRESETS), min_size=1).map(sorted).map(tuple),
        "data": st.dictionaries(
            st.sampled_from(["vqa", "caption"]),
            st.dictionaries(st.sampled_from(["train", "eval"]), st.none() | texts),
        ),
    }
    kind, limits = option.kind, option.kind.range
    low = 0 if limits.low is None else limits.low
    high = 10**6 if limits.high is None else limits.high
    by_noun = {
        "text": texts,
        "a whole number": st.integers(int(low), int(high)),
        "a number": st.floats(low, high, exclude_min=limits.above, allow_subnormal=False),
        "true or false": st.booleans(),
        "a mapping of names to values": st.dictionaries(texts, st.integers() | texts | st.none(), max_size=3),
    }
    found = st.sampled_from(kind.choices) if kind.choices else special.get(option.name)
    found = by_noun[kind.noun] if found is None else found
    return st.none() | found if kind.nullable else found


# Both off edits nothing, which is refused and tested by itself.
configurations = st.fixed_dictionaries(
    {name: values_of(option) for name, option in OPTIONS.items() if option.required},
    optional={n: values_of(o) for n, o in OPTIONS.items() if not o.required and n != "intrinsic"},
)


def problems_of(call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    return caught.value.problems


def write(folder, text):
    path = folder / "h.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def plain(values):
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=configurations)
def test_a_file_an_override_and_a_dict_load_the_same(tmp_path, values):
    path = write(tmp_path, yaml.safe_dump(plain(values), allow_unicode=True))
    loaded = HyperParams.from_hparams(path)
    overrides = [
        f"{name}={yaml.safe_dump(value, default_flow_style=True, width=10**6)}"
        for name, value in plain(values).items()
    ]
    assert loaded == HyperParams.from_dict(BASE, overrides=overrides) == HyperParams(**values)
    assert loaded == HyperParams.from_dict(loaded.to_dict())
    assert {name: getattr(loaded, name) for name in values} == values


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=40) | st.text("{}[]:,&*!|>'\"%@` -\n~<0x_1ae.", max_size=30))
def test_any_text_gives_values_or_a_user_error(tmp_path, text):
    path = tmp_path / "h.yaml"
    path.write_bytes(text.encode("utf-8", "replace"))
    for problem in problems_of(HyperParams.from_hparams, path):
        assert problem.startswith(str(path))
    with contextlib.suppress(UserError):
        assert HyperParams.from_dict(BASE, overrides=[f"k={text}"]).k >= 1


def test_defaults_are_the_paper_preset():
    h = HyperParams.from_dict(BASE)
    assert (h.method, h.layers, h.n_keys, h.k, h.alpha, h.memory) == ("unike", 4, 10, 40, "adaptive", "both")
    assert (h.scope_gate, h.tau, h.similarity_bias, h.include_anchor) == ("none", None, 0.0, False)
    assert (h.zeta, h.external, h.attention, h.lr) == ("truthfulness", "latent", "projected", 2e-3)
    assert UniKEHyperParams is HyperParams


def test_backbone_spec(tmp_path):
    path = write(tmp_path, "model_name: MiniGPT4\nname: ./a/b\ndevice: 1\nvision_config: {depth: 2}\n")
    assert HyperParams.from_hparams(path).backbone == BackboneSpec(
        "minigpt4", "./a/b", device="cuda:1", vision_config={"depth": 2}, source=str(path)
    )


def test_all_problems_are_named_at_once(tmp_path):
    path = write(
        tmp_path, "model_name: blip\nlr: abc\nlr: 1\nlayrs: 3\nk: 0\nalpha: 2\nbeta: true\n1: 2\nrank: 3\n"
    )
    found = problems_of(HyperParams.from_hparams, path, ["memory=foo", "zz", "seed=[", "image_size=1e3"])
    at = str(path)
    assert found == (
        f"{at}:3: lr: given twice, first in line 2",
        f"{at}: zz: expected key=value",
        next(problem for problem in found if problem.startswith(f"{at}: seed: not valid YAML")),
        f"{at}:1: model_name: expected one of {', '.join(BACKBONES)}, got str 'blip'",
        f"{at}:4: layrs: unknown key; the nearest known key is layers",
        f"{at}:5: k: expected a whole number at least 1, got int 0",
        f"{at}:6: alpha: expected adaptive or a number between 0 and 1, got int 2",
        f"{at}:7: beta: expected a number at least 0, got bool True",
        next(problem for problem in found if problem.startswith(f"{at}: 1: unknown key")),
        f"{at}:9: rank: unknown key; it belongs to the UniKE release's own file, "
        "which Python reads: HyperParams.from_hparams(file, legacy=True)",
        f"{at} (override): memory: expected one of edit, bank, both, got str 'foo'",
        f"{at} (override): image_size: expected a whole number between 1 and 8192 or null, got str '1e3'",
        f"{at}: name: missing; expected text (Hugging Face folder or hub name of the model or its "
        "language model)",
    )


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        ("name", ["", "  ", 3, None, ["a"]]),
        ("k", [1.0, "40", True, None, -1]),
        ("lr", [0, "abc", "nan", "inf", float("nan"), float("inf"), True, "1_0", 10**400, None, [1]]),
        ("tau", [1.5, -2, "x"]),
        ("intrinsic", ["yes", 1, None]),
        ("layers", [0, -1, [], [1, 1], [-1], ["a"], True, 2.0, "4", None]),
        ("alpha", ["adaptiv", -0.1, 1.1, True, None]),
        ("edit_batch_size", [0, -3, "all", 1.0, True, None]),
        ("device", ["cuda:", "cuda:x", "gpu", -1, True, 1.0]),
        ("dtype", ["fp16", None, 16]),
        ("seed", [-1, 2**32]),
        ("vision_config", [None, [], {1: 2}, "a"]),
        ("data", [{"vqaa": {}}, {"vqa": "a.json"}, {"vqa": {"test": "a"}}, {"vqa": {"train": 3}}, None]),
    ],
)
def test_wrong_values(key, wrong):
    for value in wrong:
        (problem,) = problems_of(HyperParams.from_dict, BASE | {key: value}, "f.yaml")
        assert problem.startswith(f"f.yaml: {key}: expected ")
        (direct,) = problems_of(HyperParams, **(BASE | {key: value}))
        assert direct.startswith(f"hparams: {key}: expected ")


def test_numbers_that_yaml_reads_as_text(tmp_path):
    h = HyperParams.from_hparams(write(tmp_path, "model_name: blip2\nname: x\nlr: 1e-4\nclip_norm: 3\n"))
    assert (h.lr, h.clip_norm) == (1e-4, 3.0)
    assert isinstance(h.clip_norm, float)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        ("- a\n", "expected lines of `key: value`"),
        ("a: [", "not valid YAML"),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
        ("a: 2024-99-99\n", "not valid YAML"),
        ("a: !!python/object:os.system x\n", "not valid YAML"),
        ("a: \x07\n", "not valid YAML"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, text, said):
    (problem,) = problems_of(HyperParams.from_hparams, write(tmp_path, text))
    assert said in problem


def test_paths_that_are_no_file(tmp_path):
    assert "no such file" in problems_of(HyperParams.from_hparams, tmp_path / "no.yaml")[0]
    assert "is a folder" in problems_of(HyperParams.from_hparams, tmp_path)[0]
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9\n")
    assert "cannot be read as text" in problems_of(HyperParams.from_hparams, tmp_path / "latin.yaml")[0]


def test_nested_overrides_change_one_entry(tmp_path):
    path = write(tmp_path, "model_name: blip2\nname: x\ndata: {vqa: {train: a, eval: b}}\n")
    h = HyperParams.from_hparams(path, ["data.vqa.eval=c", "data.caption.eval=d", "vision_config.depth=3"])
    assert h.data == {"vqa": {"train": "a", "eval": "c"}, "caption": {"eval": "d"}}
    assert h.vision_config == {"depth": 3}
    found = problems_of(HyperParams.from_hparams, path, ["data.vqa.tes=c", "k.x=3"])
    assert [problem.split(": ")[1] for problem in found] == ["data", "k"]


def test_aliases(tmp_path):
    path = write(tmp_path, "model_name: blip2\nname: x\nalg_name: FT\ncoco_image: i\nrephrase_image: r\n")
    h = HyperParams.from_hparams(path)
    assert (h.method, h.image_root, h.rephrase_root) == ("ft", "i", "r")
    assert HyperParams.from_hparams(path, ["alg_name=MEND"]).method == "mend"
    (problem,) = problems_of(
        HyperParams.from_hparams, write(tmp_path, "model_name: blip2\nname: x\nalg_name: 3")
    )
    assert problem.startswith(f"{path}:3: method: expected the name")
    (problem,) = problems_of(HyperParams.from_dict, BASE | {"method": "ft", "alg_name": "ft"})
    assert "another name of method" in problem


def test_merge_keys_repeat_lawfully_and_nested_repeats_do_not(tmp_path):
    head = "model_name: blip2\nname: x\n"
    merged = head + "vision_config: &v {depth: 2, width: 3}\nqformer_config: {<<: *v, depth: 4}\n"
    h = HyperParams.from_hparams(write(tmp_path, merged))
    assert h.qformer_config == {"depth": 4, "width": 3}
    (problem,) = problems_of(
        HyperParams.from_hparams, write(tmp_path, head + "vision_config:\n  a: 1\n  a: 2\n")
    )
    assert problem.endswith(":5: a: given twice, first in line 4")


def test_an_edit_of_nothing_is_refused():
    assert "edits nothing" in problems_of(HyperParams, **BASE, intrinsic=False, external="none")[0]
    assert HyperParams(**BASE, intrinsic=False).external == "latent"
    assert HyperParams(**BASE, method="ft", intrinsic=False, external="none").method == "ft"


def test_values_are_frozen_and_not_shared():
    given_values = {"depth": {"a": 1}}
    h = HyperParams(**BASE, vision_config=given_values)
    given_values["depth"]["a"] = 2
    h.to_dict()["vision_config"]["depth"]["a"] = 3
    assert h.vision_config == {"depth": {"a": 1}}
    with pytest.raises(dataclasses.FrozenInstanceError):
        h.k = 3
    assert dataclasses.replace(h, k=3).k == 3
    with pytest.raises(UserError):
        dataclasses.replace(h, k=0)


def test_every_option_is_described():
    assert all(option.help and option.group for option in OPTIONS.values())
    assert {name for name, option in OPTIONS.items() if option.required} == {"model_name", "name"}
    assert set(OPTIONS) | {"ignored", "source"} == {f.name for f in dataclasses.fields(HyperParams)}


def test_hyper_parameters_are_every_section_and_each_option_is_in_one():
    whole = [value for value in vars(combined).values() if isinstance(value, type)]
    assert all(issubclass(HyperParams, section) for section in [*SECTIONS, *whole])
    assert sum(len(list_own_options(section)) for section in SECTIONS) == len(OPTIONS)
    assert not any(list_own_options(section) for section in set(whole) - set(SECTIONS) - {Section})


def test_a_section_alone_checks_its_values_and_names_their_source():
    made = EncoderOptions(encoder_lr="1e-3", seed=3)
    assert (made.encoder_lr, made.encoder_steps, made.seed) == (1e-3, 2000, 3)
    assert made.get_values(EncoderOptions).keys() == list_own_options(EncoderOptions).keys()
    assert "seed" not in list_own_options(EncoderOptions)
    assert problems_of(EncoderOptions, encoder_lr=0, encoder_steps="x", source="f.yaml") == (
        "f.yaml: encoder_lr: expected a number above 0, got int 0",
        "f.yaml: encoder_steps: expected a whole number at least 0, got str 'x'",
    )
    with pytest.raises(TypeError):
        EncoderOptions(k=3)


def test_a_large_limit_is_written_in_full():
    assert problems_of(HyperParams, **BASE, seed=2**32) == (
        "hparams: seed: expected a whole number between 0 and 4294967295, got int 4294967296",
    )


def test_the_release_file_loads_as_legacy(caplog):
    with caplog.at_level(logging.WARNING, logger="unike"):
        h = HyperParams.from_hparams(RELEASE, ["max_steps=7"], legacy=True)
    assert (h.method, h.model_name, h.name) == ("unike", "minigpt4", "./hugging_cache/vicuna-7b")
    assert (h.layers, h.lr, h.beta, h.n_keys, h.k) == ((30, 31), 7e-4, 0.9, 20, 40)
    assert (h.triplets, h.seed, h.device, h.results_dir) == (40000, 42, "cuda:0", "./results")
    assert (h.image_root, h.rephrase_root) == ("./images", "./images")
    assert (h.memory_loss, h.activation_loss, h.max_steps) == (0.0, 0.0, 7)
    assert h.backbone.original_files
    assert h.backbone.pretrained_ckpt == "./hugging_cache/minigpt4/pretrained_minigpt4_7b.pth"
    assert {"lr", "max_epochs", "batch_size", "alg"} <= set(h.ignored)
    assert not {"edit_lr", "beta", "tp_layers", "memory_loss", "name"} & set(h.ignored)
    (record,) = caplog.records
    assert "\n" not in record.getMessage()
    assert all(key in record.getMessage() for key in h.ignored)


def test_legacy_takes_the_last_of_repeated_keys_and_still_checks(tmp_path):
    text = RELEASE.read_text(encoding="utf-8")
    after = text.count("\n")
    path = write(tmp_path, text + "edit_lr: 1e-3\nn_hidden: x\nbeta: much\nk: 0\n")
    assert HyperParams.from_hparams(path, ["beta=0.5", "k=3"], legacy=True).lr == 1e-3
    found = problems_of(HyperParams.from_hparams, path, legacy=True)
    assert f"{path}:{after + 3}: beta: expected a number at least 0, got str 'much'" in found
    path = write(tmp_path, "edit_lr: fast\nmodel_name: blip2\nname: x\nlr: 1\n")
    (problem,) = problems_of(HyperParams.from_hparams, path, legacy=True)
    assert problem == f"{path}:1: lr: expected a number above 0, got str 'fast'"


def test_the_release_file_is_refused_without_legacy():
    found = problems_of(HyperParams.from_hparams, RELEASE)
    assert any("max_epochs: given twice" in problem for problem in found)
    assert sum("legacy=True" in problem for problem in found) > 50


@pytest.mark.parametrize("value", [None, [], {}, "text", {"lm_head": "output"}, 3])
def test_layers_that_cannot_be_told(value):
    assert read_edited_layers(value) == []
    h = HyperParams.from_dict(BASE | {"tp_layers": value}, legacy=True)
    assert (h.layers, h.ignored) == (4, ("tp_layers",))
