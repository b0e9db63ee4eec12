"""Adapters and exported models as people share them: folders, repositories and their cards."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from forgetting import Forgotten, TextEmbeddings, forget
from forgetting.adapter import load_adapter
from forgetting.cli import main
from forgetting.deploy.card import Base, model_card
from forgetting.deploy.export import export
from forgetting.errors import ProblemError
from forgetting.models.encoder import read_encoder
from forgetting.models.loading import load_model
from tests.clip_fixtures import hugging_face
from tests.conftest import refuses
from tests.test_forget import PLAIN
from tests.test_patch import make_adapter

hub = pytest.importorskip("huggingface_hub")
COMMIT = 40 * "a"
NAMES = ["---", 'a"b: [c', "x\n---\n# y", "`` a`b ```", "<b>|</b>", "[z](http://z)", "{rank}"]


def head_of(folder):
    """The YAML of a folder's card as the Hub reads it."""
    return hub.ModelCard.load(folder / "README.md").data.to_dict()


@pytest.fixture
def acme(tmp_path):
    """A folder in the Hub's cache; its model, as new; its tokenizer; an answer for it."""
    transformers = pytest.importorskip("transformers")
    base = tmp_path / f"models--me--my-clip/snapshots/{COMMIT}"
    evil = tmp_path / f"models--x](http:evil)<script>/snapshots/{COMMIT}/model.safetensors"
    assert Base.of(evil).name is None and Base.of(base / evil.name).name == "me/my-clip"
    base.parent.mkdir(parents=True)
    hugging_face(base, "CLIPModel")
    (base / "README.md").write_text("---\nlicense:\n- apache-2.0\n---\nThe base.")
    words = load_model(str(base))[1]

    def new():
        return transformers.CLIPModel.from_pretrained(base).eval()

    return base, new, words, forget(new(), words, ["Acme Cola"], **PLAIN)


def test_no_name_breaks_a_card():
    """As what reads YAML and Markdown sees it."""
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    accuracies = {"Pets": {"cat|": {"cls_acc_test": 0.5}}, "Cars": {"all": {"all_ds": 0.25}}}
    record = {"final_results": accuracies, "zero_shot": accuracies}
    adapter = replace(make_adapter(torch.randn(24, 16)), record=record)
    seen = []
    for names in (["cat"] * len(NAMES), NAMES):
        text = model_card(replace(adapter, classes=names), "adapter", Base("me/my-clip"))
        tokens = markdown.parse(text.split("\n---\n", 1)[1])
        inner = [x for token in tokens for x in token.children or ()]
        code = [x.content for x in inner if x.type == "code_inline"]
        shape = [x.type for x in tokens], [x.type for x in inner]
        seen.append((hub.ModelCard(text).data.to_dict(), *shape))
    assert seen[0] == seen[1]
    assert {name.replace("\n", r"\n").replace("`", "'") for name in NAMES} <= set(code)
    assert "`cat|` in `Pets`: 50.0% right before, 50.0% after" in text and "`Cars`: 25.0%" in text


def test_exported_folders_have_cards(acme, tmp_path):
    base, _, words, answer = acme
    peft = pytest.importorskip("peft")
    answer.save(tmp_path / "a.safetensors")
    assert "`Acme Cola`" in (tmp_path / "a.safetensors.md").read_text("utf-8")
    (tmp_path / "a.safetensors").unlink()
    refuses(r"a\.safetensors\.md exists", answer.save, tmp_path / "a.safetensors")
    answer.save(tmp_path / "a.safetensors", overwrite=True)
    argv = ["export", str(tmp_path / "a.safetensors"), "--overwrite", "--base"]
    for to, relation in (("hf", "finetune"), ("peft", "adapter")):
        out = tmp_path / to
        main([*argv, str(base), "--to", to, "--out", str(out)])
        head, text = head_of(out), (out / "README.md").read_text("utf-8")
        assert (head["base_model"], head["base_model_revision"]) == ("me/my-clip", COMMIT)
        assert (head["base_model_relation"], head["license"]) == (relation, "apache-2.0")
        assert "`Acme Cola`" in text and "hidden, not erased" in text and "The base." not in text
    config = peft.PeftConfig.from_pretrained(out)
    assert (config.base_model_name_or_path, config.revision) == ("me/my-clip", COMMIT)
    argv += [str(base.rename(tmp_path / "plain")), "--to", "peft", "--out", str(out)]
    main([*argv, "--base-id", "you/clip@v1"])
    assert head_of(out)["base_model"] == "you/clip"
    refuses("base_id must be ID", main, [*argv, "--base-id", "a\nb: c"])
    main(argv)  # its id is not known: PEFT finds the base by its folder
    assert "base_model" not in head_of(out)
    loaded = peft.AutoPeftModel.from_pretrained(out).merge_and_unload().eval()
    answer.apply()
    found = read_encoder(loaded, words).embeddings(["Acme Cola", "Pepsi"])
    assert torch.allclose(found, answer.encoder.embeddings(["Acme Cola", "Pepsi"]), atol=1e-4)


def test_a_folder_to_share(acme, tmp_path, monkeypatch):
    _, new, _, answer = acme
    folder = tmp_path / "share"
    answer.save_pretrained(folder)
    assert load_adapter(folder).classes == answer.names
    assert sorted(x.name for x in folder.iterdir()) == ["README.md", "adapter.safetensors"]
    assert head_of(folder)["base_model"] == "me/my-clip"
    refuses("exists; choose", answer.save_pretrained, folder)
    config = answer.encoder.model.config
    config._name_or_path, config._commit_hash = "me/by-name", COMMIT
    answer.save_pretrained(folder, overwrite=True)
    assert head_of(folder)["base_model"] == "me/by-name"
    assert head_of(folder)["base_model_revision"] == COMMIT
    fetch = mock.create_autospec(hub.hf_hub_download, return_value=folder / "adapter.safetensors")
    monkeypatch.setattr(hub, "hf_hub_download", fetch)
    for wrap in (lambda model: model, nn.DataParallel, torch.compile):
        model = new()
        for place, revision in ((folder, None), ("me/no-cola", "v1")):
            found = Forgotten.from_pretrained(place, wrap(model), revision)
            found.apply()
            assert found.verify(model)
    assert fetch.call_args == mock.call("me/no-cola", "adapter.safetensors", revision="v1")
    fetch.side_effect = OSError("offline\nhere")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "leads-out").mkdir()
    (tmp_path / "leads-out/adapter.safetensors").symlink_to(folder / "adapter.safetensors")
    for place, revision, words in (
        ("me/no-cola", None, r"me/no-cola cannot be fetched.*offline here"),
        (folder, "v1", "has no revision"),
        (tmp_path / "none", None, "no folder, nor a name on the Hub"),
        ("share/adapter.safetensors", None, "no folder, nor"),
        (tmp_path / "leads-out", None, "leads out"),
        (tmp_path, None, "no such file"),
    ):
        refuses(words, Forgotten.from_pretrained, place, revision=revision)


def test_push_to_hub(acme, monkeypatch):
    answer = acme[-1]
    api = mock.create_autospec(hub.HfApi, instance=True)
    monkeypatch.setattr(hub, "HfApi", mock.Mock(return_value=api))
    api.create_repo.return_value.repo_id = "me/no-cola"
    api.list_repo_files.return_value = [".gitattributes"]
    api.create_commit.return_value.commit_url = "https://there"
    assert answer.push_to_hub("no-cola", private=True) == "https://there"
    api.create_repo.assert_called_with("no-cola", private=True, exist_ok=True)
    repo, added = api.create_commit.call_args.args
    assert repo == "me/no-cola"
    assert [x.path_in_repo for x in added] == ["adapter.safetensors", "README.md"]
    api.list_repo_files.return_value = ["README.md"]
    refuses("has README", answer.push_to_hub, "no-cola")
    assert api.create_commit.call_count == 1
    answer.push_to_hub("no-cola", overwrite=True)
    api.create_repo.side_effect = OSError("no token")
    refuses(r"no-cola cannot be written.*no token", answer.push_to_hub, "no-cola")


def test_no_adapter_is_ignored_in_silence(acme, tmp_path):
    """By another revision, or where what is changed is not what the model computes with."""
    _, new, _, answer = acme
    answer.save_pretrained(tmp_path / "share")
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["text_projection"])
    head = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["text_projection"])
    trained, bent = peft.get_peft_model(new(), head), new()
    trained.base_model.model.text_projection.modules_to_save["default"].weight.data.add_(1)
    register_parametrization(bent.text_projection, "weight", nn.Tanh(), unsafe=True)
    for model in (peft.get_peft_model(new(), lora), trained, bent):
        refuses("is wrapped", Forgotten.from_pretrained, tmp_path / "share", model)
    beside = peft.LoraConfig(r=2, target_modules=["fc1"])  # of another part: that is no obstacle
    Forgotten.from_pretrained(tmp_path / "share", peft.get_peft_model(new(), beside)).apply()
    other = new()
    other.text_model.final_layer_norm.weight.data.add_(1)
    refuses("another revision", Forgotten.from_pretrained, tmp_path / "share", other)


def test_an_adapter_of_embeddings(acme, tmp_path):
    base, new, words, _ = acme
    answer = forget(TextEmbeddings.of(new(), words), None, ["Acme Cola"], **PLAIN)
    answer.save_pretrained(tmp_path / "share")
    text = (tmp_path / "share/README.md").read_text()
    assert "hide_in_index" in text and "projection is changed" not in text
    assert head_of(tmp_path / "share")["base_model"] == "me/my-clip"
    with pytest.raises(ProblemError, match="of embeddings: it changes no model"):
        Forgotten.from_pretrained(tmp_path / "share", new())
    with pytest.raises(ProblemError, match="of embeddings: it changes no model"):
        export(answer.adapter, base, "hf", tmp_path / "out")
